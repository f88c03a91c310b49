"""Log-probabilities of tokens in the forms of the API."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from ....proto.common_pb2 import TokenLogprobs
from ...text.served import TextEncoder

LEAST = -9999.0  # of a token that was ruled out: JSON has no infinity


def token_text(tokenizer: TextEncoder, token_id: int) -> str:
    """A token as text; one that is no whole character by its bytes, a special one, which has none, by its id."""
    data = tokenizer.bytes_of(token_id)
    try:
        return data.decode() or f"token_id:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(
    tokenizer: TextEncoder, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    """Of the tokens of a message: `{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`."""
    content = [
        {
            **_entry(tokenizer, token, found.logprob),
            "top_logprobs": [_entry(tokenizer, top.token_id, top.logprob) for top in found.top],
        }
        for token, found in zip(token_ids, logprobs, strict=False)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: TextEncoder, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """Of the tokens of a prompt, by token id, each with the likeliest in its place; None of the first. `logprobs`: from
    the second one on."""
    found: list[dict[str, Any] | None] = [None]
    for token, each in zip(token_ids[1:], logprobs, strict=False):
        entries = {top.token_id: top.logprob for top in each.top} | {token: each.logprob}
        found.append(
            {
                str(token_id): {"logprob": max(LEAST, logprob), "decoded_token": token_text(tokenizer, token_id)}
                for token_id, logprob in entries.items()
            }
        )
    return found


class TextLogprobs:
    """Of the tokens of one text of `/v1/completions`, in pieces: lists, and where in the text each token begins."""

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """The lists of further tokens; null where there is no log-probability."""
        found = joined(())
        for token, each in zip(token_ids, logprobs, strict=False):
            tops: dict[str, float] = {}
            for top in each.top if each else ():
                tops.setdefault(
                    token_text(self._tokenizer, top.token_id), max(LEAST, top.logprob)
                )  # the likeliest first
            found["tokens"].append(token_text(self._tokenizer, token))
            found["token_logprobs"].append(None if each is None else max(LEAST, each.logprob))
            found["top_logprobs"].append(tops or None)
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.bytes_of(token)))
        return found

    def push_prompt(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """The same of a prompt; `logprobs`: from its second token on, for nothing stands before the first."""
        return self.push(token_ids, [None, *logprobs])


def joined(pieces: Iterable[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Lists of pieces as those of the whole."""
    whole: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for piece in pieces:
        for name, values in piece.items():
            whole[name] += values
    return whole


def _entry(tokenizer: TextEncoder, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token_id),
        "logprob": max(LEAST, logprob),
        "bytes": list(tokenizer.bytes_of(token_id)),
    }
