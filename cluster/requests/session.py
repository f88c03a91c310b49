"""One answer on its way to the client: token ids become text, stop strings end it, the last event sums it up.

No gRPC in here: decode events go in, client events come out. It does not matter how many decode workers the events
come from: a replay goes on where the one before was lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...proto.common_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    Candidate,
    FinishReason,
    TokenLogprobs,
    TransferStats,
)
from ...proto.decode_pb2 import DecodeEvent
from ...proto.generation_pb2 import GenerateEvent, Timings, Usage
from ..text.served import ServedModel, StopMatcher, TextDecoder
from .request import ResolvedRequest


@dataclass(kw_only=True)
class Session:
    """The state of one answer. `push` until `finished`."""

    request: ResolvedRequest
    detokenizer: TextDecoder
    stops: StopMatcher | None  # None where the request has no stop strings
    arrived_s: float  # on the clock that `push` is given
    decode_worker: str = ""
    decode_request_id: str = ""  # by which that knows the request
    replays: int = 0  # times that the answer went on on another decode worker
    token_ids: list[int] = field(default_factory=list)  # the output so far
    finish_reason: FinishReason.ValueType = FINISH_REASON_UNSPECIFIED
    first_token_s: float | None = None
    transfer: TransferStats | None = None
    candidates: tuple[Candidate, ...] = ()  # of the first placement, where the request asks for them
    told: bool = False  # an event was made
    prompt_logprobs: int = 0  # of the prompt's tokens, from its second on, that were passed on
    _of_attempt: int = 0  # and that came in this attempt

    @property
    def has_kv(self) -> bool:
        """Whether the prompt's KV is on the decode worker in full, or nobody waits for it any more."""
        return self.finished or (self.transfer is not None and not self.transfer.partial)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.finish_reason != FINISH_REASON_UNSPECIFIED

    def begin_attempt(self) -> None:
        """What comes from now on is of another decode worker."""
        self._of_attempt = 0

    def resume(self, token_ids: Sequence[int]) -> str:
        """Takes in output that was passed on before; returns its certain text, which was passed on with it.

        What follows continues it: characters, stop strings and indexes that these tokens began.
        """
        return self._take(token_ids)[1]

    def push(self, event: DecodeEvent, now_s: float) -> GenerateEvent:
        """The client's event for one event of the decode worker, at time `now_s`."""
        index = len(self.token_ids)
        tokens, text = self._take(event.token_ids)
        if event.HasField("transfer"):
            self._note(event.transfer)
        if tokens and self.first_token_s is None:
            self.first_token_s = now_s
        if not self.finished and event.finish_reason != FINISH_REASON_UNSPECIFIED:
            text += self._finish(event.finish_reason)
        made = GenerateEvent(
            request_id=self.request.request_id,
            text=text,
            token_ids=tokens,
            index=index,
            logprobs=event.logprobs[: len(tokens)],
            finish_reason=self.finish_reason,
            choice=self.request.choice or 0,
        )
        made.prompt_logprobs.extend(self._take_prompt(event.prompt_logprobs))
        if self.request.return_prompt_token_ids and not self.told:
            made.prompt_token_ids.extend(self.request.prompt_token_ids)
        self.told = True
        if self.finished:
            made.stop_text = self._stop_text()
            made.usage.CopyFrom(self.usage())
            made.timings.CopyFrom(self._timings(now_s))
        return made

    def missing_end(self) -> DecodeEvent | None:
        """The end of an answer that has all its tokens, though its worker was lost before it could say so."""
        sampling = self.request.sampling
        if self.finished:
            return DecodeEvent()
        if self.token_ids and self.token_ids[-1] in sampling.stop_token_ids:
            return DecodeEvent(finish_reason=FINISH_REASON_STOP)
        if len(self.token_ids) >= sampling.max_tokens:
            return DecodeEvent(finish_reason=FINISH_REASON_LENGTH)
        return None

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(prompt_tokens=len(self.request.prompt_token_ids), output_tokens=len(self.token_ids))

    def _stop_text(self) -> str:
        """The stop string that ended the output, if one did."""
        return (self.stops.matched if self.stops is not None else None) or ""

    def _note(self, transfer: TransferStats) -> None:
        """Keeps the statistics of the first transfer that was completed; until one is, what is known so far.

        The first token of a later one is not the one that the client got: its time would make no handover.
        """
        if self.transfer is None or self.transfer.partial:
            self.transfer = transfer
            if self.replays:
                self.transfer.ClearField("first_token_unix_ns")

    def _take_prompt(self, logprobs: Sequence[TokenLogprobs]) -> Sequence[TokenLogprobs]:
        """Those that were not passed on in an attempt before."""
        fresh = logprobs[max(0, self.prompt_logprobs - self._of_attempt) :]
        self._of_attempt += len(logprobs)
        self.prompt_logprobs += len(fresh)
        return fresh

    def _take(self, token_ids: Sequence[int]) -> tuple[list[int], str]:
        """Consumes tokens up to the one that completes a stop string; returns them and their certain text."""
        taken: list[int] = []
        text = ""
        for token in token_ids:
            taken.append(token)
            self.token_ids.append(token)
            text += self._scan(self.detokenizer.push([token]))
            if self.finished:
                break
        return taken, text

    def _scan(self, text: str) -> str:
        """Text that no stop string can take back. Text of the first min_tokens tokens is not searched."""
        if self.stops is None or len(self.token_ids) < self.request.sampling.min_tokens:
            return text
        safe = self.stops.push(text)
        if self.stops.matched is not None:
            self.finish_reason = FINISH_REASON_STOP
        return safe

    def _finish(self, reason: FinishReason.ValueType) -> str:
        """Flushes what was held back; a stop string in it still counts."""
        text = self._scan(self.detokenizer.finish())
        if not self.finished:
            self.finish_reason = reason
            text += self.stops.finish() if self.stops is not None else ""
        return text

    def _timings(self, now_s: float) -> Timings:
        first_s = now_s if self.first_token_s is None else self.first_token_s
        return Timings(
            ttft_ms=(first_s - self.arrived_s) * 1e3,
            total_ms=(now_s - self.arrived_s) * 1e3,
            transfer=self.transfer,
            decode_worker=self.decode_worker,
            seed=self.request.sampling.seed,
            replays=self.replays,
            candidates=self.candidates,
        )


def new_session(request: ResolvedRequest, model: ServedModel, arrived_s: float) -> Session:
    """A session for a request that is about to be placed."""
    stops = request.sampling.stop
    return Session(
        request=request,
        detokenizer=model.new_decoder(),
        stops=model.new_stops(stops) if stops else None,
        arrived_s=arrived_s,
    )
