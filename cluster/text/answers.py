"""How one model's answers to chats are read, and how it writes calls of tools."""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ...model.text.conversation import NO_TOOLS
from ...proto.common_pb2 import Grammar
from ...proto.errors import InvalidRequest
from ...proto.generation_pb2 import Chat, Tool
from .answer_parser import AnswerParser, ToolChoice
from .tool_grammar import tool_grammar
from .tools import for_template

if TYPE_CHECKING:
    from ...model.text.answers.form import AnswerForm
    from ...model.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
_LOOKED_AT = (64, 512, 4096)  # last tokens of a prompt in which the assistant's turn begins


class Answers:
    """Parsers and grammars for one model. One that has no response template writes calls only where it must, in the
    syntax that most models know."""

    def __init__(self, tokenizer: "Tokenizer | None" = None) -> None:
        self._tokenizer = tokenizer
        self._form = _form_of(tokenizer) if tokenizer else None
        if tokenizer and tokenizer.has_tools:
            _ = self._for_grammars  # imports what no request should wait for

    def parser(self, chat: Chat, choice: ToolChoice, prompt_token_ids: Sequence[int]) -> AnswerParser:
        """For one answer to a chat that was checked."""
        calls = bool(chat.tools) and choice.mode != "none"
        forced = calls and choice.mode == "required"
        form = self._for_grammars if forced else self._form
        if form is None:
            return AnswerParser()
        from ...model.text.answers.reader import AnswerReader

        # What must be a call is one, wherever the template left off.
        prefix = "" if forced else self._prefix(form, prompt_token_ids)
        tools = for_template(chat.tools) if calls and form.wants_schemas else []
        reader = AnswerReader(form, prefix=prefix, calls=calls, tools=tools)
        if self._tokenizer is None or not form.markers:
            return AnswerParser(reader)
        from ...model.text.answers.markers import MarkedOutput

        return AnswerParser(reader, MarkedOutput(self._tokenizer, form.markers))

    def grammar(self, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool) -> Grammar | None:
        """What an answer must be where a call is required, else None; InvalidRequest for tools or a choice that are
        not valid."""
        if choice.mode == "required" and self._tokenizer and not self._tokenizer.has_tools:
            raise InvalidRequest(NO_TOOLS)
        return tool_grammar(tools, choice, lambda: self._for_grammars, parallel=parallel)

    def _prefix(self, form: "AnswerForm", token_ids: Sequence[int]) -> str:
        """What the prompt has of the assistant's turn."""
        for most in _LOOKED_AT:
            if self._tokenizer is None:
                break
            found = form.prefix(self._tokenizer.end_of(token_ids, most))
            if found is not None or len(token_ids) <= most:
                return found or ""
        return ""

    @cached_property
    def _for_grammars(self) -> "AnswerForm":
        """Reads calls in a syntax that a grammar can have."""
        if self._form is not None and self._form.syntax is not None:
            return self._form
        from ...model.text.answers.recognition import plain_form

        return plain_form(self._tokenizer.special_tokens if self._tokenizer else {})


def _form_of(tokenizer: "Tokenizer") -> "AnswerForm | None":
    """Imports transformers where there may be one."""
    if tokenizer.response_template is None and not tokenizer.may_tell_apart:
        return None
    from ...model.text.answers.recognition import answer_form

    try:
        return answer_form(tokenizer)
    except InvalidRequest as error:
        log.warning("answers are not told apart: %s", error)
        return None
