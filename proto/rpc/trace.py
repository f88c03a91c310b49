"""The W3C trace context that a caller sends, as a server passes it on."""

import grpc.aio

TraceContext = tuple[tuple[str, str], ...]  # metadata of a call

_KEYS = ("traceparent", "tracestate")
_MAX_VALUE = 512  # bytes


def trace_context(context: grpc.aio.ServicerContext) -> TraceContext:
    """The caller's trace context, as metadata for the next hop: the first value of each key that may be one.

    A server takes any bytes as a value, but a client that sends them on fails, with a status that reads as if the
    other side were broken.
    """
    found: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if key in _KEYS and isinstance(value, str) and _is_valid(value):
            found.setdefault(key, value)
    return tuple(found.items())


def _is_valid(value: str) -> bool:
    return 1 <= len(value) <= _MAX_VALUE and value.isascii() and value.isprintable()
