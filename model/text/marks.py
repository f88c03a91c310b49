"""The two private characters around a control token that is text, and what JSON and `repr` write for them.

A template that writes a tool by `repr`, or as ASCII, would leave the token without its marks: so they are put back.
"""

import json
import re

START, END = "\U000f0000", "\U000f0001"
_AS_ASCII = {json.dumps(mark)[1:-1]: mark for mark in (START, END)}
_ESCAPED = re.compile(r"\\(?:U000f000[01]|.)", re.DOTALL)  # any escape, so that none is taken from its middle
_BY_REPR = {repr(mark)[1:-1]: mark for mark in (START, END)}


def hides_marks(text: str) -> bool:
    """Whether a text may be one that `repr` wrote of marks."""
    return any(escaped in text for escaped in _BY_REPR)


def after_repr(text: str) -> str:
    """A text that `repr` wrote, its marks put back."""
    return _ESCAPED.sub(lambda found: _BY_REPR.get(found[0], found[0]), text) if hides_marks(text) else text


def after_ascii(text: str) -> str:
    """JSON in ASCII, its marks put back: a backslash of a text is written as two, so none of these begins inside it."""
    for escaped, mark in _AS_ASCII.items():
        text = re.sub(rf"(?<!\\)((?:\\\\)*){re.escape(escaped)}", rf"\1{mark}", text) if escaped in text else text
    return text
