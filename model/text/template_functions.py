"""What a chat template may call: filters, tests, methods of values and operators, each counted before it runs.

They do what Jinja's and Python's do. What is not named here is not there: a template that wants it is refused.
"""

import datetime
import functools
import json
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import jinja2.filters
import jinja2.tests
from jinja2 import Environment, TemplateError, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace
from markupsafe import escape

from .marks import after_ascii, after_repr, hides_marks
from .template_budget import CALL, MAX_BITS, TooMuch, budget

_FACTOR = 12  # how much longer a character may get that is written as JSON or by repr
_WIDTH = re.compile(r"\d{5,}|\*|\{[^{}]*\{")  # in a format: a width of 10,000 or more, or one that is an argument
_NUMBER, _QUOTED = re.compile(r"\d+"), re.compile(r"%[^%]{0,20}?[ra]|![ra]")

# Filters that look at the items of a list, not into them.
_SHALLOW = ("attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject")
_SHALLOW += ("rejectattr", "reverse", "select", "selectattr")
# Filters that may look at everything in what they are given.
_DEEP = ("abs", "dictsort", "float", "groupby", "int", "max", "min", "sort", "unique")
_OF_TEXT = ("capitalize", "lower", "title", "trim", "truncate", "upper")  # the same, of what they are given as text


def _counted(value: Any) -> Any:
    return budget().count_items(value) if isinstance(value, Iterator) else value


def _weigh_all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return sum(map(budget().weigh, args)) + sum(map(budget().weigh, kwargs.values()))


def _shallow(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, str):
                budget().spend(16 * len(value), len(value))
            elif isinstance(value, list | tuple | dict | range):
                budget().make_items(len(value))
        budget().spend(CALL)
        return _counted(function(*args, **kwargs))

    return call


