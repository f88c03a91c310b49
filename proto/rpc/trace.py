"""The W3C trace context that a caller sends, as a server passes it on."""

from collections.abc import Iterable
from typing import Any

import grpc.aio

TraceContext = tuple[tuple[str, str], ...]  # metadata of a call

_KEYS = ("traceparent", "tracestate")
_MAX_VALUE = 512  # bytes


def trace_context(context: grpc.aio.ServicerContext) -> TraceContext:
    """The caller's trace context, as metadata for the next hop: the first value of each key that may be one.

    A server takes any bytes as a value, but a client that sends them on fails, with a status that reads as if the
    other side were broken.
    """
    return trace_of(context.invocation_metadata() or ())


def trace_of(metadata: Iterable[tuple[str, Any]]) -> TraceContext:
    """The same from metadata, or from headers of HTTP, whose names are in lower case."""
    found: dict[str, str] = {}
    for key, value in metadata:
        if key in _KEYS and isinstance(value, str) and _is_valid(value):
            found.setdefault(key, value)
    return tuple(found.items())


def _is_valid(value: str) -> bool:
    return 1 <= len(value) <= _MAX_VALUE and value.isascii() and value.isprintable()
