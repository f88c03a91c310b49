"""One admitted request on the decode workers: placed, called, and placed again where that loses nothing."""

import logging
from array import array
from collections.abc import Awaitable, Callable

import grpc.aio

from ..kvtransfer.frame import PROTOCOL_VERSION
from ..kvtransfer.hashing import page_hashes, page_salt
from ..proto.decode_pb2 import DecodeEvent, DecodeRequest
from ..proto.decode_pb2_grpc import DecodeStub
from ..proto.errors import STATUS_OF, Exhausted, Expired, IsthmusError, Unavailable
from ..proto.serving import TraceContext
from .request import Admitted
from .router import Demand, Placement, route
from .watch import Fleet

log = logging.getLogger(__name__)

ERROR_OF = {code: error for error, code in STATUS_OF.items()}
AFFINITY_TOKENS = 64  # prompts that share so many first tokens go to the same workers when loads are equal

OnEvent = Callable[[str, DecodeEvent], Awaitable[bool]]  # (decode worker, event) -> whether the answer is finished


def demand_of(request: Admitted) -> Demand:
    """What the router needs to know of a request."""
    return Demand(
        prompt_tokens=len(request.prompt_token_ids),
        max_tokens=request.sampling.max_tokens,
        codec=request.codec,
        affinity=array("I", request.prompt_token_ids[:AFFINITY_TOKENS]).tobytes(),
    )


class Dispatcher:
    """Runs requests on the workers of a fleet."""

    def __init__(self, fleet: Fleet, fingerprint: str) -> None:
        self._fleet = fleet
        self._fingerprint = fingerprint

    async def run(
        self,
        request: Admitted,
        on_event: OnEvent,
        *,
        time_left: Callable[[], float | None],
        trace: TraceContext = (),
    ) -> None:
        """Calls `on_event` for every event until it returns True.

        A decode worker that is gone or full before its first event costs nothing but time: the request goes
        to the next one. Raises the IsthmusError that ended the request; the inner call is cancelled in every
        case.
        """
        demand, failed, emitted = demand_of(request), dict[str, IsthmusError](), False

        async def note(worker: str, event: DecodeEvent) -> bool:
            nonlocal emitted
            emitted = True
            return await on_event(worker, event)

        while True:
            try:
                placement = route(demand, self._fleet.snapshot(), avoid=failed)
            except Unavailable as error:
                raise next(reversed(failed.values()), error) from None
            self._fleet.placed(demand, placement)
            try:
                return await self._call(request, placement, note, time_left(), trace)
            except (Unavailable, Exhausted) as error:
                if emitted:
                    raise
                failed[placement.decode] = error
                log.info(
                    "placing a request again",
                    extra={
                        "fields": {
                            "request_id": request.request_id,
                            "failed": placement.decode,
                            "why": str(error),
                        }
                    },
                )

    async def _call(
        self,
        request: Admitted,
        placement: Placement,
        on_event: OnEvent,
        timeout_s: float | None,
        trace: TraceContext,
    ) -> None:
        worker = placement.decode
        try:
            channel = self._fleet.channel(worker)
        except KeyError:
            raise Unavailable(f"decode worker {worker} left") from None
        message = self._message(request, placement)
        call = DecodeStub(channel).Generate(message, timeout=timeout_s, metadata=trace or None)
        try:
            while True:
                event = await call.read()
                if not isinstance(event, DecodeEvent):
                    raise Unavailable(f"decode worker {worker} ended the answer early")
                if await on_event(worker, event):
                    return
        except grpc.aio.AioRpcError as error:
            raise _translated(error, worker) from None
        finally:
            call.cancel()

    def _message(self, request: Admitted, placement: Placement) -> DecodeRequest:
        salt = page_salt(self._fingerprint, request.codec, placement.codec_hash)
        return DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=request.call_id,
            model_fingerprint=self._fingerprint,
            codec=request.codec,
            prompt_token_ids=request.prompt_token_ids,
            page_hashes=page_hashes(request.prompt_token_ids, placement.page_tokens, salt),
            sampling=request.sampling.to_pb(),
            prefill_addresses=placement.prefill,
        )


def _translated(error: grpc.aio.AioRpcError, worker: str) -> Exception:
    """The error for the client: of the same code where the code is ours, else a bug that is logged here."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Expired("the deadline passed before the answer was finished")
    if code is grpc.StatusCode.CANCELLED:
        return Unavailable(f"decode worker {worker} cancelled the request")
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"decode worker {worker}: {details}")
    known = ERROR_OF.get(code)
    return known(details) if known is not None else RuntimeError(f"decode worker {worker}: {code.name}: {details}")
