"""A model's chat template: a conversation becomes one text, in a bounded number of steps.

Templates are Jinja, of the environment that transformers makes for them. They come with the model, but how long they
run depends on the conversation, and Python cannot stop a thread: so every loop and macro of the template counts its
turns here, and a rendering that has too many, or too long a text, ends as refused.

Control tokens that the text of a message spells are wrapped in two private characters, as transformers does for
`sanitize_control_tokens`: what is rendered tells them from those that the template writes itself.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import Template, TemplateError, nodes

from ...proto.errors import InvalidRequest

MAX_STEPS = 200_000  # turns of all loops and macros of one rendering: some tenths of a second
MAX_TEXT = 16 << 20  # characters
_COUNT = "isthmus_count"
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
            self._template, literals = _compiled(source)
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template is not valid: {error}") from None
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
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                **self._special,
                messages=messages,
                tools=[],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{_COUNT: _counter()},
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_TEXT:
                    raise _TooMuch(f"more than {MAX_TEXT} characters come of it")
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses the conversation: {error}") from None
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InvalidRequest(f"the model's chat template fails on the conversation: {reason}") from None
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


class _TooMuch(TemplateError):
    """A rendering that goes over a bound."""


def _counter() -> Callable[[], str]:
    steps = 0

    def count() -> str:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise _TooMuch(f"it takes more than {MAX_STEPS} steps")
        return ""

    return count


def _compiled(source: str) -> tuple[Template, str]:
    """The template with a count in each loop and macro, and the strings that are written in it, NULs between them."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(source).environment
    tree = environment.parse(source)
    literals = {node.data for node in tree.find_all(nodes.TemplateData)}
    literals |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        call = nodes.Call(nodes.Name(_COUNT, "load"), [], [], None, None)
        block.body.insert(0, nodes.ExprStmt(call, lineno=block.lineno))
    tree.set_environment(environment)
    code = environment.compile(tree)
    template = environment.template_class.from_code(environment, code, environment.make_globals(None))
    return template, "\0".join(literals)
