"""Which response template a model's answers are read by: its own, or one that reads what its chat template writes.

A chat template shows how the model was trained to call tools: a call is rendered, and the response template that gives
the same call back is the right one.
"""

import json
from collections.abc import Iterable, Mapping

from ....proto.errors import InvalidRequest
from ..chat_template import ChatTemplate
from ..conversation import Conversation
from ..tokenizer import Tokenizer
from .call_syntax import SYNTAXES
from .form import AnswerForm
from .forms import CHATML, FORMS, thinking
from .reader import AnswerReader, Part

_NAME, _ARGUMENTS = "probe_tool", {"probe": "some text"}
_USER = {"role": "user", "content": "probe question"}
_CALL = {"id": "probecall", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string"}}},
    },
}
_CALLED = [Part("call", _NAME), Part("arguments", json.dumps(_ARGUMENTS))]


def answer_form(tokenizer: Tokenizer) -> AnswerForm | None:
    """How a model's answers to chats are read; None: they are content. Takes a while.

    InvalidRequest where the model comes with a response template that is not valid.
    """
    try:
        plain, with_tools = (tokenizer.chat_template(tools)[0] for tools in (False, True))
    except InvalidRequest:  # it answers no chats
        return None
    special = tokenizer.special_tokens
    if tokenizer.response_template is not None:
        return _with_syntax(AnswerForm(tokenizer.response_template, special))
    if with_tools.traits.tools and (rendered := _rendered_call(with_tools)):
        for spec in FORMS:
            form = AnswerForm(spec, special)
            turn = form.prefix(rendered)
            if turn is not None and _read(form, turn.removesuffix(tokenizer.end))[: len(_CALLED)] == _CALLED:
                return _with_syntax(form)
    anchor = _thinking_anchor(plain) if plain.traits.thinks else ""
    return AnswerForm(thinking(anchor), special) if anchor else None


def _with_syntax(form: AnswerForm) -> AnswerForm:
    """Notes the first syntax whose calls the form reads."""
    arguments = json.dumps(_ARGUMENTS)
    for syntax in SYNTAXES:
        if _read(form, syntax.one(_NAME, arguments)) == _CALLED:
            form.syntax = syntax
            break
    return form


def _read(form: AnswerForm, text: str) -> list[Part]:
    """What a form makes of a text; neighbouring parts of a kind are one."""
    if not form.tools:
        return []
    reader = AnswerReader(form, prefix="", calls=True, tools=[_TOOL])
    return merged([*reader.push(text), *reader.finish()])


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same with neighbours of a kind as one; each call stays one of its own."""
    made: list[Part] = []
    for part in parts:
        if made and made[-1].kind == part.kind != "call":
            made[-1] = Part(part.kind, made[-1].text + part.text)
        else:
            made.append(part)
    return made


def _rendered_call(template: ChatTemplate) -> str:
    """A conversation that ends with a call; empty where the template refuses it."""
    called = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    return _rendered(template, Conversation(messages=[_USER, called], tools=[_TOOL], add_generation_prompt=False))


def _thinking_anchor(template: ChatTemplate) -> str:
    """What the template begins an assistant's turn with."""
    text = _rendered(template, Conversation(messages=[_USER]))
    _, _, turn = text.rpartition(_USER["content"])
    return turn.partition("<think>")[0]


def _rendered(template: ChatTemplate, conversation: Conversation) -> str:
    try:
        return template.render(conversation)
    except InvalidRequest:
        return ""


def plain_form(special: Mapping[str, int]) -> AnswerForm:
    """Reads the syntax that any tokenizer can spell."""
    return _with_syntax(AnswerForm(CHATML, special))
