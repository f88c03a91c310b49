"""Structured logs on stderr, as JSON or as text: silent below WARNING unless asked, but for the audit log."""

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ...proto.errors import InvalidRequest
from .audit import AuditFile
from .audit import log as audit_log
from .redaction import Redaction

LEVELS = ("debug", "info", "warning", "error")
LogFormat = Literal["json", "text"]


class JsonFormatter(logging.Formatter):
    """A record as one JSON object; a caller's `extra={"fields": {...}}` becomes keys of its own."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in getattr(record, "fields", {}).items() if name not in line}
        if trace := _trace(self, record):
            line["trace"] = trace
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """A record as one line for people: time, level, message, then fields as name=value; a trace in lines below."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_shown(value)}" for name, value in getattr(record, "fields", {}).items())
        message = record.getMessage().replace("\n", "\\n")
        line = f"{_time(record)} {record.levelname:7} {record.name} {message} {fields}".rstrip()
        return f"{line}\n{trace}" if (trace := _trace(self, record)) else line


FORMATTERS: dict[LogFormat, type[logging.Formatter]] = {"json": JsonFormatter, "text": TextFormatter}


def configure_logs(level: str, form: LogFormat = "json", audit_file: str | None = None) -> None:
    """Sends the logs of this package from `level` (one of LEVELS) on to stderr, and all of the audit log there and to
    the end of `audit_file`. InvalidRequest where that cannot be written."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[form]())
    handler.addFilter(Redaction())
    logger = logging.getLogger("isthmus")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
    for old in audit_log.handlers:
        old.close()
    audit_log.handlers[:] = [_audit_handler(audit_file)] if audit_file else []
    audit_log.setLevel(logging.INFO)


def take_over() -> None:
    """Has what libraries log from warnings on, Python's warnings and exceptions of threads go where our logs go. For a
    process that does nothing else."""
    root, handlers = logging.getLogger(), logging.getLogger("isthmus").handlers
    root.handlers[:] = handlers
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_of_this_side)
    logging.captureWarnings(True)
    threading.excepthook = _log_exception


def _is_of_this_side(record: logging.LogRecord) -> bool:
    """Not what gRPC says, as errors with a trace, of bytes that a peer has sent, and of answers to peers that are gone:
    anybody who reaches a port could fill the log with it."""
    return not record.getMessage().startswith(("Invalid encoding on ", "ExecuteBatchError raised in core "))


def _log_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread is not None else "a thread"
        trace = (args.exc_type, args.exc_value, args.exc_traceback)
        logging.getLogger("isthmus").error("%s has raised", name, exc_info=trace)


def _audit_handler(file: str) -> logging.Handler:
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handler = AuditFile(file, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"audit_file {file} cannot be written: {error.strerror}") from None
    handler.setFormatter(JsonFormatter())
    handler.addFilter(Redaction())
    return handler


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return record.exc_text or (formatter.formatException(record.exc_info) if record.exc_info else "")


def _shown(value: Any) -> str:
    """A value as it stands in a line: in quotes where it would not be one word."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)
