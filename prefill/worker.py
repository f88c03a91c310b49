"""The prefill worker: how a prompt becomes KV pages.

The life of a request here:
1. `Prefill` checks that the caller means this model, codec and protocol, and that the prompt fits.
2. It waits for room in the send buffer, which it keeps until its call ends: nothing is encoded without it.
   Pages of its beginning that only the store has are read into the host cache.
3. The job waits in the scheduler; with its first chunk it gets pages, those of its cached beginning filled and sent.
4. The engine computes the rest chunk by chunk; each layer's finished pages are encoded into host memory and queued
   for sending, which goes on while the next layers compute.
5. With the last chunk the first token is sampled and overtakes the pages that still wait.
6. The commit, with counts and a digest, ends the stream. Whenever the call ends earlier, the job is dropped. The
   pages stay in the caches.
"""

import asyncio
import itertools
import time
from pathlib import Path

import grpc.aio

from ..kvtransfer.codecs.registry import PageCodec
from ..kvtransfer.encoded import PageFormat
from ..kvtransfer.frame import PROTOCOL_VERSION, Binding
from ..kvtransfer.hashing import checked_scope, page_hashes, page_salt, prompt_hash
from ..kvtransfer.pairing import CodecSet, require_same
from ..kvtransfer.pool.cache import PageCache
from ..kvtransfer.pool.dense import DensePool
from ..kvtransfer.sender import KvSender
from ..kvtransfer.storage.private import make_private, read_secret
from ..kvtransfer.storage.store import PageStore
from ..model.memory import GIB, require_memory, size_of
from ..model.model import Model
from ..model.prompt_logprobs import check_scored, host_bytes
from ..proto import prefill_pb2
from ..proto.errors import Exhausted, InvalidRequest
from ..proto.names import MAX_CALL_NAME, check_name
from ..proto.prefill_pb2 import PrefillAccepted, PrefillEvent, PrefillRequest
from ..proto.prefill_pb2_grpc import PrefillServicer, add_PrefillServicer_to_server
from ..proto.priority import rank_of
from ..proto.rpc.streams import write_in_time
from ..proto.rpc.transport import Transport
from ..proto.sampling import Sampling, checked_forks
from ..proto.security.settings import security_of
from ..proto.worker_pb2 import PageCounts, WorkerReport, WorkerRole
from ..worker.config import chunk_tokens_for
from ..worker.model_setup import load_balance, load_configured, report_model
from ..worker.server import Drained, WorkerServer
from ..worker.step_plan import SequenceId
from .config import PrefillConfig
from .engine import PrefillEngine
from .job import PrefillJob, Prompt
from .memory import plan_memory
from .outbox import Outbox
from .prefix import PrefixCache
from .scheduler import PrefillScheduler
from .send_budget import Reservation, SendBudget

SIGN_OF_LIFE_S = 1.0  # a transfer in which nothing else is sent for so long says that it goes on

SERVICE = prefill_pb2.DESCRIPTOR.services_by_name["Prefill"]


