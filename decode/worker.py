"""The decode worker: how KV pages become tokens. It owns the request.

The life of a request here:
1. `Generate` checks that the gateway means this model and codec, and that the request can ever fit.
2. The request waits until pages for its prompt and some headroom are free; of these it finds some filled already.
3. One `Prefill` call brings the prompt's KV; sections are checked here and decoded by the engine as they come.
   Where the request names no prefill worker, or all have failed, the engine computes the prompt in chunks.
4. The first token is passed on the moment it arrives; the commit puts the request into the batch. Output of a lost
   decode worker is not sent again: the engine runs it through the model, in chunks, and goes on after it.
5. The engine steps the batch; tokens leave as they are drawn. When the call ends, however it ends, the call to the
   prefill worker is cancelled and the pages are free again.
"""

import asyncio
import itertools
from collections import Counter
from functools import partial

import grpc.aio

from ..kvtransfer.codecs.registry import PageCodec
from ..kvtransfer.frame import PROTOCOL_VERSION
from ..kvtransfer.hashing import PageAddresses, checked_scope, page_salt
from ..kvtransfer.pairing import CodecSet, require_same
from ..model.memory import require_memory, size_of
from ..model.model import Model
from ..model.prompt_logprobs import ScoredTokens, check_scored
from ..model.sampling import SampledToken
from ..proto import decode_pb2
from ..proto.common_pb2 import TransferStats
from ..proto.decode_pb2 import DecodeEvent, DecodeRequest
from ..proto.decode_pb2_grpc import DecodeServicer, add_DecodeServicer_to_server
from ..proto.errors import InvalidRequest
from ..proto.names import MAX_CALL_NAME, check_name
from ..proto.prefill_pb2 import FirstToken
from ..proto.priority import rank_of
from ..proto.rpc.addresses import parse_address
from ..proto.rpc.streams import write_in_time
from ..proto.rpc.trace import trace_context
from ..proto.rpc.transport import Transport
from ..proto.sampling import Sampling, checked_forks
from ..proto.security.settings import security_of
from ..proto.worker_pb2 import WorkerReport, WorkerRole
from ..worker.config import chunk_tokens_for
from ..worker.model_setup import load_balance, load_configured, report_model
from ..worker.server import Drained, WorkerServer
from ..worker.start import gently
from ..worker.step_plan import SequenceId
from .config import DecodeConfig
from .engine import DecodeEngine
from .graphs import record_steps
from .memory import keeps_packed, make_pool, plan_memory
from .page_manager import check_fits
from .scheduler import DecodeScheduler
from .sequence import DecodeSequence, PromptReport, Token, TokenStream
from .transfer import PrefillPeers, Transfer, finish_local

MAX_PREFILL_ADDRESSES = 64  # that a request may name: a gateway names eight
SERVICE = decode_pb2.DESCRIPTOR.services_by_name["Decode"]


