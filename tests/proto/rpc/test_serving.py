"""What every server of ours does with requests that are none, with bugs, and with what clients say of themselves."""

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from support import raw_grpc
from support.raw_grpc import (
    DATA,
    END_STREAM,
    PREFACE,
    connect,
    frame,
    opening,
    raw_call,
    read_answer,
    request_frames,
    settings,
)

from isthmus.proto import worker_pb2
from isthmus.proto.errors import InvalidRequest, Unavailable
from isthmus.proto.rpc import interceptor
from isthmus.proto.rpc.statuses import BUG_KEY, ERROR_KEY, incident_of
from isthmus.proto.rpc.trace import TraceContext, trace_context
from isthmus.proto.rpc.transport import Transport
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
    server = await Transport().listen(
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


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    error = await failure(call)
    return error.code(), error.details() or ""


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
    async with served() as (_, address), Transport().dial(address) as channel:
        call = getattr(channel, kind)(method)
        sent = call(iter([NO_MESSAGE])) if kind == "stream_stream" else call(NO_MESSAGE)
        code, details = await refusal(sent if kind == "unary_unary" else sent.read())
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, f"4 bytes that are no request of {method}")


async def test_a_bug_is_told_by_its_incident_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (servicer, address), Transport().dial(address) as channel:
        for call in (
            lambda: ClusterStub(channel).GetStatus(GetStatusRequest()),
            lambda: WorkerStub(channel).Watch(WatchRequest()).read(),
        ):
            servicer.error = FileNotFoundError(2, "No such file", "/srv/models/secret")
            with caplog.at_level(logging.ERROR):
                error = await failure(call())
            code, details = error.code(), error.details() or ""
            assert code is grpc.StatusCode.UNKNOWN
            assert details.startswith("internal error, incident ")
            assert "FileNotFoundError" not in details and "/srv" not in details
            incident = details.split("incident ")[1].split(":")[0]
            assert incident_of(error) == incident
            assert dict(error.trailing_metadata() or ()) == {BUG_KEY: incident}
            record = next(record for record in caplog.records if incident in record.getMessage())
            assert record.exc_info and record.exc_info[1] is servicer.error


async def test_the_private_part_of_an_error_stays_here(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (servicer, address), Transport().dial(address) as channel:
        servicer.error = error = Unavailable("the database is away")
        error.private = "/var/lib/jobs.db"
        with caplog.at_level(logging.WARNING):
            refused = await refusal(ClusterStub(channel).GetStatus(GetStatusRequest()))
        assert refused == (grpc.StatusCode.UNAVAILABLE, "the database is away")
        assert [record.fields["private"] for record in caplog.records] == ["/var/lib/jobs.db"]  # pyright: ignore


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
    async with served() as (servicer, address), Transport().dial(address) as channel:
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


class Kinds:
    """A handler of each kind that a method can have; each raises `error` after its first request and answer."""

    def __init__(self) -> None:
        self.error: Exception = KeyError("secret")
        parse, write = WorkerReport.FromString, WorkerReport.SerializeToString
        made = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(self.one, parse, write),
            "unary_stream": grpc.unary_stream_rpc_method_handler(self.written, parse, write),
            "yielded/unary_stream": grpc.unary_stream_rpc_method_handler(self.yielded, parse, write),
            "stream_unary": grpc.stream_unary_rpc_method_handler(self.collected, parse, write),
            "stream_stream": grpc.stream_stream_rpc_method_handler(self.written_to_each, parse, write),
            "yielded/stream_stream": grpc.stream_stream_rpc_method_handler(self.yielded_to_each, parse, write),
        }
        self.handlers = {name.replace("/", "_"): handler for name, handler in made.items()}

    async def one(self, request: WorkerReport, context: Any) -> WorkerReport:
        raise self.error

    async def written(self, request: WorkerReport, context: Any) -> None:
        await context.write(request)
        raise self.error

    async def yielded(self, request: WorkerReport, context: Any) -> AsyncIterator[WorkerReport]:
        yield request
        raise self.error

    async def collected(self, requests: AsyncIterator[WorkerReport], context: Any) -> WorkerReport:
        async for _ in requests:
            raise self.error
        raise AssertionError("no request came")

    async def written_to_each(self, requests: AsyncIterator[WorkerReport], context: Any) -> None:
        async for request in requests:
            await context.write(request)
            raise self.error

    async def yielded_to_each(self, requests: AsyncIterator[WorkerReport], context: Any) -> AsyncIterator[WorkerReport]:
        async for request in requests:
            yield request
            raise self.error


