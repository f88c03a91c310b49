"""A model's chat template: a conversation becomes one text, in a bounded number of steps.

Templates are Jinja, in a sandbox like the one that transformers makes for them. They come with the model, and how long
they run depends on the conversation too. Python cannot stop a thread: so each loop, macro, call and operator of a
template counts what it takes (`template_environment.py`), and a rendering that takes too much ends as refused.

Control tokens that any text of a conversation spells (messages, tools, variables) are wrapped in two private
characters, as transformers does for `sanitize_control_tokens`: what is rendered tells them from those that the template
writes itself.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateError, nodes

from ...proto.errors import InvalidRequest
from .conversation import Conversation, check_variables
from .marks import END, START
from .template_budget import MAX_TEXT, Budget, TooMuch, spending
from .template_environment import BoundedEnvironment
from .template_traits import TemplateTraits

MAX_STEPS = 200_000  # turns of all loops and macros of one rendering: some tenths of a second
_SHOWN = 300  # characters of a reason that a template gives
_FINAL = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where the last message ends
_CALLED = Conversation(
    messages=[
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "012345678", "type": "function", "function": {"name": "x", "arguments": {"x": "x"}}}],
        },
    ]
)


class ChatTemplate:
    """One template with the control tokens of its tokenizer. Any thread may use it."""

    def __init__(self, source: str, special: dict[str, Any], added: Iterable[tuple[str, bool]]) -> None:
        """`special`: what the template may name, such as `bos_token`. `added`: each token that the tokenizer finds in
        a text before it does anything else, and whether it is a special one. InvalidRequest for no valid template.
        """
        self._special = special
        environment = BoundedEnvironment()
        try:
            self._template, tree = environment.load(source)
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template is not valid: {error}") from None
        self.traits = TemplateTraits.of(tree)
        self._taken = frozenset(special) | frozenset(environment.globals)
        literals = _literals(tree)
        control = [token for token, is_special in added if is_special or (token in literals and not token.isspace())]
        self.control_tokens = tuple(sorted(control, key=len, reverse=True))  # one that contains another comes first

    def render(self, conversation: Conversation, *, parse_special: bool = False) -> str:
        """The conversation as text.

        Control tokens in what it says are wrapped in START and END, unless `parse_special`. InvalidRequest where the
        template has no place for what it says, refuses it, fails, or takes too many steps or more than MAX_TEXT
        characters.
        """
        conversation.check(self.traits)
        check_variables(conversation.variables, self._taken)
        as_text = conversation.has_calls and self._arguments_as_text
        messages = conversation.for_template(self.traits, arguments_as_text=as_text)
        given = [messages, list(conversation.tools), dict(conversation.variables)]
        messages, tools, variables = given if parse_special else self._marked(given)
        final = messages[-1]["content"]
        if conversation.continue_final:
            messages[-1] = {**messages[-1], "content": final + _FINAL}
        prompted = conversation.add_generation_prompt and not conversation.continue_final
        text = self._run({
            **self._special,
            "documents": None,
            **variables,
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": prompted,
        })  # fmt: skip
        return self._cut(text, final) if conversation.continue_final else text

    @functools.cached_property
    def _arguments_as_text(self) -> bool:
        """Whether the template takes the arguments of calls as JSON text alone, as some do; others want an object."""
        for as_text in (False, True):
            messages = _CALLED.for_template(self.traits, arguments_as_text=as_text)
            try:
                self._run({**self._special, "messages": messages, "tools": None, "add_generation_prompt": False})
            except InvalidRequest:
                continue
            return as_text
        return False

    def _run(self, variables: dict[str, Any]) -> str:
        try:
            with spending(Budget(MAX_STEPS)):
                return self._rendered(variables)
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

    def _rendered(self, variables: dict[str, Any]) -> str:
        pieces, length = [], 0
        for piece in self._template.generate(variables):
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

    def _marked(self, given: Any) -> Any:
        everything = "\0".join(_texts(given))
        found = [token for token in self.control_tokens if token in everything]
        if not found and START not in everything and END not in everything:
            return given
        return _with_marks(given, re.compile("|".join([*map(re.escape, found), START, END])))


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, keys too: a template may write them."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, list):
            pending += item


def _with_marks(value: Any, pattern: re.Pattern[str]) -> Any:
    """The same with control tokens marked; as deep as the JSON that clients may send."""
    if isinstance(value, str):
        return pattern.sub(_mark, value)
    if isinstance(value, dict):
        return {pattern.sub(_mark, key): _with_marks(item, pattern) for key, item in value.items()}
    return [_with_marks(item, pattern) for item in value] if isinstance(value, list) else value


def _mark(found: re.Match[str]) -> str:
    """A control token as text. What a message has of our own marks would forge it, and goes."""
    return "" if found[0] in (START, END) else f"{START}{found[0]}{END}"


def _literals(tree: nodes.Template) -> str:
    """The strings that are written in a template, NULs between them."""
    literals = {node.data for node in tree.find_all(nodes.TemplateData)}
    literals |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(literals)
