"""Events of an answer as responses of the vLLM engine protocol.

A stream has a chunk for each event and a `complete` for each choice that has ended. Without streaming there is nothing
but a `complete` for each choice, in their order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from smg_grpc_proto import vllm_engine_pb2 as vllm

from ...proto.common_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FINISH_REASON_UNSPECIFIED, TokenLogprobs
from ...proto.generation_pb2 import GenerateEvent


@dataclass(kw_only=True)
class _Choice:
    """One of the n answers."""

    token_ids: list[int] = field(default_factory=list)  # not told in a `complete` yet: in a stream those of an event
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # as many, or none
    begun: bool = False
    finished: bool = False


class Responses:
    """Of one request. `completed`, or `aborted`, has what is left to say after the last event."""

    def __init__(self, request: vllm.GenerateRequest) -> None:
        self._stream, self._params = request.stream, request.sampling_params
        self._choices = {index: _Choice() for index in range(max(1, self._params.n))}
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._held: dict[int, vllm.GenerateComplete] = {}
        self.prompt_token_ids: Sequence[int] = ()

    def of(self, event: GenerateEvent) -> Iterator[vllm.GenerateResponse]:
        """What there is to send for an event; for a sign of life there is nothing."""
        self._prompt_logprobs.extend(event.prompt_logprobs)
        choice = self._choices[event.choice]
        if self._stream:
            choice.token_ids, choice.logprobs = [], []
        choice.token_ids.extend(event.token_ids)
        choice.logprobs.extend(event.logprobs)
        if self._stream and event.token_ids:
            yield vllm.GenerateResponse(chunk=self._chunk(event.choice, choice))
        if event.finish_reason != FINISH_REASON_UNSPECIFIED:
            choice.finished = True
            complete = self._complete(event.choice, choice, event)
            if self._stream:
                yield vllm.GenerateResponse(complete=complete)
            else:
                self._held[event.choice] = complete

    def completed(self) -> list[vllm.GenerateResponse]:
        """What was held back until the end."""
        return [vllm.GenerateResponse(complete=self._held[index]) for index in sorted(self._held)]

    def aborted(self) -> list[vllm.GenerateResponse]:
        """The same, and the end of each choice that had none yet."""
        for index, choice in self._choices.items():
            if not choice.finished:
                if self._stream:
                    choice.token_ids, choice.logprobs = [], []
                self._held[index] = self._complete(index, choice, None)
        return self.completed()

    def _chunk(self, index: int, choice: _Choice) -> vllm.GenerateStreamChunk:
        begun, choice.begun = choice.begun, True
        return vllm.GenerateStreamChunk(
            token_ids=choice.token_ids,
            prompt_tokens=len(self.prompt_token_ids),
            completion_tokens=len(choice.token_ids),
            output_logprobs=self._output_logprobs(choice),
            input_logprobs=None if begun else self._input_logprobs(),
            index=index,
        )

    def _complete(self, index: int, choice: _Choice, event: GenerateEvent | None) -> vllm.GenerateComplete:
        """Of the event that ended the choice; None: it was aborted."""
        made = vllm.GenerateComplete(
            output_ids=choice.token_ids,
            finish_reason="abort",
            prompt_tokens=len(self.prompt_token_ids),
            completion_tokens=len(choice.token_ids),
            output_logprobs=self._output_logprobs(choice),
            input_logprobs=self._input_logprobs(),
            index=index,
        )
        if event is None:
            return made
        made.finish_reason = "length" if event.finish_reason == FINISH_REASON_LENGTH else "stop"
        transfer = event.timings.transfer
        made.cached_tokens = transfer.held_tokens + transfer.cached_tokens + transfer.stored_tokens
        if event.finish_reason == FINISH_REASON_STOP:
            if event.stop_text:
                made.matched_stop_str = event.stop_text
            elif choice.token_ids and choice.token_ids[-1] in self._params.stop_token_ids:
                made.matched_token_id = choice.token_ids[-1]
        return made

    def _output_logprobs(self, choice: _Choice) -> vllm.OutputLogProbs | None:
        if not choice.logprobs:
            return None
        return vllm.OutputLogProbs(
            token_logprobs=[each.logprob for each in choice.logprobs],
            token_ids=choice.token_ids,
            top_logprobs=[_top(each) for each in choice.logprobs] if self._params.logprobs else [],
        )

    def _input_logprobs(self) -> vllm.InputLogProbs | None:
        """Of all tokens of the prompt; the first one, which nothing comes before, has no value."""
        if not self._prompt_logprobs:
            return None
        rest = len(self.prompt_token_ids) - 1
        known = [None, *(self._prompt_logprobs[-rest:] if rest else ())]
        return vllm.InputLogProbs(
            token_logprobs=[vllm.InputTokenLogProb(value=None if each is None else each.logprob) for each in known],
            token_ids=self.prompt_token_ids,
            top_logprobs=[_top(each) for each in known] if self._params.prompt_logprobs else [],
        )


def _top(logprobs: TokenLogprobs | None) -> vllm.TopLogProbs:
    top = logprobs.top if logprobs is not None else ()
    return vllm.TopLogProbs(values=[each.logprob for each in top], token_ids=[each.token_id for each in top])
