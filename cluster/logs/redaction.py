"""No credentials in logs: whatever a line says, keys, tokens and authorization metadata are taken out of it.

Nothing here logs any. This is for what nobody has thought of: an exception of a library with metadata in its text.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

INSTEAD = "[redacted]"
_PATTERNS = (
    # The value of an authorization header, however it is written: a header, a pair of Python, JSON.
    re.compile(
        r"""(?i)((?:proxy-)?authorization["']?\s*[:=,]\s*(?:value=)?(?:b?["'])?)(?:(?:bearer|basic)\s+)?[^\s"',;)}\]]+"""
    ),
    re.compile(r"""(?i)(\bbearer\s+)[^\s"',;)}\]]{8,}"""),
    re.compile(r"(isthmus_[0-9a-f]{1,16}_)[A-Za-z0-9_-]+"),
    re.compile(r"()\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*\.?[A-Za-z0-9_-]*"),  # a JSON Web Token
)


def redacted(text: str) -> str:
    """The text without what may be credentials."""
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{INSTEAD}", text)
    return text


class Redaction(logging.Filter):
    """A filter of handlers: message, fields and trace of each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record through. One that cannot be made into text becomes a line that says so: whoever logs must
        not fail of it, and it must not go on as it is."""
        try:
            self._redact(record)
        except Exception as error:
            record.msg, record.args = f"a line of {record.name} cannot be written: {type(error).__name__}", None
            record.fields, record.exc_info, record.exc_text, record.stack_info = {}, None, None, None
        return True

    def _redact(self, record: logging.LogRecord) -> None:
        record.msg, record.args = redacted(record.getMessage()), None
        if (fields := getattr(record, "fields", None)) is not None:
            record.fields = _redacted(fields)
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redacted(record.exc_text)
        if record.stack_info:
            record.stack_info = redacted(record.stack_info)


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: INSTEAD if _is_secret(key) else _redacted(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redacted(str(value))


def _is_secret(key: Any) -> bool:
    return str(key).lower() in ("authorization", "proxy-authorization", "api_key")
