"""`isthmus.v1.Generation`: what clients ask of the model."""

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import grpc.aio

from ...proto import generation_pb2, generation_pb2_grpc
from ...proto.errors import Exhausted, Unavailable
from ...proto.rpc.streams import with_heartbeat, write_in_time
from ...proto.rpc.trace import trace_context
from ..access.access import Access
from ..access.usage import Permit
from ..fleet.worker_table import WorkerTable
from ..gateway_config import GatewayConfig
from ..requests.generator import Generator
from ..router.policies import LocalPrefill
from ..router.router import servable_codecs, token_limit
from ..text.served import ServedModel
from .load import Load


class GenerationService(generation_pb2_grpc.GenerationServicer):
    """One model on the workers of a fleet."""

    def __init__(
        self,
        model: ServedModel,
        workers: WorkerTable,
        generator: Generator,
        load: Load,
        access: Access,
        config: GatewayConfig,
    ) -> None:
        self._local_prefill: LocalPrefill = config.local_prefill
        self._sign_of_life_s = config.sign_of_life_s
        self._model = model
        self._workers = workers
        self._generator = generator
        self._load = load
        self._access = access
        self.draining = False

    async def Generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateEvent],
    ) -> None:
        arrived_s, log = time.monotonic(), self._generator.log
        with self._load.track(), ExitStack() as of_request:
            try:
                with log.before_run(request, arrived_s):
                    if self.draining:
                        raise Unavailable("the gateway is shutting down")
                    caller = self._access.caller()
                    request.tenant, request.priority = self._access.claimed(request.tenant, request.priority)
                    permit = of_request.enter_context(self._access.running(caller))
                    resolved = await self._generator.resolve(request)
                    resolved = replace(resolved, limits=caller.limits)
                    permit.reserve(len(resolved.prompt_token_ids), resolved.sampling.max_tokens, time.monotonic())
                    await context.send_initial_metadata(())
                heartbeat = partial(generation_pb2.GenerateEvent, request_id=resolved.request_id)
                write = partial(_write, context, permit)
                async with with_heartbeat(write, heartbeat, self._sign_of_life_s) as pass_on:
                    await self._generator.run(
                        resolved,
                        pass_on,
                        time_left=context.time_remaining,
                        trace=trace_context(context),
                        arrived_s=arrived_s,
                    )
            except Exhausted as error:
                if error.retry_after_s is None:
                    error.retry_after_s = self._load.retry_after_s()
                raise

    async def GetModel(self, request: generation_pb2.GetModelRequest, context: object) -> generation_pb2.Model:
        self._model.check_name(request.name)
        return self._describe()

    async def ListModels(
        self, request: generation_pb2.ListModelsRequest, context: object
    ) -> generation_pb2.ListModelsResponse:
        return generation_pb2.ListModelsResponse(models=[self._describe()])

    def _describe(self) -> generation_pb2.Model:
        model, table = self._model, self._workers.routing
        return generation_pb2.Model(
            name=model.name,
            fingerprint=model.fingerprint,
            architecture=model.architecture,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            has_chat_template=model.tokenizer.has_chat_template,
            codecs=servable_codecs(table, self._local_prefill),
            default_codec=self._workers.default_codec(),
            max_request_tokens=min(model.context_length, token_limit(table, None, self._local_prefill)[1]),
        )


async def _write(context: grpc.aio.ServicerContext, permit: Permit, event: generation_pb2.GenerateEvent) -> None:
    """Counts what a caller is given, before it is."""
    permit.output_tokens += len(event.token_ids)
    await write_in_time(context, event)
