"""What a chat template can be given, as far as its source tells."""

from dataclasses import dataclass
from typing import Self

from jinja2 import nodes

_REASONING = ("reasoning_content", "reasoning", "thinking")  # the names that models' templates know it by


@dataclass(frozen=True, kw_only=True)
class TemplateTraits:
    """What a template's source names."""

    tools: bool  # it reads the tools that the model may call
    tool_calls: bool  # it reads calls in the conversation, and writes what tools answered
    developer: bool  # it tells this role from others
    reasoning: tuple[str, ...]  # the keys of a message that it reads for what the model thought
    thinks: bool  # it writes or looks for the end of thinking, as many models mark it

    @classmethod
    def of(cls, tree: nodes.Template) -> Self:
        """The traits of a template."""
        names = {node.name for node in tree.find_all(nodes.Name)}
        constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        literals = constants | {node.data for node in tree.find_all(nodes.TemplateData)}
        keys = constants | {node.attr for node in tree.find_all(nodes.Getattr)}
        return cls(
            tools="tools" in names,
            tool_calls="tool_calls" in keys,
            developer="developer" in keys,
            reasoning=tuple(key for key in _REASONING if key in keys),
            thinks=any("</think>" in text for text in literals),
        )