@pytest.mark.parametrize("method", sorted(Kinds().handlers))
async def test_handlers_of_every_kind_are_guarded(method: str, caplog: pytest.LogCaptureFixture) -> None:
    kinds, transport, kind = Kinds(), Transport(), method.removeprefix("yielded_")
    service = worker_pb2.DESCRIPTOR.services_by_name["Worker"]
    server = await transport.listen(
        "127.0.0.1:0", {service: lambda server: server.add_registered_method_handlers("test.Kinds", kinds.handlers)}
    )
    channel = transport.dial(f"127.0.0.1:{server.port}")

    async def ended(request: bytes) -> grpc.aio.AioRpcError:
        call = getattr(channel, kind)(f"/test.Kinds/{method}")
        sent = call(iter([request])) if kind.startswith("stream") else call(request)
        if kind.endswith("unary"):
            return await failure(sent)
        if request != NO_MESSAGE:
            assert await sent.read() == request
        return await failure(sent.read())

    try:
        error = await ended(b"")
        assert (error.code(), bool(incident_of(error))) == (grpc.StatusCode.UNKNOWN, True)
        assert incident_of(error) in caplog.text and "secret" not in (error.details() or "")
        kinds.error = InvalidRequest("too odd")
        error = await ended(b"")
        assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "too odd")
        assert dict(error.trailing_metadata() or ()) == {ERROR_KEY: "InvalidRequest"}
        error = await ended(NO_MESSAGE)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == f"4 bytes that are no request of /test.Kinds/{method}"
    finally:
        await transport.close()
        await server.stop()


async def test_a_request_that_is_begun_and_not_finished_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "REQUEST_S", 0.3)
    async with served() as (_, address):
        for path in ("/isthmus.v1.Cluster/GetStatus", "/isthmus.v1.Worker/Watch", "/grpc.health.v1.Health/Check"):
            reader, writer = await connect(address)
            headers, data = request_frames(1, path, b"12345678")
            writer.write(opening() + headers + frame(DATA, 0, 1, data[9:-1]))  # all but the last byte
            async with asyncio.timeout(10):
                answer = await read_answer(reader, writer)
            assert (answer.status, answer.messages) == (grpc.StatusCode.DEADLINE_EXCEEDED.value[0], [])
            writer.close()


async def test_a_call_without_a_request_is_an_invalid_argument() -> None:
    async with served() as (_, address):
        reader, writer = await connect(address)
        headers, _ = request_frames(1, "/isthmus.v1.Cluster/GetStatus", b"")
        writer.write(opening() + headers + frame(DATA, END_STREAM, 1, b""))
        async with asyncio.timeout(10):
            answer = await read_answer(reader, writer)
        assert answer.status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        writer.close()


