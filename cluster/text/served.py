"""The model as the gateway knows it: its limits and its text, no weights and no torch."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...proto.errors import InvalidRequest, NotFound, shown
from .tokenizing import TokenizerThreads


class TextEncoder(Protocol):
    """What the gateway needs of a tokenizer (`model/text/tokenizer.py`)."""

    @property
    def has_chat_template(self) -> bool: ...
    def encode(self, text: str, /, *, most_tokens: int) -> list[int]: ...
    def encode_chat(
        self, messages: list[dict[str, str]], /, *, most_tokens: int, continue_final: bool, parse_special: bool
    ) -> list[int]: ...


class TextDecoder(Protocol):
    """Turns the tokens of one answer into text that can no longer change (`model/text/tokenizer.py`)."""

    def push(self, token_ids: Sequence[int], /) -> str: ...
    def finish(self) -> str: ...


class StopMatcher(Protocol):
    """Holds back text that may become a stop string of one request (`model/text/tokenizer.py`)."""

    @property
    def matched(self) -> str | None: ...
    def push(self, text: str, /) -> str: ...
    def finish(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class InputLimits:
    """What a gateway takes as text (`cluster/gateway_config.py` says more)."""

    max_prompt_bytes: int = 1 << 20
    max_chat_messages: int = 4096
    parse_special: bool = False


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The one model that a gateway answers for."""

    name: str
    fingerprint: str
    architecture: str
    context_length: int
    vocab_size: int
    tokenizer: TextEncoder
    new_decoder: Callable[[], TextDecoder]
    new_stops: Callable[[Sequence[str]], StopMatcher]
    limits: InputLimits = InputLimits()
    tokenizer_threads: TokenizerThreads = field(default_factory=TokenizerThreads)
    eos_token_ids: frozenset[int] = frozenset()
    folder: Path | None = None  # of its files on this host; None: it has none

    def check_name(self, name: str) -> None:
        """NotFound unless `name` is empty or this model's."""
        if name not in ("", self.name):
            raise NotFound(f"no model {shown(name)} here; available: {self.name}")


def load_served_model(source: str, manifest: str | None = None) -> ServedModel:
    """Reads description and tokenizer of a model; a GGUF is converted once. NotFound for no such model; InvalidRequest
    where it is not what the file `manifest` says."""
    from ...model.load.describe import describe_model
    from ...model.text.tokenizer import Detokenizer, StopStrings, Tokenizer

    described = describe_model(source, manifest)
    tokenizer = Tokenizer(described.path)
    _ = tokenizer.bound  # takes a while once, as the first chat does; no client should wait for them
    if tokenizer.has_chat_template:
        with contextlib.suppress(InvalidRequest):
            tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    return ServedModel(
        name=described.name,
        fingerprint=described.fingerprint,
        architecture=described.architecture,
        context_length=described.context_length,
        vocab_size=described.vocab_size,
        tokenizer=tokenizer,
        new_decoder=lambda: Detokenizer(tokenizer),
        new_stops=StopStrings,
        eos_token_ids=described.eos_token_ids,
        folder=described.path,
    )
