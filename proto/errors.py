"""The error tree.

    IsthmusError
    ├── InvalidRequest      what was asked can never work: the caller must change it
    ├── PermissionDenied    whoever calls may not do that, whatever the request says
    ├── NotFound            no such model, codec or worker
    ├── AlreadyExists       the name is taken by something else
    ├── IllegalState        the thing exists, but its state does not allow this
    ├── OutOfRange          a position past the end
    ├── Unauthenticated     nobody knows who asks: no credentials, or such as are not valid
    ├── PermissionDenied    who asks is known, and may not do this
    ├── Incompatible        two sides differ in protocol, model or codec parameters
    ├── Exhausted           no room now: try again later
    ├── Unavailable         the other side is not there, or is going away
    │   ├── EngineFailed    an engine died, or hung, in a step that computed this very request
    │   └── Lost            the connection broke, or fell silent, and nobody said why
    ├── Blamed              engines died while they computed this request and no other: it is not tried again
    ├── Corrupt             received bytes are not what they claim to be: refused, never used
    └── Expired             the deadline passed before the work was done

The text of an error is for the person who reads it: one line, what was wrong and what is allowed. Anything that is
not an IsthmusError is a bug. `rpc/statuses.py` turns errors into gRPC statuses, and statuses into errors.
"""

import re


class IsthmusError(Exception):
    """The root of all errors that are meant for a caller."""

    retry_after_s: float | None = None  # where the same request may succeed, after so long
    private: str = ""  # what the server's log shall say besides, and no client hear: paths, addresses of databases


class InvalidRequest(IsthmusError):
    """The request can never succeed as it is."""


class PermissionDenied(IsthmusError):
    """Whoever calls may not do that."""


class NotFound(IsthmusError):
    """Something the request names does not exist here."""


class AlreadyExists(IsthmusError):
    """The name that the request gives is taken by something else."""


class IllegalState(IsthmusError):
    """What the request names is in a state that does not allow it."""


class OutOfRange(IsthmusError):
    """The request names a position past the end."""


class Unauthenticated(IsthmusError):
    """Who asks has shown no valid credentials."""


class Incompatible(IsthmusError):
    """Two sides of a transfer must not be paired."""


class Exhausted(IsthmusError):
    """There is no room for the request now."""


class Unavailable(IsthmusError):
    """The one who should answer cannot."""


class EngineFailed(Unavailable):
    """An engine failed in a step in which it computed this request.

    `participants` requests were in that step; `at` is the address of the worker where the one who tells it is another.
    """

    def __init__(self, text: str, participants: int, at: str = "") -> None:
        super().__init__(text)
        self.participants, self.at = participants, at


class Lost(Unavailable):
    """The other side is gone and has not said why: its process may have died of this very request."""


class Blamed(IsthmusError):
    """Engines died of this request."""


class Corrupt(IsthmusError):
    """Received pages do not match what was asked for, or were damaged on the way."""


class Expired(IsthmusError):
    """The time allowed is over."""


def shown(text: str, longest: int = 100) -> str:
    """A caller's own text as it may stand in an error: in quotes, with escapes, and cut where it is long."""
    return repr(text) if len(text) <= longest else f"{text[:longest]!r}... ({len(text)} characters)"


def without_paths(text: str) -> str:
    """A text of the system (an OSError's, say) as clients may see it: with no paths of this host's disk."""
    return _PATH.sub("(a path)", text)


_PATH = re.compile(r"(?<![\w.:/-])(?:/[^\s/'\":,;()]+){2,}/?")