async def test_compressed_messages_are_refused_unread() -> None:
    bomb = gzip.compress(bytes(8 << 20))
    async with served() as (_, address):
        reader, writer = await connect(address)
        frames = request_frames(1, "/isthmus.v1.Cluster/GetStatus", bomb, ((b"grpc-encoding", b"gzip"),), compressed=1)
        writer.write(opening() + b"".join(frames))
        async with asyncio.timeout(10):
            answer = await read_answer(reader, writer)
        assert answer.status == grpc.StatusCode.UNIMPLEMENTED.value[0]
        writer.close()
        async with grpc.aio.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
            stub: Any = HealthStub(channel)
            code, _ = await refusal(stub.Check(HealthCheckRequest(service="x" * 10_000)))
            assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_headers_beyond_the_limit_are_refused() -> None:
    async with served() as (_, address), Transport().dial(address) as channel:
        stub = ClusterStub(channel)
        await stub.GetStatus(GetStatusRequest(), metadata=(("x", "v" * 12_000),))
        for size in (20_000, 1 << 20):
            code, _ = await refusal(stub.GetStatus(GetStatusRequest(), metadata=(("x", "v" * size),)))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_health_watcher_that_reads_nothing_holds_up_nobody() -> None:
    transport = Transport()
    server = await transport.listen("127.0.0.1:0", {})
    address = f"127.0.0.1:{server.port}"
    reader, writer = await connect(address)
    no_window = settings([(4, 0)])
    writer.write(PREFACE + no_window + b"".join(request_frames(1, "/grpc.health.v1.Health/Watch", b"")))
    await reader.readexactly(9)
    try:
        async with transport.dial(address) as channel:
            stub: Any = HealthStub(channel)
            watch: Any = stub.Watch(HealthCheckRequest())
            assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
            await asyncio.sleep(0.3)
            async with asyncio.timeout(5):
                await server.set_serving(True)
                assert (await watch.read()).status == HealthCheckResponse.SERVING
            watch.cancel()
    finally:
        writer.close()
        await server.stop()


async def test_grpc_stops_once_however_many_stop_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at the same time crash the process: one of them cancels the calls of a server that is gone already."""
    server = await Transport().listen("127.0.0.1:0", {})
    stops, stop = [], server.grpc_server.stop

    async def counted(grace: float | None) -> None:
        stops.append(grace)
        await stop(grace)

    monkeypatch.setattr(server.grpc_server, "stop", counted)
    await asyncio.gather(server.stop(0.1), server.stop(), server.stop())
    await server.stop()
    assert stops == [0.1]


def odd_call(path: bytes, stream: int = 1) -> bytes:
    """A whole call of a path of any bytes."""
    head = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"), (b"te", b"trailers"))
    block = b"".join(raw_grpc.literal(*pair) for pair in (*head, (b"content-type", b"application/grpc")))
    return raw_grpc.frame(raw_grpc.HEADERS, raw_grpc.END_HEADERS | END_STREAM, stream, block)


@pytest.mark.parametrize("path", [b"\xff\xfe", b"/isthmus.v1.Worker/\xe8", b"/", b"", b"/no/such", b"\0", b"/a" * 4000])
async def test_calls_of_no_method_are_unimplemented_whatever_their_path(path: bytes) -> None:
    async with served() as (_, address), Transport().dial(address) as running:
        stub: Any = HealthStub(running)
        watch: Any = stub.Watch(HealthCheckRequest())
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        for _ in range(20):
            reader, writer = await connect(address)
            writer.write(opening() + odd_call(path))
            async with asyncio.timeout(10):
                answer = await read_answer(reader, writer)
            writer.close()
            assert answer.status == grpc.StatusCode.UNIMPLEMENTED.value[0]
        await ClusterStub(running).GetStatus(GetStatusRequest(), timeout=5)
        assert not watch.done()
        watch.cancel()


async def test_interceptors_see_calls_of_no_method() -> None:
    """Who must show a key for a method must show one for what is none."""
    seen = []

    class Refusing(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            async def refuse(requests: Any, context: Any) -> None:
                raise InvalidRequest("nobody")

            seen.append(handler_call_details.method)
            return grpc.stream_stream_rpc_method_handler(refuse)

    server = await Transport().listen("127.0.0.1:0", {}, interceptors=[Refusing()])
    try:
        reader, writer = await connect(f"127.0.0.1:{server.port}")
        writer.write(opening() + odd_call(b"\xff"))
        async with asyncio.timeout(10):
            answer = await read_answer(reader, writer)
        writer.close()
        assert (answer.status, seen) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], ["/"])
    finally:
        await server.stop()
