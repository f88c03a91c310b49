"""Chats of clients: what is refused, and what the tokenizer is given."""

import json
from typing import Any

import pytest
from scripted import ByteText, served

from isthmus.cluster.requests.request import encode_chat
from isthmus.cluster.text.served import InputLimits
from isthmus.model.text.conversation import Conversation
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.generation_pb2 import Chat, ChatMessage, Tool, ToolCall

USER = ChatMessage(role="user", content="hi")


class Seen(ByteText):
    """Keeps what it was given."""

    conversation: Conversation

    def encode_chat(self, conversation: Conversation, **more: Any) -> list[int]:
        self.conversation = conversation
        return super().encode_chat(conversation, **more)


async def given(chat: Chat, *, continue_final: bool = False, **limits: Any) -> Conversation:
    seen = Seen()
    await encode_chat(chat, served(tokenizer=seen, limits=InputLimits(**limits)), continue_final=continue_final)
    return seen.conversation


def assistant(**more: Any) -> ChatMessage:
    return ChatMessage(role="assistant", **more)


async def test_all_of_a_chat_reaches_the_tokenizer() -> None:
    chat = Chat(
        messages=[
            ChatMessage(role="developer", content="Be brief."),
            ChatMessage(role="user", content="hi", name="ann"),
            assistant(
                reasoning="Hm.", tool_calls=[ToolCall(id="1", name="f", arguments='{"a": 1}'), ToolCall(name="g")]
            ),
            ChatMessage(role="tool", content="x", tool_call_id="1", name="f"),
        ],
        tools=[Tool(name="f", description="d", parameters='{"properties": {}}'), Tool(name="g")],
        template_kwargs='{"enable_thinking": false}',
        add_generation_prompt=False,
    )
    assert await given(chat) == Conversation(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "hi", "name": "ann"},
            {
                "role": "assistant",
                "content": "",
                "reasoning": "Hm.",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
                    {"type": "function", "function": {"name": "g", "arguments": {}}},
                ],
            },
            {"role": "tool", "content": "x", "tool_call_id": "1", "name": "f"},
        ],
        tools=[
            {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {}}}},
            {
                "type": "function",
                "function": {"name": "g", "description": "", "parameters": {"type": "object", "properties": {}}},
            },
        ],
        variables={"enable_thinking": False},
        add_generation_prompt=False,
    )
    assert (await given(Chat(messages=[USER]))).add_generation_prompt
    assert (await given(Chat(messages=[USER]), continue_final=True)).continue_final


async def test_half_surrogates_of_clients_are_no_text_and_become_question_marks() -> None:
    call = ToolCall(name="f", arguments='{"a\\ud800": ["\\udfff", "\\ud83d\\ude42"]}')
    seen = await given(Chat(messages=[assistant(tool_calls=[call])]))
    assert seen.messages[0]["tool_calls"][0]["function"]["arguments"] == {"a?": ["?", "🙂"]}


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (Chat(), "the chat has no messages"),
        (Chat(messages=[ChatMessage(role="robot")]), "unknown role 'robot'"),
        (Chat(messages=[ChatMessage(role="user", tool_calls=[ToolCall(name="f")])]), "of role user has tool_calls"),
        (Chat(messages=[ChatMessage(role="user", reasoning="x")]), "of role user has reasoning; allowed: of role assi"),
        (Chat(messages=[assistant(tool_call_id="x")]), "has tool_call_id; allowed: of role tool"),
        (Chat(messages=[assistant(tool_calls=[ToolCall(name="f", arguments="{")])]), "the arguments of a call of f is"),
        (Chat(messages=[assistant(tool_calls=[ToolCall(name="f", arguments="3")])]), "allowed: a JSON object"),
        (Chat(messages=[assistant(tool_calls=[ToolCall(name="")])]), "a tool named ''"),
        (Chat(messages=[assistant(tool_calls=[ToolCall(name="f")] * 9)]), "9 tool_calls; allowed: at most 8"),
        (Chat(messages=[USER] * 9), "9 messages; allowed: at most 8"),
        (Chat(messages=[USER], tools=[Tool(name="f", description="x" * 3000)]), "bytes; allowed: at most 2048"),
        (Chat(messages=[USER], template_kwargs="[]"), "template_kwargs is '[]'; allowed: a JSON object"),
        (Chat(messages=[USER], template_kwargs='{"a":' + "{" * 999), "template_kwargs is not JSON"),
        (Chat(messages=[USER], template_kwargs=json.dumps({"a": "x" * 2100})), "bytes; allowed: at most 2048"),
    ],
)
async def test_chats_that_are_not_valid_are_refused(chat: Chat, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await given(chat, max_chat_messages=8, max_prompt_bytes=2048)
    assert reason in str(refused.value)


async def test_a_chat_either_goes_on_or_begins_a_turn() -> None:
    with pytest.raises(InvalidRequest, match="continue_final_message with add_generation_prompt"):
        await given(Chat(messages=[USER], add_generation_prompt=True), continue_final=True)
