"""Log-probabilities of tokens in the forms of the API."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from ....proto.common_pb2 import TokenLogprobs
from ...text.served import TextEncoder

LEAST = -9999.0  # of a token that was ruled out: JSON has no infinity


def token_text(data: bytes) -> str:
    """A token as text; one that is no whole character by its bytes, so that no two look alike."""
    try:
        return data.decode()
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
    tokenizer: TextEncoder, token_ids: Sequence[int], logprobs: Iterable[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """Of the tokens of a prompt, by token id, each with the likeliest in its place; None of the first."""
    found: list[dict[str, Any] | None] = []
    for number, (token, each) in enumerate(zip(token_ids, logprobs, strict=False)):
        entries = {top.token_id: top.logprob for top in each.top} | {token: each.logprob}
        found.append(
            {
                str(token_id): {"logprob": max(LEAST, logprob), "decoded_token": _text(tokenizer, token_id)}
                for token_id, logprob in entries.items()
            }
            if number
            else None
        )
    return found


class TextLogprobs:
    """Of the tokens of one text of `/v1/completions`, in pieces: lists, and where in the text each token begins."""

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], *, first_has_none: bool = False
    ) -> dict[str, list[Any]]:
        """The lists of further tokens. `first_has_none`: it begins a prompt, and nothing stands before it."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for number, (token, each) in enumerate(zip(token_ids, logprobs, strict=False)):
            known = number > 0 or not first_has_none
            tops = {_text(self._tokenizer, top.token_id): max(LEAST, top.logprob) for top in each.top}
            found["tokens"].append(_text(self._tokenizer, token))
            found["token_logprobs"].append(max(LEAST, each.logprob) if known else None)
            found["top_logprobs"].append(tops if known and tops else None)
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.bytes_of(token)))
        return found


def joined(pieces: Iterable[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Lists of pieces as those of the whole."""
    whole: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for piece in pieces:
        for name, values in piece.items():
            whole[name] += values
    return whole


def _entry(tokenizer: TextEncoder, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.bytes_of(token_id)
    return {"token": token_text(data), "logprob": max(LEAST, logprob), "bytes": list(data)}


def _text(tokenizer: TextEncoder, token_id: int) -> str:
    return token_text(tokenizer.bytes_of(token_id))
