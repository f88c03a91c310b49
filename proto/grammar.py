"""What an output must be, as a value: `Grammar` of the wire, within its bounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from . import common_pb2
from .errors import InvalidRequest

MAX_GRAMMAR_BYTES = 64 << 10
MAX_CHOICES = 1024

Kind = Literal["json_object", "json_schema", "regex", "choices", "lark"]
KINDS: tuple[Kind, ...] = ("json_object", "json_schema", "regex", "choices", "lark")


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """One grammar; `check` says what is allowed. Whether it can be compiled is known to `model/grammar` only."""

    kind: Kind
    text: str = ""  # of a JSON schema, a regex or Lark
    choices: tuple[str, ...] = ()

    def check(self) -> Self:
        """Returns itself; InvalidRequest where it is out of its bounds."""
        if self.kind == "choices":
            _check_choices(self.choices)
        elif self.kind != "json_object":
            _check_size(f"grammar.{self.kind}", len(self.text.encode()))
        return self

    @classmethod
    def from_pb(cls, pb: common_pb2.Grammar) -> Self:
        """The grammar of a message; InvalidRequest where it has none, or one out of its bounds."""
        kind = pb.WhichOneof("kind")
        if kind is None:
            raise InvalidRequest(f"a grammar of no kind; allowed: {', '.join(KINDS)}")
        if kind == "json_object":
            if not pb.json_object:
                raise InvalidRequest("grammar.json_object is false; allowed: true, or no grammar")
            return cls(kind=kind)
        if kind == "choices":
            _check_choices(pb.choices.texts)  # before they are copied
            return cls(kind=kind, choices=tuple(pb.choices.texts))
        return cls(kind=kind, text=getattr(pb, kind)).check()

    def to_pb(self) -> common_pb2.Grammar:
        """The message."""
        if self.kind == "json_object":
            return common_pb2.Grammar(json_object=True)
        if self.kind == "choices":
            return common_pb2.Grammar(choices=common_pb2.Choices(texts=self.choices))
        pb = common_pb2.Grammar()
        setattr(pb, self.kind, self.text)
        return pb


def _check_choices(texts: Sequence[str]) -> None:
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(f"grammar.choices has {len(texts)} texts; allowed: 1 to {MAX_CHOICES}")
    _check_size("grammar.choices", sum(len(text.encode()) for text in texts))


def _check_size(name: str, size: int) -> None:
    if not 1 <= size <= MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{name} has {size} bytes; allowed: 1 to {MAX_GRAMMAR_BYTES}")
