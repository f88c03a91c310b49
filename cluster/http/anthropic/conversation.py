"""A conversation as Anthropic's clients send it, as the `Chat` of the wire."""

import json
from typing import Any, Literal

from ....proto.generation_pb2 import Chat, ChatMessage, Tool, ToolCall
from ...text.answer_parser import ToolChoice
from ..errors import BadField
from .schema.blocks import TextBlock, ThinkingBlock, ToolResultBlock, ToolUseBlock
from .schema.requests import CountRequest, CustomTool, Turn

_BETWEEN = "\n\n"  # texts of messages that are one turn
_MODES: dict[str, Literal["auto", "none", "required"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


def tool_choice_of(body: CountRequest) -> ToolChoice:
    """Whether a tool must be called, and which."""
    choice = body.tool_choice
    return ToolChoice() if choice is None else ToolChoice(_MODES[choice.type], choice.name or "")


def is_parallel(body: CountRequest) -> bool:
    """Whether an answer may call several tools."""
    return body.tool_choice is None or not body.tool_choice.disable_parallel_tool_use


def continues(body: CountRequest) -> bool:
    """Whether the answer goes on where the last message ends. BadField where that cannot be."""
    last = body.messages[-1]
    if last.role != "assistant":
        return False
    if any(isinstance(block, ToolUseBlock) for block in _blocks(last)):
        raise BadField("messages end with tool_use; allowed: with its tool_result behind", "messages")
    return True


def chat_of(body: CountRequest) -> Chat:
    """The conversation of a request, with what the model may call and the variables of its template."""
    messages = list[ChatMessage]()
    if body.system:
        system = body.system if isinstance(body.system, str) else "".join(block.text for block in body.system)
        messages.append(ChatMessage(role="system", content=system))
    called: dict[str, str] = {}  # the name of the tool by the call's id
    for number, turn in enumerate(body.messages):
        for message in _messages(turn, number, called):
            _append(messages, message)
    offered = [] if tool_choice_of(body).mode == "none" else body.tools or []
    return Chat(messages=messages, tools=map(_tool, offered), template_kwargs=_template_kwargs(body))


def _blocks(turn: Turn) -> list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock]:
    return [TextBlock(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content


def _messages(turn: Turn, number: int, called: dict[str, str]) -> list[ChatMessage]:
    """The messages that one is made of: what tools have answered are messages of their own."""
    found = list[ChatMessage]()
    own: ChatMessage | None = None
    for index, block in enumerate(_blocks(turn)):
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in called:
                where = f"messages.{number}.content.{index}.tool_use_id"
                raise BadField(f"{where} is of no tool_use before; allowed: the id of one", where)
            name = called[block.tool_use_id]
            content = _text(block)
            found.append(ChatMessage(role="tool", name=name, tool_call_id=block.tool_use_id, content=content))
            own = None
            continue
        if own is None:
            own = ChatMessage(role=turn.role)
            found.append(own)
        if isinstance(block, TextBlock):
            own.content += block.text
        elif isinstance(block, ThinkingBlock):
            own.reasoning += block.thinking
        else:
            called[block.id] = block.name
            own.tool_calls.append(ToolCall(id=block.id, name=block.name, arguments=json.dumps(block.input)))
    return found or [ChatMessage(role=turn.role)]


def _append(messages: list[ChatMessage], message: ChatMessage) -> None:
    """Puts a message behind the others; one of the same role is of the same turn, as many templates take no other."""
    last = messages[-1] if messages else None
    if last is None or last.role != message.role or message.role == "tool":
        messages.append(message)
        return
    last.content += (_BETWEEN if last.content and message.content else "") + message.content
    last.reasoning += (_BETWEEN if last.reasoning and message.reasoning else "") + message.reasoning
    last.tool_calls.extend(message.tool_calls)


def _text(block: ToolResultBlock) -> str:
    if isinstance(block.content, list):
        return "".join(each.text for each in block.content)
    return block.content or ""


def _tool(tool: CustomTool) -> Tool:
    return Tool(name=tool.name, description=tool.description or "", parameters=json.dumps(tool.input_schema))


def _template_kwargs(body: CountRequest) -> str:
    """Templates name the same things differently; what one does not know it leaves alone."""
    kwargs: dict[str, Any] = {}
    thinks = None if body.thinking is None else {"enabled": True, "disabled": False}.get(body.thinking.type)
    if tool_choice_of(body).mode == "required":  # the call begins at once
        if thinks:
            raise BadField("thinking is enabled and a call required; allowed: tool_choice auto or none", "thinking")
        thinks = False
    if thinks is not None:
        kwargs |= {"enable_thinking": thinks, "thinking": thinks}
    if body.output_config is not None and body.output_config.effort is not None:
        kwargs["reasoning_effort"] = body.output_config.effort
    return json.dumps(kwargs) if kwargs else ""
