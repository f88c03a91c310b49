"""Errors become statuses and statuses errors, by one table."""

from typing import Any
from urllib.parse import quote

import grpc
import grpc.aio
import pytest

from isthmus.proto.errors import (
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
from isthmus.proto.rpc.statuses import (
    BUG_KEY,
    ERROR_KEY,
    RETRY_KEY,
    PeerBug,
    cut,
    error_of,
    incident_of,
    is_unreached,
    status_of,
    status_of_bug,
)
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.worker_pb2 import GetStatusRequest
from isthmus.proto.worker_pb2_grpc import ClusterStub


def answered(code: grpc.StatusCode, details: str = "", metadata: Any = ()) -> grpc.aio.AioRpcError:
    """What a client's call raises."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details=details)


@pytest.mark.parametrize(
    ("error", "read_as"),
    [
        *((kind("why"), kind) for kind in (InvalidRequest, NotFound, AlreadyExists, OutOfRange, Exhausted)),
        *((kind("why"), kind) for kind in (Incompatible, Unavailable, Lost, Blamed, Corrupt, Expired)),
        *((kind("why"), kind) for kind in (Unauthenticated, PermissionDenied)),
        (IllegalState("why"), Incompatible),
        (EngineFailed("why", 3), EngineFailed),
    ],
)
def test_an_error_is_read_back_from_its_status(error: IsthmusError, read_as: type[IsthmusError]) -> None:
    status = status_of(error)
    assert (status.details, dict(status.trailing_metadata)[ERROR_KEY]) == ("why", type(error).__name__)
    read = error_of(answered(*status))
    assert (type(read), str(read)) == (read_as, "why")
    assert str(error_of(answered(*status), "worker x")) == "worker x: why"


@pytest.mark.parametrize(("participants", "at"), [(1, ""), (4, "127.0.0.1:7001")])
def test_a_failed_engine_is_told_with_its_participants(participants: int, at: str) -> None:
    read = error_of(answered(*status_of(EngineFailed("died", participants, at))))
    assert isinstance(read, EngineFailed)
    assert (read.participants, read.at) == (participants, at)


@pytest.mark.parametrize(("retry_after_s", "told"), [(1.234, "1234"), (0.001, "100")])
def test_when_to_try_again_is_told(retry_after_s: float, told: str) -> None:
    error = Exhausted("full")
    assert RETRY_KEY not in dict(status_of(error).trailing_metadata)
    error.retry_after_s = retry_after_s
    status = status_of(error)
    assert dict(status.trailing_metadata)[RETRY_KEY] == told
    read = error_of(answered(*status))
    assert isinstance(read, Exhausted) and read.retry_after_s == int(told) / 1e3


def test_a_bug_is_marked(caplog: pytest.LogCaptureFixture) -> None:
    status = status_of_bug(KeyError("secret"), "a test")
    error = answered(*status)
    assert incident_of(error) == dict(status.trailing_metadata)[BUG_KEY]
    assert f"a bug in a test, incident {incident_of(error)}" in caplog.text
    read = error_of(error, "worker x")
    assert isinstance(read, PeerBug) and not isinstance(read, IsthmusError)
    assert "secret" not in str(read)


def test_words_alone_mark_no_bug() -> None:
    error = answered(grpc.StatusCode.UNKNOWN, "internal error, incident 12345678: the server's log tells more")
    assert incident_of(error) == ""
    assert isinstance(error_of(error), Lost)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", Lost),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", Lost),
        (grpc.StatusCode.UNKNOWN, "Stream removed", Lost),
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: refused", Unavailable),
        (grpc.StatusCode.CANCELLED, "Cancelled on the server side", Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", Expired),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)", Exhausted),
        (grpc.StatusCode.INTERNAL, "Invalid metadata", InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", PeerBug),
    ],
)
def test_what_grpc_says_itself(code: grpc.StatusCode, details: str, kind: type[Exception]) -> None:
    assert type(error_of(answered(code, details))) is kind


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-such-host.invalid:9"])
async def test_who_is_not_reached_has_not_seen_the_request(address: str) -> None:
    async with Transport().dial(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ClusterStub(channel).GetStatus(GetStatusRequest(), timeout=30)
    assert is_unreached(raised.value), raised.value
    assert type(error_of(raised.value)) is Unavailable


def test_a_server_that_tells_of_another_was_reached_itself() -> None:
    error = answered(*status_of(Unavailable("failed to connect to all addresses of the database")))
    assert not is_unreached(error)


@pytest.mark.parametrize("text", ["😀" * 2000, "%" * 2000, "é" * 2000, "\0\n" * 2000, "a" * 3000])
def test_details_are_cut_by_what_they_take_on_the_wire(text: str) -> None:
    kept = cut(text)
    encoded = quote(kept.encode(errors="replace"), safe="".join(map(chr, range(32, 127))).replace("%", ""))
    assert text.startswith(kept)
    assert 1900 < len(encoded) <= 2000
