"""A conversation as callers give it, and as a chat template is given it."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...proto.errors import InvalidRequest, shown
from .template_traits import TemplateTraits

ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = Sequence[Mapping[str, Any]]
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})
NO_TOOLS = "the model's chat template has no tools; allowed: a request without tools, calls of them and their answers"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What is rendered. All values are those of JSON.

    Messages have `role` and `content`, both text; where they are not empty, `name`; of an assistant `reasoning` and
    `tool_calls`, each {"id", "type": "function", "function": {"name", "arguments": an object}}; of a tool
    `tool_call_id`.
    """

    messages: Messages
    tools: Sequence[Mapping[str, Any]] = ()  # {"type": "function", "function": {"name", "description", "parameters"}}
    variables: Mapping[str, Any] = field(default_factory=dict)  # further ones, for the template
    add_generation_prompt: bool = True  # up to where the assistant's next message begins
    continue_final: bool = False  # up to where the last message ends, which goes on

    def check(self, traits: TemplateTraits) -> None:
        """InvalidRequest for a conversation that says what a template with these traits would leave out."""
        if not self.messages:
            raise InvalidRequest("a conversation with no messages; allowed: at least one")
        for message in self.messages:
            role = message["role"]
            if role not in ROLES:
                raise InvalidRequest(f"a message with role {shown(role)}; allowed: {', '.join(ROLES)}")
            if (role == "tool" or message.get("tool_calls")) and not traits.tool_calls:
                raise InvalidRequest(NO_TOOLS)
        if self.tools and not traits.tools:
            raise InvalidRequest(NO_TOOLS)

    @property
    def has_calls(self) -> bool:
        """Whether a message calls a tool."""
        return any(message.get("tool_calls") for message in self.messages)

    def for_template(self, traits: TemplateTraits, *, arguments_as_text: bool = False) -> list[dict[str, Any]]:
        """The messages under the names that a template with these traits knows."""
        made = [_for_template(message, traits) for message in self.messages]
        if arguments_as_text:
            for message in made:
                if calls := message.get("tool_calls"):
                    message["tool_calls"] = [_with_text(call) for call in calls]
        return made


def check_variables(names: Collection[str], taken: Collection[str]) -> None:
    """InvalidRequest where a variable of a request would hide one of the template's own."""
    for name in names:
        if name in _RESERVED or name in taken or name.startswith("_") or not name.isidentifier():
            raise InvalidRequest(
                f"template_kwargs has {shown(name)}; allowed: variables that the chat template has no other use for"
            )


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _for_template(message: Mapping[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    made = {key: value for key, value in message.items() if key != "reasoning"}
    if made["role"] == "developer" and not traits.developer:
        made["role"] = "system"
    if reasoning := message.get("reasoning"):
        made |= dict.fromkeys(traits.reasoning, reasoning)
    return made
