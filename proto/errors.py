"""The error tree, and the one table from it to gRPC status codes.

    IsthmusError
    ├── InvalidRequest      what was asked can never work: the caller must change it
    ├── NotFound            no such model, codec or worker
    ├── AlreadyExists       the name is taken by something else
    ├── IllegalState        the thing exists, but its state does not allow this
    ├── OutOfRange          a position past the end
    ├── Incompatible        two sides differ in protocol, model or codec parameters
    ├── Exhausted           no room now: try again later
    ├── Unavailable         the other side is not there, or is going away
    │   ├── EngineFailed    an engine died, or hung, in a step that computed this very request
    │   └── Lost            the connection broke, or fell silent, and nobody said why
    ├── Blamed              engines died while they computed this request and no other: it is not tried again
    ├── Corrupt             received bytes are not what they claim to be: refused, never used
    └── Expired             the deadline passed before the work was done

The text of an error is for the person who reads it: one line, what was wrong and what is allowed. Anything that is
not an IsthmusError is a bug, stays UNKNOWN for the client and is logged with its trace (`rpc/server.py`).
"""

import re
from collections.abc import Iterable
from typing import Any

import grpc

ERROR_KEY = "isthmus-error"  # trailing metadata of every status that one of ours has made: the class of the error
ENGINE_FAILED_KEY = "isthmus-engine-failed"  # the number of requests in the failed step, and the worker's address


class IsthmusError(Exception):
    """The root of all errors that are meant for a caller."""

    retry_after_s: float | None = None  # where the same request may succeed, after so long
    private: str = ""  # what the server's log shall say besides, and no client hear: paths, addresses of databases

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Trailing metadata of its status; there is at least what shows that a server of ours made it."""
        return ((ERROR_KEY, type(self).__name__),)


class InvalidRequest(IsthmusError):
    """The request can never succeed as it is."""


class NotFound(IsthmusError):
    """Something the request names does not exist here."""


class AlreadyExists(IsthmusError):
    """The name that the request gives is taken by something else."""


class IllegalState(IsthmusError):
    """What the request names is in a state that does not allow it."""


class OutOfRange(IsthmusError):
    """The request names a position past the end."""


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

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (*super().metadata(), (ENGINE_FAILED_KEY, f"{self.participants} {self.at}".strip()))


class Lost(Unavailable):
    """The other side is gone and has not said why: its process may have died of this very request."""


class Blamed(IsthmusError):
    """Engines died of this request."""


class Corrupt(IsthmusError):
    """Received pages do not match what was asked for, or were damaged on the way."""


class Expired(IsthmusError):
    """The time allowed is over."""


STATUS_OF: dict[type[IsthmusError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    IllegalState: grpc.StatusCode.FAILED_PRECONDITION,
    OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    Incompatible: grpc.StatusCode.FAILED_PRECONDITION,  # after IllegalState: what a worker's status is read as
    Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Blamed: grpc.StatusCode.INTERNAL,
    Corrupt: grpc.StatusCode.DATA_LOSS,
    Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def status_of(error: IsthmusError) -> grpc.StatusCode:
    """The gRPC code of an error: that of the nearest class in the table."""
    return next((STATUS_OF[cls] for cls in type(error).__mro__ if cls in STATUS_OF), grpc.StatusCode.UNKNOWN)


def shown(text: str, longest: int = 100) -> str:
    """A caller's own text as it may stand in an error: in quotes, with escapes, and cut where it is long."""
    return repr(text) if len(text) <= longest else f"{text[:longest]!r}... ({len(text)} characters)"


def without_paths(text: str) -> str:
    """A text of the system (an OSError's, say) as clients may see it: with no paths of this host's disk."""
    return _PATH.sub("(a path)", text)


_PATH = re.compile(r"(?<![\w.:/-])(?:/[^\s/'\":,;()]+){2,}/?")


def why_lost(text: str, trailing: Iterable[tuple[str, Any]] | None) -> Unavailable:
    """The error for a call that ended as UNAVAILABLE, by the metadata that came with its status."""
    told = {key: str(value) for key, value in trailing or ()}
    if ENGINE_FAILED_KEY in told:
        participants, _, at = told[ENGINE_FAILED_KEY].partition(" ")
        return EngineFailed(text, int(participants) if participants.isdecimal() else 1, at)
    return Unavailable(text) if told.get(ERROR_KEY, Lost.__name__) != Lost.__name__ else Lost(text)
