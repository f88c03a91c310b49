"""How models write calls of tools: what stands around a name and its arguments, for grammars."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CallSyntax:
    """Calls are opening, call, separator, call, ..., closing; a call is before, name, between, JSON, after."""

    before: str
    between: str
    after: str
    opening: str = ""
    separator: str | None = None  # None: one call only
    closing: str = ""

    def one(self, name: str, arguments: str) -> str:
        """An output that is one call."""
        return f"{self.opening}{self.before}{name}{self.between}{arguments}{self.after}{self.closing}"


# Of Hermes, Qwen and many others. Any tokenizer can spell it: it is the one for models whose own is not known.
PLAIN = CallSyntax(
    before='<tool_call>\n{"name": "', between='", "arguments": ', after="}\n</tool_call>", separator="\n"
)


def deepseek(text: str) -> str:
    """The same with the bars of DeepSeek's tokens."""
    return re.sub(r"<\|([^|]*)\|>", "<\N{FULLWIDTH VERTICAL LINE}\\1\N{FULLWIDTH VERTICAL LINE}>", text)


_DEEPSEEK = {"opening": deepseek("<|tool▁calls▁begin|>"), "closing": deepseek("<|tool▁calls▁end|>")}
SYNTAXES = (
    PLAIN,
    CallSyntax(before="<|channel|>commentary to=functions.", between=" <|constrain|>json<|message|>", after=""),
    CallSyntax(before='{"name": "', between='", "parameters": ', after="}"),
    CallSyntax(before="[TOOL_CALLS]", between="[ARGS]", after="", separator=""),
    CallSyntax(
        opening="[TOOL_CALLS] [",
        before='{"name": "',
        between='", "arguments": ',
        after="}",
        separator=", ",
        closing="]",
    ),
    CallSyntax(
        before=deepseek("<|tool▁call▁begin|>"),
        between=deepseek("<|tool▁sep|>"),
        after=deepseek("<|tool▁call▁end|>"),
        separator="",
        **_DEEPSEEK,
    ),
    CallSyntax(
        before=deepseek("<|tool▁call▁begin|>function<|tool▁sep|>"),
        between="\n```json\n",
        after=deepseek("\n```<|tool▁call▁end|>"),
        separator="\n",
        **_DEEPSEEK,
    ),
)
