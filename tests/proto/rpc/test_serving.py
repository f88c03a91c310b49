"""What every server of ours does with requests that are none, with bugs, and with what clients say of themselves."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
from raw_grpc import raw_call

from isthmus.proto import worker_pb2
from isthmus.proto.errors import Unavailable, without_paths
from isthmus.proto.rpc.server import TraceContext, cut, open_channel, start_server, trace_context
from isthmus.proto.worker_pb2 import ClusterStatus, GetStatusRequest, WatchRequest, WorkerReport
from isthmus.proto.worker_pb2_grpc import (
    ClusterServicer,
    ClusterStub,
    WorkerServicer,
    WorkerStub,
    add_ClusterServicer_to_server,
    add_WorkerServicer_to_server,
)

NO_MESSAGE = b"\xff\xff\xff\xff"


class Servicer(ClusterServicer, WorkerServicer):
    """One method of each kind; `error` is raised by both."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.time_left: float | None = None
        self.trace: TraceContext = ()

    async def GetStatus(self, request: GetStatusRequest, context: Any) -> ClusterStatus:
        if self.error:
            raise self.error
        self.time_left, self.trace = context.time_remaining(), trace_context(context)
        return ClusterStatus(version="1")

    async def Watch(self, request: WatchRequest, context: Any) -> None:
        if self.error:
            raise self.error
        await context.write(WorkerReport())


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Servicer, str]]:
    servicer, services = Servicer(), worker_pb2.DESCRIPTOR.services_by_name
    server = await start_server(
        "127.0.0.1:0",
        {
            services["Cluster"]: lambda server: add_ClusterServicer_to_server(servicer, server),
            services["Worker"]: lambda server: add_WorkerServicer_to_server(servicer, server),
        },
    )
    try:
        yield servicer, f"127.0.0.1:{server.port}"
    finally:
        await server.stop()


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), raised.value.details() or ""


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("unary_unary", "/isthmus.v1.Cluster/GetStatus"),
        ("unary_stream", "/isthmus.v1.Worker/Watch"),
        ("unary_unary", "/grpc.health.v1.Health/Check"),
        ("unary_stream", "/grpc.health.v1.Health/Watch"),
        ("stream_stream", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
    ],
)
async def test_bytes_that_are_no_request_are_an_invalid_argument(kind: str, method: str) -> None:
    async with served() as (_, address), open_channel(address) as channel:
        call = getattr(channel, kind)(method)
        sent = call(iter([NO_MESSAGE])) if kind == "stream_stream" else call(NO_MESSAGE)
        code, details = await refusal(sent if kind == "unary_unary" else sent.read())
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, f"4 bytes that are no request of {method}")


async def test_a_bug_is_told_by_its_incident_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (servicer, address), open_channel(address) as channel:
        for call in (
            lambda: ClusterStub(channel).GetStatus(GetStatusRequest()),
            lambda: WorkerStub(channel).Watch(WatchRequest()).read(),
        ):
            servicer.error = FileNotFoundError(2, "No such file", "/srv/models/secret")
            with caplog.at_level(logging.ERROR):
                code, details = await refusal(call())
            assert code is grpc.StatusCode.UNKNOWN
            assert details.startswith("internal error, incident ")
            assert "FileNotFoundError" not in details and "/srv" not in details
            incident = details.split("incident ")[1].split(":")[0]
            record = next(record for record in caplog.records if incident in record.getMessage())
            assert record.exc_info and record.exc_info[1] is servicer.error


async def test_the_private_part_of_an_error_stays_here(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (servicer, address), open_channel(address) as channel:
        servicer.error = error = Unavailable("the database is away")
        error.private = "/var/lib/jobs.db"
        with caplog.at_level(logging.WARNING):
            refused = await refusal(ClusterStub(channel).GetStatus(GetStatusRequest()))
        assert refused == (grpc.StatusCode.UNAVAILABLE, "the database is away")
        assert [record.fields["private"] for record in caplog.records] == ["/var/lib/jobs.db"]  # pyright: ignore


@pytest.mark.parametrize("text", ["😀" * 2000, "%" * 2000, "é" * 2000, "\0\n" * 2000, "a" * 3000])
def test_details_are_cut_by_what_they_take_on_the_wire(text: str) -> None:
    kept = cut(text)
    encoded = quote(kept.encode(errors="replace"), safe="".join(map(chr, range(32, 127))).replace("%", ""))
    assert text.startswith(kept)
    assert 1900 < len(encoded) <= 2000


@pytest.mark.parametrize(
    ("headers", "passed_on"),
    [
        (
            ((b"traceparent", b"00-0af7-b7ad-01"), (b"tracestate", b"k=v")),
            {"traceparent": "00-0af7-b7ad-01", "tracestate": "k=v"},
        ),
        (((b"traceparent", b"caf\xc3\xa9"), (b"tracestate", b"k=v")), {"tracestate": "k=v"}),
        (((b"traceparent", b"\xff\xfe"),), {}),
        (((b"tracestate", b"a\x7fb"),), {}),
        (((b"tracestate", b"a\x00b"),), {}),
        (((b"tracestate", b""),), {}),
        (((b"tracestate", b"z" * 513),), {}),
        (((b"tracestate", b"z" * 512),), {"tracestate": "z" * 512}),
        (((b"tracestate", b"\xff"), (b"tracestate", b"a"), (b"tracestate", b"b")), {"tracestate": "a"}),
    ],
)
async def test_only_what_may_be_a_trace_context_goes_on(
    headers: tuple[tuple[bytes, bytes], ...], passed_on: dict[str, str]
) -> None:
    async with served() as (servicer, address):
        answer = await raw_call(address, "/isthmus.v1.Cluster/GetStatus", b"", headers)
        assert len(answer.messages) == 1
        assert servicer.trace == tuple(passed_on.items())


async def test_a_timeout_beyond_what_grpc_can_count_is_no_end_at_once() -> None:
    async with served() as (servicer, address), open_channel(address) as channel:
        for header in (b"99999999H", b"99999999M", b"99999999S"):
            await raw_call(address, "/isthmus.v1.Cluster/GetStatus", b"", ((b"grpc-timeout", header),))
            assert servicer.time_left is not None and servicer.time_left > 366 * 86400
            # What came in goes out: that was an end at once.
            await ClusterStub(channel).GetStatus(GetStatusRequest(), timeout=servicer.time_left)
        for timeout_s in (1e10, 3.6e11, 1e300, float("inf"), float("nan")):
            await ClusterStub(channel).GetStatus(GetStatusRequest(), timeout=timeout_s)
            assert servicer.time_left is not None and 365 * 86400 < servicer.time_left <= 367 * 86400
        await ClusterStub(channel).GetStatus(GetStatusRequest(), timeout=None)
        assert servicer.time_left is None
        for timeout_s in (-0.1, -1.0, -1e300, float("-inf")):
            code, _ = await refusal(ClusterStub(channel).GetStatus(GetStatusRequest(), timeout=timeout_s))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_texts_of_the_system_lose_their_paths() -> None:
    assert without_paths("[Errno 2] No such file or directory: '/srv/models/x.bin'") == (
        "[Errno 2] No such file or directory: '(a path)'"
    )
    assert without_paths('socket "/run/pg/.s.PGSQL.5432" failed') == 'socket "(a path)" failed'
    assert without_paths("loss of 3/4 of a page at http://host/a/b") == "loss of 3/4 of a page at http://host/a/b"
