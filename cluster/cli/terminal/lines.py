"""Lines on stderr for the person who started a command. Where the settings ask for `log_format: json` they are lines of
that log: whatever reads it need not know two kinds."""

import logging
import sys

log = logging.getLogger("isthmus")
_in_log = False


def say(line: str, level: int = logging.INFO) -> None:
    """Prints a line."""
    if _in_log:
        log.handle(log.makeRecord(log.name, level, "", 0, line, (), None))  # whatever the log's own level is
    else:
        print(line, file=sys.stderr, flush=True)


def in_log(asked: bool) -> None:
    """From now on lines are those of the log, or not."""
    global _in_log
    _in_log = asked


def is_in_log() -> bool:
    """Whether lines are those of the log."""
    return _in_log
