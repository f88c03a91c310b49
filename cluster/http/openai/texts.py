"""The texts that go on from one prompt of `/v1/completions`, whole or in pieces."""

from typing import Any

from ....proto.generation_pb2 import GenerateEvent, GenerateRequest
from ...requests.request import ResolvedRequest
from ...text.served import ServedModel
from ..common.events import Tally, is_of_answer
from .answers import finish_of
from .logprobs import TextLogprobs, joined, prompt_logprobs
from .schema.requests import CompletionRequest


class Texts:
    """The answers to one prompt; `number`: which of the call's."""

    def __init__(self, model: ServedModel, body: CompletionRequest, request: GenerateRequest, number: int) -> None:
        self._model, self._body, self._request = model, body, request
        self._first = number * (body.n or 1)  # index of its first choice
        self._prompt: list[int] = []
        self._lists: dict[int, TextLogprobs] = {}  # of the answers that have begun
        self._pieces: dict[int, list[dict[str, Any]]] = {}
        self._only_prompt = body.max_tokens == 0
        self.tally = Tally()

    def accept(self, resolved: ResolvedRequest) -> None:
        """What the prompt was tokenized to."""
        self._prompt = resolved.prompt_token_ids
        self.tally.prompt_tokens = len(resolved.prompt_token_ids)

    def collect(self, event: GenerateEvent) -> bytes:
        """Keeps an event for `whole`."""
        if (piece := self.piece(event)) is not None:
            self._pieces.setdefault(piece["index"], []).append(piece)
        return b""

    def piece(self, event: GenerateEvent) -> dict[str, Any] | None:
        """What an event is of a choice, as the API has it; None: nothing."""
        self.tally.push(event)
        if not is_of_answer(event):
            return None
        begins = event.choice not in self._lists
        lists = self._lists.setdefault(event.choice, TextLogprobs(self._model.tokenizer))
        text, found = "", list[dict[str, list[Any]]]()
        prompt = self._of_prompt() if begins else {}
        if begins and self._body.echo:
            text += self._prompt_text()
            if self._body.logprobs is not None:
                found.append(lists.push_prompt(self._prompt, self.tally.prompt_logprobs))
        finish, stop = finish_of(event), event.stop_text
        if self._only_prompt:
            self.tally.output_tokens = 0
            finish, stop = "length" if finish else None, ""
        else:
            text += event.text
            if self._body.logprobs is not None:
                found.append(lists.push(event.token_ids, event.logprobs))
        if not (text or finish or prompt or any(each["tokens"] for each in found) or self._body.return_token_ids):
            return None
        piece: dict[str, Any] = {
            "index": self._first + event.choice,
            "text": text,
            "logprobs": joined(found) if self._body.logprobs is not None else None,
            "finish_reason": finish,
            "stop_reason": stop or None,
            **prompt,
        }
        if self._body.return_token_ids:
            piece["token_ids"] = [] if self._only_prompt else list(event.token_ids)
        return piece

    def whole(self) -> list[dict[str, Any]]:
        """All choices, once they are complete."""
        return [self._joined(self._pieces[index]) for index in sorted(self._pieces)]

    def _joined(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        whole = {**pieces[0], **{name: pieces[-1][name] for name in ("finish_reason", "stop_reason")}}
        whole["text"] = "".join(piece["text"] for piece in pieces)
        if self._body.logprobs is not None:
            whole["logprobs"] = joined(piece["logprobs"] for piece in pieces)
        if self._body.return_token_ids:
            whole["token_ids"] = [token for piece in pieces for token in piece["token_ids"]]
        return whole

    def _of_prompt(self) -> dict[str, Any]:
        """What the first piece of each choice tells of the prompt."""
        told: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            tokenizer = self._model.tokenizer
            told["prompt_logprobs"] = prompt_logprobs(tokenizer, self._prompt, self.tally.prompt_logprobs)
        if self._body.return_token_ids:
            told["prompt_token_ids"] = self._prompt
        return told

    def _prompt_text(self) -> str:
        if self._request.WhichOneof("input") == "prompt":
            return self._request.prompt
        decoder = self._model.new_decoder()
        return decoder.push(self._prompt) + decoder.finish()
