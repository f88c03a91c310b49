"""The chat of a request: checked, and as the tokenizer takes it."""

from typing import Any

from ...model.text.conversation import ROLES, Conversation
from ...proto.errors import InvalidRequest, shown
from ...proto.generation_pb2 import Chat, ChatMessage, ToolCall
from .served import ServedModel
from .tools import checked_name, for_template, parse_object


def check_size(chat: Chat, model: ServedModel) -> int:
    """The bytes of a chat; InvalidRequest where it is more than the gateway takes."""
    limits, size = model.limits, chat.ByteSize()
    if len(chat.messages) > limits.max_chat_messages:
        raise InvalidRequest(
            f"chat.messages has {len(chat.messages)} messages; allowed: at most {limits.max_chat_messages}"
        )
    if size > limits.max_prompt_bytes:
        raise InvalidRequest(f"chat of {size} bytes; allowed: at most {limits.max_prompt_bytes}")
    calls = sum(len(message.tool_calls) for message in chat.messages)
    if calls > limits.max_chat_messages:
        raise InvalidRequest(f"chat.messages have {calls} tool_calls; allowed: at most {limits.max_chat_messages}")
    return size


def conversation_of(chat: Chat, model: ServedModel, *, continue_final: bool) -> Conversation:
    """The conversation of a chat whose size was checked; InvalidRequest for what is not valid in it."""
    if not chat.messages:
        raise InvalidRequest("the chat has no messages; allowed: at least one")
    messages = [_message(message) for message in chat.messages]
    if not model.tokenizer.has_chat_template:
        raise InvalidRequest(f"model {model.name} has no chat template; allowed: prompt or tokens")
    if continue_final and chat.HasField("add_generation_prompt") and chat.add_generation_prompt:
        raise InvalidRequest("continue_final_message with add_generation_prompt; allowed: one of them")
    return Conversation(
        messages=messages,
        tools=for_template(chat.tools),
        variables=parse_object(chat.template_kwargs, "template_kwargs") if chat.template_kwargs else {},
        add_generation_prompt=not chat.HasField("add_generation_prompt") or chat.add_generation_prompt,
        continue_final=continue_final,
    )


def _message(message: ChatMessage) -> dict[str, Any]:
    role = message.role
    if role not in ROLES:
        raise InvalidRequest(f"unknown role {shown(role)} in a chat message; allowed: {', '.join(ROLES)}")
    for name, owner in (("tool_calls", "assistant"), ("reasoning", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, name) and role != owner:
            raise InvalidRequest(f"a chat message of role {role} has {name}; allowed: of role {owner}")
    made: dict[str, Any] = {"role": role, "content": message.content}
    made |= {name: value for name in ("name", "tool_call_id", "reasoning") if (value := getattr(message, name))}
    if message.tool_calls:
        made["tool_calls"] = [_call(call) for call in message.tool_calls]
    return made


def _call(call: ToolCall) -> dict[str, Any]:
    """A call as transformers hands it to a template: arguments are an object, not its text."""
    name = checked_name(call.name)
    arguments = parse_object(call.arguments, f"the arguments of a call of {name}") if call.arguments else {}
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call.id, **made} if call.id else made
