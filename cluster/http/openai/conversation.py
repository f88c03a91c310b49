"""A conversation as clients send it, as the `Chat` of the wire."""

import json
from typing import Any

from ....proto.generation_pb2 import Chat, ChatMessage, Tool, ToolCall
from ...text.answer_parser import ToolChoice
from ..errors import BadField
from .schema.requests import ChatRequest, Message, TokenizeRequest, ToolNamed, ToolOffered


def chat_of(body: ChatRequest | TokenizeRequest) -> Chat:
    """The conversation of a request, with what the model may call and the variables of its template."""
    offered = body.tools or []
    if isinstance(body, ChatRequest) and body.tool_choice == "none":
        offered = []
    chat = Chat(
        messages=[_message(message) for message in body.messages or ()],
        tools=map(_tool, offered),
        template_kwargs=_template_kwargs(body),
    )
    if body.add_generation_prompt is not None:
        if body.add_generation_prompt and body.continue_final_message:
            raise BadField(
                "add_generation_prompt and continue_final_message are both true; allowed: one of them",
                "add_generation_prompt",
            )
        chat.add_generation_prompt = body.add_generation_prompt
    return chat


def tool_choice_of(body: ChatRequest) -> ToolChoice:
    """Whether a tool must be called, and which."""
    if isinstance(body.tool_choice, ToolNamed):
        return ToolChoice("required", body.tool_choice.function.name)
    return ToolChoice(body.tool_choice or "auto")


def _message(message: Message) -> ChatMessage:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    return ChatMessage(
        role=message.role,
        content=content or "",
        name=message.name or "",
        tool_calls=[
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in message.tool_calls or ()
        ],
        tool_call_id=message.tool_call_id or "",
        reasoning=message.reasoning or message.reasoning_content or "",
    )


def _tool(tool: ToolOffered) -> Tool:
    function = tool.function
    parameters = "" if function.parameters is None else json.dumps(function.parameters)
    return Tool(name=function.name, description=function.description or "", parameters=parameters)


def _template_kwargs(body: ChatRequest | TokenizeRequest) -> str:
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if isinstance(body, ChatRequest) and body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    return json.dumps(kwargs) if kwargs else ""
