"""What must be known later: who ordered what of the cluster, and who was not let in. One line each, by a logger of its
own (isthmus.audit)."""

import io
import logging
import os
from logging.handlers import WatchedFileHandler
from typing import Any

log = logging.getLogger("isthmus.audit")


def audit(event: str, *, who: str, what: str, **more: Any) -> None:
    """A line of the audit log: `event` is its kind. Fields that are empty are left out."""
    fields = {"event": event, "who": who, "what": what, **{name: value for name, value in more.items() if value != ""}}
    log.info("%s", event, extra={"fields": fields})


class AuditFile(WatchedFileHandler):
    """Appends to a file that only its owner reads and writes (0600); opens it anew where it was moved away."""

    def _open(self) -> io.TextIOWrapper:
        handle = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(handle, 0o600)
        return open(handle, "a", encoding="utf-8")
