"""Calls by a client of gRPC with requests that nobody meant."""

import asyncio
import random
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from isthmus.proto.rpc.statuses import incident_of

from .fleet import Fleet
from .inputs import Input, Outcome
from .methods import Method
from .values import Values, parsed

BUG = "bug"  # in place of the status that tells of one
FORBIDDEN = (BUG, grpc.StatusCode.UNKNOWN.name, grpc.StatusCode.INTERNAL.name)
ODD_TIMEOUTS_S = (1.0, 0.05, 0.001, 0.0, -1.0, 1e9, 1e300, float("inf"))
WRITE_FAILED = "Internal error from Core"  # the client library's own, where a call was over before its stream was sent
CANCELLED = "cancelled"
KEPT = 50  # values of one name that are learned
METADATA: tuple[tuple[tuple[str, str | bytes], ...], ...] = (
    (),
    (),
    (("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),),
    (("traceparent", "x" * 600), ("tracestate", "~"), ("tracestate", " ")),
    (("authorization", "Bearer x"), ("authorization", "")),
    (("odd-bin", b"\xff\0\xfe"), ("x", "")),
    tuple((f"key-{number}", "v") for number in range(60)),
    (("x", "v" * 20_000),),
)


async def call(fleet: Fleet, outcome: Outcome, number: int, rng: random.Random) -> None:
    """One call of any method."""
    method = rng.choice(fleet.methods)
    address = rng.choice(method.addresses)
    data = Values(rng, fleet.known).request(method.input, fleet.valid.get(method.input.full_name, ()))
    node = fleet.node_at(address)
    made = Input(kind="rpc", target=fleet.label(address), what=method.path, number=number, data=data)
    outcome.sent(made)
    starts = node.starts
    status, details = await ask(fleet, outcome, fleet.channel(address), method, made, rng)
    outcome.statuses[status] += 1
    if status in FORBIDDEN and node.starts == starts and node.alive:
        text = str(parsed(method.input, data)).replace("\n", " ")
        outcome.failed(f"{method.path}: {status}: {details}: {text[:200]}", made)


async def ask(
    fleet: Fleet, outcome: Outcome, channel: grpc.aio.Channel, method: Method, made: Input, rng: random.Random
) -> tuple[str, str]:
    """How a call ended: its status, "bug" or "cancelled", and what it said."""
    # Streams are written here: grpc.aio's own task for an iterator of requests outlives a cancelled call.
    streams = method.kind.startswith("stream")
    requests = [made.data] * rng.randint(0, 3) if streams else []
    running: Any = getattr(channel, method.kind)(method.path)(
        *(() if streams else (made.data,)),
        timeout=rng.choice(ODD_TIMEOUTS_S) if rng.random() < 0.2 else None,
        metadata=rng.choice(METADATA),
        compression=rng.choice((None, None, None, grpc.Compression.Gzip)),
    )
    limit_s = rng.choice((0.0, 0.001, 0.02)) if rng.random() < 0.1 else method.limit_s
    try:
        async with asyncio.timeout(limit_s):
            if method.kind.endswith("unary"):
                _look_at(fleet, outcome, method, await running, made)
            else:
                if streams:
                    await _send(running, requests)
                while isinstance(answer := await running.read(), bytes):
                    _look_at(fleet, outcome, method, answer, made)
    except TimeoutError:
        return CANCELLED, ""
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return CANCELLED, ""
    except grpc.aio.AioRpcError as error:
        if error.details() == WRITE_FAILED:
            return CANCELLED, ""
        return BUG if incident_of(error) else error.code().name, error.details() or ""
    finally:
        running.cancel()
    return "OK", ""


def _look_at(fleet: Fleet, outcome: Outcome, method: Method, data: bytes, made: Input) -> None:
    answer = parsed(method.output, data)
    if answer is None:
        outcome.failed(f"{method.path} answered bytes that are no {method.output.full_name}", made)
    else:
        _learn(fleet, answer)


def _learn(fleet: Fleet, answer: Message) -> None:
    """Ids and tokens of the servers, for later requests."""
    for name, kept in (("job_id", "job_id"), ("next_page_token", "page_token")):
        value = getattr(answer, name, "")
        if value and len(fleet.known[kept]) < KEPT:
            fleet.known[kept].append(value)


async def _send(running: Any, requests: list[bytes]) -> None:
    try:
        for request in requests:
            await running.write(request)
        await running.done_writing()
    except (asyncio.InvalidStateError, grpc.aio.InternalError):
        pass  # the call was over before its stream was sent: its status says how
