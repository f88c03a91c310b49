"""A model's chat template: a conversation becomes one text, in a bounded number of steps.

Templates are Jinja, in a sandbox like the one that transformers makes for them. They come with the model, and how long
they run depends on the conversation too. Python cannot stop a thread: so each loop, macro, call and operator of a
template counts what it takes (`template_environment.py`), and a rendering that takes too much ends as refused.

Control tokens that the text of a message spells are wrapped in two private characters, as transformers does for
`sanitize_control_tokens`: what is rendered tells them from those that the template writes itself.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateError, nodes

from ...proto.errors import InvalidRequest
from .template_budget import MAX_TEXT, Budget, TooMuch, spending
from .template_environment import BoundedEnvironment

MAX_STEPS = 200_000  # turns of all loops and macros of one rendering: some tenths of a second
_SHOWN = 300  # characters of a reason that a template gives
_FINAL = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where the last message ends
START, END = "\U000f0000", "\U000f0001"  # around a control token that is text

Messages = Sequence[dict[str, str]]


class ChatTemplate:
    """One template with the control tokens of its tokenizer. Any thread may use it."""

    def __init__(self, source: str, special: dict[str, Any], added: Iterable[tuple[str, bool]]) -> None:
        """`special`: what the template may name, such as `bos_token`. `added`: each token that the tokenizer finds in
        a text before it does anything else, and whether it is a special one. InvalidRequest for no valid template.
        """
        self._special = special
        try:
            self._template, tree = BoundedEnvironment().load(source)
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template is not valid: {error}") from None
        literals = _literals(tree)
        control = [token for token, is_special in added if is_special or (token in literals and not token.isspace())]
        self.control_tokens = tuple(sorted(control, key=len, reverse=True))  # one that contains another comes first

    def render(self, messages: Messages, *, continue_final: bool = False, parse_special: bool = False) -> str:
        """The conversation as text: up to where the assistant's next message begins, or with `continue_final` to where
        the last message ends.

        Control tokens in messages are wrapped in START and END, unless `parse_special`. InvalidRequest where the
        template refuses the conversation, fails, or takes too many steps or more than MAX_TEXT characters.
        """
        messages = [dict(message) for message in messages] if parse_special else self._marked(messages)
        final = messages[-1]["content"]
        if continue_final:
            messages[-1]["content"] += _FINAL
        text = self._run(messages, not continue_final)
        return self._cut(text, final) if continue_final else text

    def _run(self, messages: Messages, add_generation_prompt: bool) -> str:
        try:
            with spending(Budget(MAX_STEPS)):
                return self._rendered(messages, add_generation_prompt)
        except TemplateError as error:
            reason = str(error)[:_SHOWN]
            raise InvalidRequest(f"the model's chat template refuses the conversation: {reason}") from None
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:_SHOWN]
            raise InvalidRequest(f"the model's chat template fails on the conversation: {reason}") from None

    def _rendered(self, messages: Messages, add_generation_prompt: bool) -> str:
        pieces, length = [], 0
        for piece in self._template.generate(
            **self._special,
            messages=messages,
            tools=[],
            documents=None,
            add_generation_prompt=add_generation_prompt,
        ):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise TooMuch(f"more than {MAX_TEXT} characters come of it")
        return "".join(pieces)

    def _cut(self, text: str, final: str) -> str:
        """The text up to the end of the last message, whose end the template may have trimmed."""
        mark = text.rfind(_FINAL.strip())
        if mark < 0 or final.strip() not in text:
            raise InvalidRequest("continue_final_message: the model's chat template leaves the last message out")
        return text[:mark] if text.startswith(_FINAL, mark) else text[:mark].rstrip()

    def _marked(self, messages: Messages) -> list[dict[str, str]]:
        everything = "\0".join(message["content"] for message in messages)
        found = [token for token in self.control_tokens if token in everything]
        if not found and START not in everything and END not in everything:
            return [dict(message) for message in messages]
        pattern = re.compile("|".join([*map(re.escape, found), START, END]))
        return [{**message, "content": pattern.sub(_mark, message["content"])} for message in messages]


def _mark(found: re.Match[str]) -> str:
    """A control token as text. What a message has of our own marks would forge it, and goes."""
    return "" if found[0] in (START, END) else f"{START}{found[0]}{END}"


def _literals(tree: nodes.Template) -> str:
    """The strings that are written in a template, NULs between them."""
    literals = {node.data for node in tree.find_all(nodes.TemplateData)}
    literals |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(literals)
