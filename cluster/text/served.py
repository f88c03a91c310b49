"""The model as the gateway knows it: its limits and its text, no weights and no torch."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...model.text.conversation import Conversation
from ...proto.common_pb2 import Grammar
from ...proto.errors import InvalidRequest, NotFound, shown
from ...proto.generation_pb2 import Chat, Tool
from .answer_parser import AnswerParser, ToolChoice
from .answers import Answers
from .tokenizing import TokenizerThreads


class TextEncoder(Protocol):
    """What the gateway needs of a tokenizer (`model/text/tokenizer.py`)."""

    @property
    def has_chat_template(self) -> bool: ...
    def bytes_of(self, token_id: int, /) -> bytes: ...
    def encode(self, text: str, /, *, most_tokens: int) -> list[int]: ...
    def encode_chat(self, conversation: Conversation, /, *, most_tokens: int, parse_special: bool) -> list[int]: ...


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
    answers: Answers = field(default_factory=Answers)

    def check_name(self, name: str) -> None:
        """NotFound unless `name` is empty or this model's."""
        if name not in ("", self.name):
            raise NotFound(f"no model {shown(name)} here; available: {self.name}")

    def new_answer_parser(self, chat: Chat, choice: ToolChoice, prompt_token_ids: Sequence[int] = ()) -> AnswerParser:
        """For one answer to a chat. `prompt_token_ids`: what it was tokenized to, of which the end tells where in a
        turn the answer begins (a template may open the reasoning itself)."""
        return self.answers.parser(chat, choice, prompt_token_ids)

    def tool_grammar(self, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool = True) -> Grammar | None:
        """What an answer must be where the choice is `required`, else None; InvalidRequest for tools or a choice that
        are not valid. `parallel`: it may be several calls."""
        return self.answers.grammar(tools, choice, parallel=parallel)


def load_served_model(source: str, manifest: str | None = None, chat_template: str | None = None) -> ServedModel:
    """Reads description and tokenizer of a model; a GGUF is converted once. NotFound for no such model; InvalidRequest
    where it is not what the file `manifest` says. `chat_template`: a file instead of the model's own."""
    from ...model.files.bounded import read_chat_template
    from ...model.load.describe import describe_model
    from ...model.text.tokenizer import Detokenizer, StopStrings, Tokenizer

    described = describe_model(source, manifest)
    tokenizer = Tokenizer(described.path, read_chat_template(Path(chat_template)) if chat_template else None)
    _ = tokenizer.bound  # takes a while once, as the first chat does; no client should wait for them
    if tokenizer.has_chat_template:
        with contextlib.suppress(InvalidRequest):
            tokenizer.encode_chat(Conversation(messages=[{"role": "user", "content": "hello"}]))
    return ServedModel(
        name=described.name,
        fingerprint=described.fingerprint,
        architecture=described.architecture,
        context_length=described.context_length,
        vocab_size=described.vocab_size,
        tokenizer=tokenizer,
        new_decoder=lambda: Detokenizer(tokenizer),
        new_stops=StopStrings,
        answers=Answers(tokenizer),
    )