def _deep(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        length = _weigh_all(args, kwargs)
        factor = 4 if all(isinstance(value, str) for value in args) else 16
        budget().spend(CALL + factor * length, 2 * length)
        return _counted(function(*args, **kwargs))

    return call


def _of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    counted = _deep(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        """The text is the first argument, after an environment."""
        place = 1 if args and isinstance(args[0], Environment) else 0
        return counted(*args[:place], *map(to_text, args[place : place + 1]), *args[place + 1 :], **kwargs)

    return call


def to_text(value: Any) -> str:
    """What a template writes for a value."""
    if isinstance(value, str):
        return str(value)
    budget().make_text(_FACTOR * budget().weigh(value))
    return after_repr(str(value))


def concat(*values: Any) -> str:
    """The operator `~`."""
    parts = list(map(to_text, values))
    budget().make_text(sum(map(len, parts)))
    return "".join(parts)


def _text_of(value: Any) -> str:
    text = to_text(value)
    budget().make_text(len(text))
    return text


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    return _method("replace", _text_of(value), (to_text(old), to_text(new), -1 if count is None else count), {})


def _center(value: Any, width: int = 80) -> str:
    return _method("center", _text_of(value), (width,), {})


@pass_environment
def _join(environment: Environment, value: Any, d: str = "", attribute: Any = None) -> str:
    items = _attributes(environment, value, attribute)
    return _method("join", str(d), (list(map(to_text, items)),), {})


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = _text_of(s)
    step = len(width) if isinstance(width, str) else int(width)
    budget().make_text(len(text) + (text.count("\n") + 2) * max(step, 0))
    return jinja2.filters.do_indent(text, width, first, blank)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("can't handle positional and keyword arguments at the same time")
    return _percent(_text_of(value), kwargs or args)


def _attributes(environment: Environment, values: Any, attribute: Any) -> list[Any]:
    """The values as a list, or of each an attribute."""
    get = (lambda value: value) if attribute is None else jinja2.filters.make_attrgetter(environment, attribute)
    return [get(value) for value in budget().count_items(values)]


@pass_environment
def _sum(environment: Environment, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    items = _attributes(environment, iterable, attribute)
    return functools.reduce(lambda left, right: binary("+", left, right), items, start)


def _round(value: Any, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 100:
        raise TooMuch("a precision of more than 100 digits")
    _check_number(value)
    return jinja2.filters.do_round(value, precision, method)  # pyright: ignore[reportArgumentType]


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: nothing is escaped for HTML."""
    length = budget().weigh(x)
    extra = sum(map(len, separators)) if separators else 2
    step = len(indent) if isinstance(indent, str) else int(indent or 0)
    depth = _depth(x) if step else 0
    budget().make_text(_FACTOR * length + length * (extra + max(step, 0) * depth))
    text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return after_ascii(text) if ensure_ascii else text


def _depth(value: Any) -> int:
    """How deep a value is nested that was weighed."""
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, depth = pending.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict | list | tuple):
            pending += [(part, depth + 1) for part in (item.values() if isinstance(item, dict) else item)]
    return deepest


def _escape(value: Any) -> str:
    text = _text_of(value)
    budget().make_text(5 * len(text))
    return str(escape(text))


_FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _shallow(jinja2.filters.FILTERS[name]) for name in _SHALLOW},
    **{name: _deep(jinja2.filters.FILTERS[name]) for name in _DEEP},
    **{name: _of_text(jinja2.filters.FILTERS[name]) for name in _OF_TEXT},
    "center": _center,
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "safe": _text_of,
    "string": _text_of,
    "sum": _sum,
    "tojson": _tojson,
}


def filters() -> dict[str, Callable[..., Any]]:
    """The filters, by name."""
    return dict(_FILTERS)


def tests() -> dict[str, Callable[..., Any]]:
    """The tests, by name: all of Jinja's."""
    known: dict[str, Callable[..., Any]] = {**jinja2.tests.TESTS}
    cheap = {"boolean", "callable", "defined", "false", "filter", "float", "integer", "iterable", "mapping", "none"}
    cheap |= {"number", "sameas", "sequence", "string", "test", "true", "undefined"}
    return {name: test if name in cheap else _tested(test) for name, test in known.items()}


def _tested(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    def call(*args: Any) -> Any:
        budget().spend(CALL + 4 * _weigh_all(args, {}))
        return test(*args)

    return call


def template_globals() -> dict[str, Any]:
    """What transformers' templates may call by name, beside Jinja's own."""
    return {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }


def _raise_exception(message: Any) -> None:
    raise TemplateError(to_text(message)[:1000])


def _strftime_now(format: str) -> str:
    if len(format) > 1000:
        raise TooMuch("a date format of more than 1000 characters")
    return datetime.datetime.now().strftime(format)


class _TemplateDict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        budget().spend(CALL + _weigh_all(args, kwargs))
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        budget().spend(CALL + _weigh_all(args, {}))
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """Its names never begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        """The signature of Jinja's, so that a name may be `self`."""
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_attribute(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"an attribute {name[:100]!r} of a namespace; allowed: names without a leading underscore")


_STR_METHODS = frozenset({
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace",
    "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith",
    "strip", "swapcase", "title", "upper", "zfill"
})  # fmt: skip
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (dict, frozenset({"get", "items", "keys", "values", "copy"})),
    (list, frozenset({"index", "count", "copy"})),
    (tuple, frozenset({"index", "count"})),
)


def call_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a method of one of Python's own types."""
    owner, name = method.__self__, method.__name__
    for kind, allowed in _METHODS:
        if isinstance(owner, kind) and name in allowed:
            if kind is str:
                return _method(name, str(owner), args, kwargs)
            if kind is dict:
                budget().spend(CALL + (2 * len(owner) if name == "copy" else 0))
            else:
                budget().spend(CALL + _weigh_all((owner, *args), kwargs))
            return method(*args, **kwargs)
    raise SecurityError(f"{type(owner).__name__}.{name} is not for templates")


def _method(name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a method of a text."""
    if name in ("center", "ljust", "rjust", "zfill") and args:
        budget().make_text(max(len(text), int(args[0])))
    elif name == "replace" and len(args) >= 2:
        found = text.count(args[0]) if args[0] else len(text) + 1
        if len(args) > 2 and int(args[2]) >= 0:
            found = min(found, int(args[2]))
        budget().make_text(len(text) + found * max(0, len(args[1]) - len(args[0])))
    elif name == "join" and args:
        items = list(args[0])
        budget().make_text(sum(map(len, items)) + len(text) * len(items))
        args = (items,)
    else:
        budget().spend(CALL + 4 * len(text) + 4 * _weigh_all(args, kwargs), len(text))
    found = getattr(text, name)(*args, **kwargs)
    if isinstance(found, list):
        budget().make_items(4 * len(found))
    return found


def check_format(text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Counts `text.format(...)` and `text % ...`."""
    if _WIDTH.search(text):
        raise TooMuch("a format with a width of 10000 or more, or one that is an argument")
    plain = all(isinstance(value, str | int | float) for value in (*args, *kwargs.values()))
    factor = 1 if plain and not _QUOTED.search(text) else _FACTOR
    fields, widths = text.count("{") + text.count("%"), sum(map(int, _NUMBER.findall(text)))
    budget().make_text(len(text) + widths + fields * factor * _weigh_all(args, kwargs))
    if factor != 1 and any(hides_marks(repr(value)) for value in (*args, *kwargs.values())):
        raise SecurityError("a format by `repr` of a value with control tokens in it")


def _percent(text: str, values: Any) -> str:
    check_format(text, values if isinstance(values, tuple) else (values,), {})
    return text % values


def _check_number(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise TooMuch(f"a number of more than {MAX_BITS} bits")


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
    "%": operator.mod,
}


def binary(sign: str, left: Any, right: Any) -> Any:
    """An operator between two values."""
    if sign == "+" and isinstance(left, str) and isinstance(right, str):
        budget().make_text(len(left) + len(right))
    elif sign == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
        budget().make_items(len(left) + len(right))
    elif sign == "*" and isinstance(left, int) and isinstance(right, str | list | tuple):
        return binary(sign, right, left)
    elif sign == "*" and isinstance(left, str | list | tuple) and isinstance(right, int):
        make = budget().make_text if isinstance(left, str) else budget().make_items
        make(len(left) * max(0, right))
    elif sign == "%" and isinstance(left, str):
        return _percent(left, right)
    elif isinstance(left, int | float) and isinstance(right, int | float):
        budget().spend(CALL)
        _check_number(left)
        _check_number(right)
        if sign == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
            raise TooMuch(f"a number of more than {MAX_BITS} bits")
    elif not hasattr(left, "_undefined_message") and not hasattr(right, "_undefined_message"):
        raise TypeError(f"{sign} between {type(left).__name__} and {type(right).__name__}")
    return _OPERATORS[sign](left, right)