class DecodeWorker(DecodeServicer):
    """One decode worker: a gRPC server and an engine thread. Starts with or without Ray."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        role = WorkerRole.WORKER_ROLE_DECODE
        self.transport = Transport(security_of(config.tls, config.cluster_id, "decode"))
        self.server = WorkerServer(
            *(role, config.listen, config.advertise, config.name, self.transport),
            health_listen=config.health_listen,
        )
        self._ids = itertools.count()
        self._waiting = 0  # requests without pages, those included that the engine has not heard of yet
        self._counters: Counter[str] = Counter()
        self._peers = PrefillPeers(self.transport)
        self._model: Model
        self._engine: DecodeEngine
        self._is_prepared = False
        self._has_engine = False  # it is made once the model is loaded, which may fail

    @property
    def address(self) -> str:
        """host:port for others, once started."""
        return self.server.address

    @property
    def model(self) -> Model:
        """The loaded model, once started."""
        return self._model

    async def prepare(self, model: Model) -> None:
        """Makes what serving `model` needs, but for pool, engine and server. Raises what is wrong with the settings."""
        config = self.config
        self._model = model
        balance = await load_balance(config, model)
        names = (config.default_codec,) if keeps_packed(config, model.device.type) else config.codecs
        self._codecs = CodecSet(names, config.default_codec, model.layers, config.page_tokens, balance)
        self._memory = plan_memory(config, size_of(model))
        require_memory(self._memory.budgets, model.device)
        self._is_prepared = True

    async def start(self, model: Model | None = None) -> None:
        """Serves `model`, or loads the configured one. Raises what loading raises; OSError where the address cannot be
        bound."""
        config = self.config
        if model is None:
            model = await load_configured(config)
        if not self._is_prepared:
            await self.prepare(model)
        budget = self._memory.kv
        self._pool = pool = make_pool(config, model, self._codecs, budget)
        padded = None
        if config.cuda_graphs != "never":
            padded = await gently(record_steps, model, pool, budget.max_batch)
        self._scheduler = DecodeScheduler(
            total_pages=pool.total_pages,
            page_tokens=config.page_tokens,
            max_batch=budget.max_batch,
            chunk_tokens=config.chunk_tokens,
            idle_chunk_tokens=chunk_tokens_for(model.device, config.page_tokens),
            raw_tokens=budget.local_tokens,
            host_pages=int(config.preempt_gib * (1 << 30)) // pool.saved_page_bytes,
            saved_extra_pages=pool.saved_extra_pages,
        )
        self._engine = DecodeEngine(
            *(model, pool, self._scheduler),
            config=config,
            padded=padded,
            on_failure=self.server.on_engine_failure(),
        )
        self._engine.thread.start()
        self._has_engine = True
        await self.server.open(SERVICE, lambda server: add_DecodeServicer_to_server(self, server), self._fill_report)

    async def drain(self, timeout_s: float) -> Drained:
        """Takes no new requests, waits so long for the running ones and hands over what is left."""
        return await self.server.drain(timeout_s)

    async def stop(self) -> None:
        """Ends at once: running requests are cancelled."""
        await self.server.close()
        await self._peers.close()
        await self.transport.close()
        if self._has_engine:
            await asyncio.to_thread(self._engine.thread.stop)

    async def Generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: DecodeRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """One request, from its pages to its last token."""
        with self.server.request():
            codec = self._check(request)
            sequence = DecodeSequence(
                id=SequenceId(next(self._ids)),
                prompt=list(request.prompt_token_ids),
                sampling=Sampling.from_pb(request.sampling).check_vocabulary(self._model.vocab_size),
                codec=codec,
                stream=TokenStream(),
                output=list(request.emitted_token_ids),
                rank=rank_of(request.priority),
                addresses=self._addresses(request, codec),
                alone=request.alone,
                request_id=request.request_id,
                forks=checked_forks(request.forks),
                fork_of="" if request.emitted_token_ids else request.fork_of,
            )
            sequence.check_emitted(self._model.eos_token_ids, self._model.context_length)
            check_fits(
                sequence.max_tokens(self._model.context_length),
                room=self._pool.total_pages * self.config.page_tokens,
                waiting=self._waiting,
                max_waiting=self.config.max_waiting,
            )
            self._engine.submit(sequence)
            try:
                await self._serve(sequence, request, codec, context)
            finally:
                self._engine.drop(sequence)

    async def _serve(
        self,
        sequence: DecodeSequence,
        request: DecodeRequest,
        codec: PageCodec,
        context: grpc.aio.ServicerContext,
    ) -> None:
        model = self._model

        async def on_first_token(first: FirstToken, known: TransferStats) -> bool:
            finish = sequence.finish_reason(first.token_id, 1, model.eos_token_ids, model.context_length)
            logprobs = first.logprobs if first.HasField("logprobs") else None
            event = Token(first.token_id, logprobs, finish).to_pb()
            event.transfer.CopyFrom(known)
            await write_in_time(context, event)
            return finish is not None

        report = PromptReport(partial(write_in_time, context))
        self._waiting += 1
        try:
            await sequence.stream.wait_for_pages()
        finally:
            self._waiting -= 1
        if sequence.first is not None:
            return await self._serve_fork(sequence, sequence.first, context)
        transfer = Transfer(
            engine=self._engine,
            peers=self._peers,
            sequence=sequence,
            request=request,
            codec=codec,
            layers=model.layers,
            page_tokens=self.config.page_tokens,
            counters=self._counters,
            trace=trace_context(context),
            prompt_report=report,
            on_first_token=on_first_token,
        )
        stats = await transfer.run(context.time_remaining)
        if stats is not None:
            await self._stream(sequence, stats, report, context)

    async def _serve_fork(
        self, sequence: DecodeSequence, first: SampledToken, context: grpc.aio.ServicerContext
    ) -> None:
        """A request that holds all of its prompt's KV, and has its first token."""
        finish = sequence.finish_reason(first.token_id, 1, self._model.eos_token_ids, self._model.context_length)
        event = Token(first.token_id, first.logprobs_pb(), finish).to_pb()
        event.transfer.held_tokens = len(sequence.prompt)
        await write_in_time(context, event)
        if finish is None:
            self._engine.complete(sequence, first.token_id)
            await self._stream(sequence, None, PromptReport(partial(write_in_time, context)), context)

    async def _stream(
        self,
        sequence: DecodeSequence,
        stats: TransferStats | None,
        report: PromptReport,
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Passes on what the engine draws, with the statistics at first, to the end of the output."""
        while True:
            token = await sequence.stream.get()
            if isinstance(token, ScoredTokens):
                await report.pass_on(token.first, token.logprobs)
                continue
            event: DecodeEvent = token.to_pb()
            if stats is not None:
                finish_local(stats, sequence)
                event.transfer.CopyFrom(stats)
                stats = None
            await write_in_time(context, event)
            if token.finish is not None:
                return

    def _check(self, request: DecodeRequest) -> PageCodec:
        """The codec of a request that this worker can serve; raises what is wrong with any other."""
        model = self._model
        require_same(
            f"decode worker {self.server.name}",
            {
                "protocol version": (request.protocol_version, PROTOCOL_VERSION),
                "model": (request.model_fingerprint, model.fingerprint),
            },
        )
        check_name("request_id", request.request_id, MAX_CALL_NAME)
        check_name("tenant", request.tenant)
        if len(request.prefill_addresses) > MAX_PREFILL_ADDRESSES:
            raise InvalidRequest(
                f"{len(request.prefill_addresses)} prefill_addresses; allowed: at most {MAX_PREFILL_ADDRESSES}"
            )
        for address in request.prefill_addresses:
            parse_address(address, to_dial=True, what="prefill_addresses: ")
        tokens = len(request.prompt_token_ids)
        if not 1 <= tokens < model.context_length:
            raise InvalidRequest(f"a prompt of {tokens} tokens; allowed: 1 to {model.context_length - 1}")
        if len(request.emitted_token_ids) >= model.context_length:
            raise InvalidRequest(f"{len(request.emitted_token_ids)} emitted tokens are more than the model's context")
        if max((*request.prompt_token_ids, *request.emitted_token_ids)) >= model.vocab_size:
            raise InvalidRequest(f"a token id is out of the vocabulary of {model.vocab_size}")
        check_scored(request.sampling, model)
        return self._codecs.get(request.codec)

    def _addresses(self, request: DecodeRequest, codec: PageCodec) -> PageAddresses | None:
        scope = checked_scope(request.prefix_scope)
        if scope and not (request.forks or request.fork_of):
            return None  # nobody else would find them
        salt = page_salt(self._model.fingerprint, codec.name, codec.params_hash, request.tenant, scope)
        return PageAddresses(salt, self.config.page_tokens)

    def _fill_report(self, report: WorkerReport) -> None:
        report_model(report, self._model)
        self._codecs.fill_report(report)
        report.pages.CopyFrom(self._pool.counts())
        report.waiting_requests = self._waiting
        report.waiting_tokens = self._scheduler.waiting_tokens
        report.running_requests = self._engine.running()
        report.step_ms = int(self._engine.thread.step_s * 1e3)
        report.host_buffer_bytes = self._engine.pages.saved_bytes
        report.memory.extend(
            self._memory.uses(
                pages=self._pool.used_bytes,
                local=self._engine.local_bytes,
                inbox=self._engine.inbox.nbytes,
                saved=report.host_buffer_bytes,
                forks=self._engine.fork_bytes,
            )
        )
        self._engine.rates.fill_report(report)
        for name, count in {**self._counters, **self._engine.counters}.items():
            report.counters[name] = count
