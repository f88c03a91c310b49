"""`vllm.grpc.engine.VllmEngine`: the gateway as an engine of others' gateways, as SGLang's (SMG). Token ids in and out.

The messages are those of the package smg-grpc-proto; what is served is one cluster, not one engine: it places, replays
and queues below this door as below any other.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import grpc
import grpc.aio
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as smg

from ...proto.errors import InvalidRequest
from ...proto.generation_pb2 import GenerateEvent
from ...proto.rpc.streams import write_in_time
from ...proto.rpc.trace import trace_context
from ...proto.worker_pb2 import WORKER_ROLE_DECODE
from ..access.caller import calling
from ..requests.request import ResolvedRequest
from .behind import Behind
from .request import translated
from .response import Responses
from .tokenizer_files import TokenizerFiles

ENGINE = vllm.DESCRIPTOR.services_by_name["VllmEngine"]
add_to = vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server

# SMG looks for a folder, then for a repository of the Hugging Face hub of this name before it asks GetTokenizer: there
# is none of either. By the model's name it might find a stranger's.
NO_PATH = "isthmus:///"

Key = tuple[str, str]  # who asks, and the request's id: nobody ends what is another's


class VllmEngine(vllm_engine_pb2_grpc.VllmEngineServicer):
    """One gateway in the engine's role."""

    def __init__(self, behind: Behind) -> None:
        self._behind = behind
        self._tokenizer = TokenizerFiles(behind.model.folder)
        self._running: dict[Key, list[asyncio.Timeout]] = {}
        self._start_s, self._received_unix_s = time.monotonic(), 0.0

    async def Generate(self, request: vllm.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        self._received_unix_s = time.time()
        responses = Responses(request)

        async def accepted(resolved: ResolvedRequest) -> None:
            responses.prompt_token_ids = resolved.prompt_token_ids
            await context.send_initial_metadata(())

        async def write(event: GenerateEvent) -> None:
            for response in responses.of(event):
                await write_in_time(context, response)

        abort = asyncio.timeout(None)  # rescheduled to now by Abort
        try:
            async with abort:
                with self._abortable(request.request_id, abort):
                    asked = await translated(request, self._behind.model.context_length)
                    left, trace = context.time_remaining, trace_context(context)
                    await self._behind.answer(asked, write, accepted, time_left=left, trace=trace)
        except TimeoutError:
            if not abort.expired():
                raise
            rest = responses.aborted()
        else:
            rest = responses.completed()
        for response in rest:
            await write_in_time(context, response)

    @contextlib.contextmanager
    def _abortable(self, request_id: str, scope: asyncio.Timeout) -> Iterator[None]:
        if not request_id:  # one that was not given names nobody's
            yield
            return
        key = _key(request_id)
        self._running.setdefault(key, []).append(scope)
        try:
            yield
        finally:
            scopes = self._running.get(key, [])
            if scope in scopes:
                scopes.remove(scope)
            if not scopes:
                self._running.pop(key, None)

    async def Abort(self, request: vllm.AbortRequest, context: object) -> vllm.AbortResponse:
        """Ends what runs under these ids of this caller; others are none of its business, and no error."""
        for request_id in request.request_ids:
            for scope in self._running.pop(_key(request_id), []):
                scope.reschedule(asyncio.get_running_loop().time())
        return vllm.AbortResponse()

    async def HealthCheck(self, request: vllm.HealthCheckRequest, context: object) -> vllm.HealthCheckResponse:
        healthy = self._behind.serving()
        return vllm.HealthCheckResponse(healthy=healthy, message="" if healthy else "no workers can serve a request")

    async def GetModelInfo(self, request: vllm.GetModelInfoRequest, context: object) -> vllm.GetModelInfoResponse:
        model = self._behind.describe()
        return vllm.GetModelInfoResponse(
            model_path=model.name,
            tokenizer_path=NO_PATH,
            served_model_name=model.name,
            is_generation=True,
            architectures=[model.architecture],
            max_context_length=model.context_length,
            max_req_input_len=max(0, model.max_request_tokens - 1),
            vocab_size=model.vocab_size,
            eos_token_ids=sorted(self._behind.model.eos_token_ids),
        )

    async def GetServerInfo(self, request: vllm.GetServerInfoRequest, context: object) -> vllm.GetServerInfoResponse:
        return vllm.GetServerInfoResponse(
            active_requests=self._behind.active(),
            last_receive_timestamp=self._received_unix_s,
            uptime_seconds=time.monotonic() - self._start_s,
            server_type="vllm-grpc",
            data_parallel_size=1,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: object) -> vllm.GetLoadsResponse:
        """The whole cluster as one scheduler: KV is that of the decode workers, where answers grow."""
        decode = [report for report in self._behind.reports() if report.role == WORKER_ROLE_DECODE]
        used = sum(report.pages.in_use * report.page_tokens for report in decode)
        total = sum(report.pages.total * report.page_tokens for report in decode)
        active, running = self._behind.active(), sum(report.running_requests for report in decode)
        load = vllm.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=max(0, active - running),
            num_total_reqs=max(active, running),
            num_used_tokens=used,
            max_total_num_tokens=total,
            token_usage=used / total if total else 0.0,
        )
        now = datetime.now(UTC).isoformat()
        return vllm.GetLoadsResponse(timestamp=now, version=version("isthmus"), dp_rank_count=1, loads=[load])

    async def GetTokenizer(self, request: smg.GetTokenizerRequest, context: grpc.aio.ServicerContext) -> None:
        for chunk in await self._tokenizer.chunks():
            await write_in_time(context, chunk)

    async def Embed(self, request: vllm.EmbedRequest, context: object) -> vllm.EmbedResponse:
        raise InvalidRequest("Embed has no meaning here: the cluster generates; allowed: Generate")

    async def _unimplemented(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a cluster of many engines has nothing of that kind")

    FlushCache = StartProfile = StopProfile = SubscribeKvEvents = _unimplemented


def _key(request_id: str) -> Key:
    caller = calling.get()
    return (caller.name if caller is not None else "", request_id)