class PrefillWorker(PrefillServicer):
    """One prefill worker: a gRPC server and an engine thread. Starts with or without Ray."""

    def __init__(self, config: PrefillConfig) -> None:
        self.config = config
        role = WorkerRole.WORKER_ROLE_PREFILL
        self.transport = Transport(security_of(config.tls, config.cluster_id, "prefill"))
        self.server = WorkerServer(
            *(role, config.listen, config.advertise, config.name, self.transport),
            health_listen=config.health_listen,
        )
        self._ids = itertools.count()
        self._open: set[PrefillJob] = set()
        self._model: Model
        self._engine: PrefillEngine
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
        self._store_secret = read_secret(Path(config.store_key_file).expanduser()) if config.store_key_file else None
        if config.store_dir:
            make_private(Path(config.store_dir))
        balance = await load_balance(config, model)
        self._codecs = CodecSet(config.codecs, config.default_codec, model.layers, config.page_tokens, balance)
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
        self._buffer = SendBudget(int(config.host_buffer_gib * GIB))
        pages = self._memory.pages
        self._pool = DensePool(model.layers, pages, config.page_tokens, dtype=model.dtype, device=model.device)
        chunk_tokens = config.chunk_tokens or chunk_tokens_for(model.device, config.page_tokens)
        self._scheduler = PrefillScheduler(chunk_tokens=chunk_tokens, page_tokens=config.page_tokens)
        self._host = PageCache(int(config.host_cache_gib * GIB))
        store = None
        if config.store_dir:
            store = PageStore(Path(config.store_dir), int(config.store_gib * GIB), self._store_secret)
        self._store = store
        self._prefixes = PrefixCache(self._pool, self._host, store)
        self._engine = PrefillEngine(
            model, self._pool, self._prefixes, self._scheduler, self.server.on_engine_failure()
        )
        self._engine.thread.start()
        self._has_engine = True
        await self.server.open(SERVICE, lambda server: add_PrefillServicer_to_server(self, server), self._fill_report)

    async def drain(self, timeout_s: float) -> Drained:
        """Takes no new requests, waits so long for the running ones and hands over what is left."""
        return await self.server.drain(timeout_s)

    async def stop(self) -> None:
        """Ends at once: running transfers are cancelled."""
        await self.server.close()
        await self.transport.close()
        if self._has_engine:
            await asyncio.to_thread(self._engine.thread.stop)
            await asyncio.to_thread(self._prefixes.close)

    async def Prefill(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: PrefillRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """One transfer: the response stream is the KV."""
        with self.server.request():
            job = self._job(request, context.time_remaining())
            accepted = PrefillAccepted(worker_id=self.server.name, queued_tokens=self._scheduler.waiting_tokens)
            self._open.add(job)
            needed = self._host_bytes(job.prompt, job.sampling)
            reservation = self._buffer.reserve(needed, rank=job.rank, tokens=len(job.token_ids))
            try:
                await context.write(PrefillEvent(accepted=accepted))
                await _wait_granted(reservation, context, accepted)
                await self._prefixes.fetch(job)
                self._engine.submit(job)
                await _send(job, context, accepted)
            finally:
                self._open.discard(job)
                self._engine.drop(job)
                self._end_reservation(reservation)

    def _host_bytes(self, prompt: Prompt, sampling: Sampling) -> int:
        """What a prompt holds in host memory at most; from a store it may bring pages in other forms than it sends."""
        scored = host_bytes(len(prompt.token_ids), sampling.prompt_logprobs)
        return prompt.encoded_bytes * (2 if self._store else 1) + scored

    def _end_reservation(self, reservation: Reservation) -> None:
        """Ends it once the engine has freed the pages."""
        if not reservation.granted.is_set():
            self._buffer.end(reservation)
            return
        loop = asyncio.get_running_loop()
        self._engine.thread.post(lambda: loop.call_soon_threadsafe(self._buffer.end, reservation))

    def _job(self, request: PrefillRequest, time_left_s: float | None) -> PrefillJob:
        codec = self._check(request)
        token_ids = list(request.prompt_token_ids)
        scope = checked_scope(request.prefix_scope)
        salt = page_salt(request.model_fingerprint, codec.name, codec.params_hash, request.tenant, scope)
        binding = Binding(
            request_id=request.request_id,
            attempt=request.attempt,
            model_fingerprint=request.model_fingerprint,
            codec=codec.name,
            codec_hash=codec.params_hash,
            prompt_hash=prompt_hash(token_ids, salt),
        )
        form = PageFormat(
            model_fingerprint=request.model_fingerprint,
            codec=codec,
            layers=self._model.layers,
            page_tokens=self.config.page_tokens,
            dtype=self._model.dtype,
        )
        # Our own hashes, not the caller's: what others are answered with must be what these tokens give.
        hashes = page_hashes(token_ids, form.page_tokens, salt)
        sampling = Sampling.from_pb(request.sampling).check_vocabulary(self._model.vocab_size)
        prompt = Prompt(
            token_ids=token_ids,
            form=form,
            page_hashes=hashes,
            tenant=request.tenant,
            is_shared=not scope,
            receiver_pages=request.held_pages,
            is_scored=sampling.prompt_logprobs is not None,
        )
        self._buffer.check(self._host_bytes(prompt, sampling))
        return PrefillJob(
            id=SequenceId(next(self._ids)),
            worker=self.server.name,
            attempt=request.attempt,
            prompt=prompt,
            sampling=sampling,
            sender=KvSender(form, hashes, len(token_ids), request.held_pages * form.page_tokens),
            outbox=Outbox(asyncio.get_running_loop(), binding),
            rank=rank_of(request.priority, resumes=request.resumes),
            forks=checked_forks(request.forks),
            alone=request.alone,
            deadline_s=None if time_left_s is None else time.monotonic() + time_left_s,
        )

    def _check(self, request: PrefillRequest) -> PageCodec:
        """The codec of a request that this worker can serve; raises what is wrong with any other."""
        model, config, who = self._model, self.config, f"prefill worker {self.server.name}"
        require_same(
            who,
            {
                "protocol version": (request.protocol_version, PROTOCOL_VERSION),
                "model": (request.model_fingerprint, model.fingerprint),
                "page size": (request.page_tokens, config.page_tokens),
            },
        )
        codec = self._codecs.get(request.codec)
        require_same(who, {f"parameters of codec {codec.name}": (request.codec_hash, codec.params_hash)})
        check_name("request_id", request.request_id, MAX_CALL_NAME)
        check_name("tenant", request.tenant)
        tokens = len(request.prompt_token_ids)
        room = min(model.context_length, self._pool.allocator.total * config.page_tokens)
        if not 1 <= tokens <= room:
            raise InvalidRequest(f"a prompt of {tokens} tokens; allowed here: 1 to {room}")
        if max(request.prompt_token_ids) >= model.vocab_size:
            raise InvalidRequest(f"a token id is out of the vocabulary of {model.vocab_size}")
        if request.held_pages * config.page_tokens > tokens:
            raise InvalidRequest(f"held_pages {request.held_pages} is more than the prompt has")
        check_scored(request.sampling, model)
        if request.held_pages and request.sampling.HasField("prompt_logprobs"):
            raise InvalidRequest(f"held_pages is {request.held_pages}; allowed with prompt_logprobs: 0")
        waiting = sum(len(job.token_ids) for job in self._open)
        if waiting + tokens > config.max_waiting_tokens:
            raise Exhausted(f"{waiting} prompt tokens are in work here already; try again later")
        return codec

    def _buffered(self) -> int:
        return sum(job.outbox.buffered_bytes for job in self._open)

    def _fill_report(self, report: WorkerReport) -> None:
        report_model(report, self._model)
        self._codecs.fill_report(report)
        table, total = self._prefixes.table, self._pool.allocator.total
        in_use, cached = table.in_use, table.cached
        report.pages.CopyFrom(PageCounts(total=total, free=total - in_use - cached, cached=cached, in_use=in_use))
        report.waiting_requests = self._engine.waiting + self._buffer.waiting
        report.running_requests = self._engine.active - self._engine.waiting
        report.waiting_tokens = self._scheduler.waiting_tokens + self._buffer.waiting_tokens
        report.step_ms = int(self._engine.thread.step_s * 1e3)
        report.host_buffer_bytes = self._buffered()
        report.memory.extend(
            self._memory.uses(
                pages=(in_use + cached) * self._memory.page_bytes,
                buffered=self._buffer.reserved_bytes,
                cached=self._host.bytes - self._host.pinned_bytes,
                queued=self._store.queued_bytes if self._store else 0,
            )
        )
        self._engine.rates.fill_report(report)
        counters = {
            **self._engine.counters,
            "host_cache_pages": len(self._host),
            "host_cache_bytes": self._host.bytes,
            "host_cache_evicted": self._host.evicted,
            "store_timeouts": self._prefixes.fetch_timeouts,
            **(self._store.counters if self._store else {}),
        }
        for name, count in counters.items():
            report.counters[name] = count


async def _wait_granted(reservation: Reservation, context: grpc.aio.ServicerContext, accepted: PrefillAccepted) -> None:
    """Waits for room in the send buffer, with signs of life meanwhile."""
    while not reservation.granted.is_set():
        try:
            async with asyncio.timeout(SIGN_OF_LIFE_S):
                await reservation.granted.wait()
        except TimeoutError:
            await write_in_time(context, PrefillEvent(accepted=accepted))


async def _send(job: PrefillJob, context: grpc.aio.ServicerContext, accepted: PrefillAccepted) -> None:
    """Writes what the engine makes, until the commit; while that is nothing, signs of life."""
    done = False
    while not done:
        try:
            async with asyncio.timeout(SIGN_OF_LIFE_S):
                event = await job.outbox.get()
        except TimeoutError:
            event = PrefillEvent(accepted=accepted)
        await write_in_time(context, event)
        job.outbox.wrote(event)
        done = event.HasField("commit")
