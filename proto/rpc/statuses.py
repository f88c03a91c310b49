"""Errors as gRPC statuses, and statuses as errors: the one table, read in both directions.

Trailing metadata tells what code and details cannot:

    isthmus-error           class of the IsthmusError; where it is missing, gRPC made the status and no server of ours
    isthmus-engine-failed   of an EngineFailed: its participants, then the worker's address where that is another one
    isthmus-bug             incident under which the server's log has the trace of an unexpected exception
    retry-after-ms          when the same request may succeed
"""

import logging
import secrets
from typing import NamedTuple

import grpc
import grpc.aio

from ..errors import (
    AlreadyExists,
    Blamed,
    Corrupt,
    EngineFailed,
    Exhausted,
    Expired,
    IllegalState,
    Incompatible,
    InvalidRequest,
    IsthmusError,
    Lost,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)

log = logging.getLogger(__name__)

ERROR_KEY = "isthmus-error"
ENGINE_FAILED_KEY = "isthmus-engine-failed"
BUG_KEY = "isthmus-bug"
RETRY_KEY = "retry-after-ms"

_LEAST_RETRY_S = 0.1
_MAX_DETAILS = 2000  # bytes as encoded; details travel as a header, and gRPC refuses 8 KiB of them at random

_CODE_OF: dict[type[IsthmusError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    IllegalState: grpc.StatusCode.FAILED_PRECONDITION,
    OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Incompatible: grpc.StatusCode.FAILED_PRECONDITION,  # after IllegalState: what the code is read as
    Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Blamed: grpc.StatusCode.INTERNAL,
    Corrupt: grpc.StatusCode.DATA_LOSS,
    Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_ERROR_OF = {code: error for error, code in _CODE_OF.items()}

# What gRPC itself says, which has no other mark than its words.
_INVALID_METADATA = "Invalid metadata"  # beside INTERNAL: it refused to send the call
# Beside UNAVAILABLE; of a name that cannot be resolved gRPC's versions speak differently.
_NO_CONNECTION = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")
# Of a connection that was not made, in the words of gRPC and BoringSSL; the first one that is there counts.
_TLS_PROBLEMS = {
    "CERTIFICATE_HAS_EXPIRED": "its certificate has expired",
    "certificate has expired": "its certificate has expired",
    "Hostname Verification": "its certificate is for somebody else: another host, role or cluster",
    "CERTIFICATE_VERIFY_FAILED": "none of the CAs that are trusted here has signed its certificate",
    "WRONG_VERSION_NUMBER": "it talks in plain text (ISTHMUS_TLS=off)",
    "CERTIFICATE_REQUIRED": "it asks for a certificate: name one with --cert and --key",
    "Tls handshake failed": "no encrypted connection could be made",
    "TSI_PROTOCOL_FAILURE": "no encrypted connection could be made",
    "Socket closed": "it ends the connection: it does not accept the certificate, or only one side talks TLS",
}


class Status(NamedTuple):
    """How a call ends, in the order of `ServicerContext.abort`."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str], ...]


class PeerBug(Exception):
    """The server that was called has a bug, or answered with a code that no server of ours uses.

    It is no IsthmusError: for whoever called the caller it is a bug too.
    """


def code_of(error: IsthmusError) -> grpc.StatusCode:
    """The code of an error: that of the nearest class in the table."""
    return next((_CODE_OF[cls] for cls in type(error).__mro__ if cls in _CODE_OF), grpc.StatusCode.UNKNOWN)


def status_of(error: IsthmusError) -> Status:
    """The status that tells a caller of an error."""
    metadata = [(ERROR_KEY, type(error).__name__)]
    if isinstance(error, EngineFailed):
        metadata.append((ENGINE_FAILED_KEY, f"{error.participants} {error.at}".strip()))
    if error.retry_after_s is not None:
        metadata.append((RETRY_KEY, str(round(max(_LEAST_RETRY_S, error.retry_after_s) * 1e3))))
    return Status(code_of(error), cut(str(error)), tuple(metadata))


def status_of_bug(error: Exception, where: str) -> Status:
    """Logs an unexpected exception with its trace; the status names the incident in the log, and tells nothing else."""
    incident = secrets.token_hex(4)
    log.error("a bug in %s, incident %s", where, incident, exc_info=error)
    details = f"internal error, incident {incident}: the server's log tells more"
    return Status(grpc.StatusCode.UNKNOWN, details, ((BUG_KEY, incident),))


def error_of(error: grpc.aio.AioRpcError, peer: str = "") -> IsthmusError | PeerBug:
    """The error that the status of a call stands for; its text begins with `peer`, whom the call went to.

    Lost where a connection or stream broke and no server of ours said why, and plain Unavailable where the server
    never saw the request. A caller's own metadata that gRPC refuses to send is an InvalidRequest.
    """
    code, details = error.code(), error.details() or ""
    text = f"{peer}: {details}" if peer else details
    metadata = _trailing(error)
    if code is grpc.StatusCode.INTERNAL and details == _INVALID_METADATA:
        return InvalidRequest("the request has metadata that cannot be passed on")
    if BUG_KEY in metadata:
        return PeerBug(text)
    if code is grpc.StatusCode.CANCELLED:
        return Unavailable(f"{peer or 'the server'} cancelled the request")
    if code is grpc.StatusCode.UNAVAILABLE and ENGINE_FAILED_KEY in metadata:
        participants, _, at = metadata[ENGINE_FAILED_KEY].partition(" ")
        return EngineFailed(text, int(participants) if participants.isdecimal() else 1, at)
    if _is_lost(code, metadata):
        return Unavailable(text) if is_unreached(error) else Lost(text)
    if code not in _ERROR_OF:
        return PeerBug(f"{peer}: {code.name}: {details}" if peer else f"{code.name}: {details}")
    known = _ERROR_OF[code](text)
    if metadata.get(RETRY_KEY, "").isdecimal():
        known.retry_after_s = int(metadata[RETRY_KEY]) / 1e3
    return known


def is_unreached(error: grpc.aio.AioRpcError) -> bool:
    """Whether no connection was made, so that no server has seen the request."""
    unavailable = error.code() is grpc.StatusCode.UNAVAILABLE and ERROR_KEY not in _trailing(error)
    return unavailable and (error.details() or "").startswith(_NO_CONNECTION)


def tls_problem(error: grpc.aio.AioRpcError) -> str | None:
    """What kept two sides from an encrypted connection, in a few words; None where it was something else."""
    details = error.details() or ""
    return next((text for mark, text in _TLS_PROBLEMS.items() if mark in details), None)


def incident_of(error: grpc.aio.AioRpcError) -> str:
    """The incident in the server's log where the status stands for a bug of the server; else empty."""
    return _trailing(error).get(BUG_KEY, "")


def cut(details: str, most: int = _MAX_DETAILS) -> str:
    """The details of a status, cut to what they may take on the wire, where all but printable ASCII is `%XX` bytes."""
    size = 0
    for at, character in enumerate(details):
        plain = " " <= character <= "~" and character != "%"
        size += 1 if plain else 3 * len(character.encode(errors="replace"))
        if size > most:
            return details[:at]
    return details


def _trailing(error: grpc.aio.AioRpcError) -> dict[str, str]:
    return {key: str(value) for key, value in error.trailing_metadata() or ()}


def _is_lost(code: grpc.StatusCode, metadata: dict[str, str]) -> bool:
    """Whether the connection or stream broke. gRPC has three codes for that; a server that reports such a loss of its
    own says so."""
    if code is grpc.StatusCode.UNAVAILABLE:
        return metadata.get(ERROR_KEY, Lost.__name__) == Lost.__name__
    return code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and ERROR_KEY not in metadata
