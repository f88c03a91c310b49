"""How a chat template writes calls of tools: what stands around a name and its arguments."""

from dataclasses import dataclass

Piece = str | int  # a text, or the id of a token


@dataclass(frozen=True, kw_only=True)
class CallSyntax:
    """Calls are opening, call, separator, call, ..., closing; a call is before, name, between, JSON, after."""

    before: tuple[Piece, ...]
    between: tuple[Piece, ...]
    after: tuple[Piece, ...]
    opening: tuple[Piece, ...] = ()
    separator: tuple[Piece, ...] | None = ("\n",)  # None: one call only
    closing: tuple[Piece, ...] = ()


# For a template whose way is not known: that of most open models (Hermes, Qwen), which any tokenizer can spell.
PLAIN = CallSyntax(before=('<tool_call>\n{"name": "',), between=('", "arguments": ',), after=("}\n</tool_call>",))
