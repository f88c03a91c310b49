"""Fuzzes every RPC of every service of a small cluster in this process: python tests/fuzz.py --calls 20000 --seed 1

No request may be answered UNKNOWN or INTERNAL, log a bug, leave a page or a task behind, or change what a well-behaved
client gets. Orders that end or flip workers go to a second cluster, whose workers are replaced as they go.
"""

import argparse
import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import grpc.aio
from fuzz_fleet import CANARY, Fleet, Method, running_fleet
from fuzz_values import Values, parsed
from google.protobuf.message import Message
from support.raw_grpc import raw_call

from isthmus.cluster.client.client import Client
from isthmus.proto.rpc.statuses import incident_of

BUG = "bug"  # in place of the status that tells of one
FORBIDDEN = (BUG, grpc.StatusCode.UNKNOWN.name, grpc.StatusCode.INTERNAL.name)
AT_ONCE = 16  # calls
CANARY_EVERY = 250  # calls
ODD_TIMEOUTS_S = (1.0, 0.05, 0.001, 0.0, -1.0, 1e9, 1e300, float("inf"))
WRITE_FAILED = "Internal error from Core"  # the client library's own, where a call was over before its stream was sent
METADATA: tuple[tuple[tuple[str, str | bytes], ...], ...] = (
    (),
    (),
    (("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),),
    (("traceparent", "x" * 600), ("tracestate", "~"), ("tracestate", " ")),
    (("odd-bin", b"\xff\0\xfe"), ("x", "")),
    tuple((f"key-{number}", "v") for number in range(60)),
)
# A header that gRPC cannot read (`grpc-timeout: x`) is not among them: it answers INTERNAL before any code of ours.
RAW_HEADERS = (
    *((b"grpc-timeout", timeout) for timeout in (b"99999999H", b"99999999S", b"1n", b"1S")),
    *((b"traceparent", value) for value in (b"caf\xc3\xa9", b"\xff\xfe", b"", b"a\0b")),
    *((b"tracestate", value) for value in (b"a\x7fb", b"z" * 700)),
    (b"grpc-encoding", b"gzip"),
)


@dataclass
class Outcome:
    """What a run has seen."""

    calls: int = 0
    canaries: int = 0
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)  # by method and status
    failures: list[str] = field(default_factory=list)

    def statuses(self) -> Counter[str]:
        """How many calls ended with each status."""
        total: Counter[str] = Counter()
        for (_, status), count in self.answers.items():
            total[status] += count
        return total


class Bugs(logging.Handler):
    """Every bug that a server of this process logs is a failure."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(logging.ERROR)
        self._outcome = outcome

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] not in ("isthmus", "asyncio"):
            return  # gRPC itself logs metadata that is no text
        error = record.exc_info[1] if record.exc_info else None
        self._outcome.failures.append(f"logged: {record.getMessage()}: {error!r}")


class Fuzzer:
    """Makes calls, each from its own seed and number, so that one can be made again."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet, self._seed = fleet, seed
        self.outcome = Outcome()

    async def run(self, calls: int) -> None:
        """So many calls, AT_ONCE at a time, with canaries between; progress on stderr."""
        numbers, begun_s = iter(range(calls)), time.monotonic()

        async def worker() -> None:
            for number in numbers:
                await self._call(number)
                made = self.outcome.calls
                if number and number % 1000 == 0:
                    rate, told = made / (time.monotonic() - begun_s), dict(self.outcome.statuses())
                    print(f"{made} calls, {rate:.0f}/s, {told}", file=sys.stderr, flush=True)
                if number % CANARY_EVERY == 0:
                    await self.canary()
                    await self._fleet.replace_lost()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(worker())

    async def canary(self) -> None:
        """A good client's request, which must be answered as if nobody else were there."""
        async with Client(self._fleet.gateway.address) as client:
            try:
                answer = await client.answer(CANARY, timeout_s=60)
            except grpc.aio.AioRpcError as error:
                self.outcome.failures.append(f"canary: {error.code().name}: {error.details()}")
                return
        self.outcome.canaries += 1
        if answer.token_ids != self._fleet.expected:
            self.outcome.failures.append(f"canary: {answer.token_ids} instead of {self._fleet.expected}")

    async def _call(self, number: int) -> None:
        rng = random.Random(f"{self._seed}:{number}")
        method = rng.choice(self._fleet.methods)
        address = rng.choice(method.addresses)
        values = Values(rng, self._fleet.known)
        data = values.request(method.input, self._fleet.valid.get(method.input.full_name, ()))
        if rng.random() < 0.03:
            status, details = await _raw(address, method, data, rng)
        else:
            status, details = await self._ask(address, method, data, rng)
        self.outcome.calls += 1
        self.outcome.answers[method.path, status] += 1
        if status in FORBIDDEN:
            text = str(parsed(method.input, data)).replace("\n", " ")
            self.outcome.failures.append(
                f"seed {self._seed} call {number}: {method.path}: {status}: {details}: {text[:300]} {data[:80].hex()}"
            )

    async def _ask(self, address: str, method: Method, data: bytes, rng: random.Random) -> tuple[str, str]:
        channel = self._fleet.channels[address]
        # Streams are written here: grpc.aio's own task for an iterator of requests outlives a cancelled call.
        requests = [data] * rng.randint(0, 3) if method.kind.startswith("stream") else []
        call: Any = getattr(channel, method.kind)(method.path)(
            *(() if method.kind.startswith("stream") else (data,)),
            timeout=rng.choice(ODD_TIMEOUTS_S) if rng.random() < 0.2 else None,
            metadata=rng.choice(METADATA),
            compression=rng.choice((None, None, None, grpc.Compression.Gzip)),
        )
        limit_s = rng.choice((0.0, 0.001, 0.02)) if rng.random() < 0.1 else method.limit_s
        try:
            async with asyncio.timeout(limit_s):
                if method.kind.endswith("unary"):
                    self._look_at(method, await call)
                else:
                    if method.kind.startswith("stream"):
                        await _send(call, requests)
                    while isinstance(answer := await call.read(), bytes):
                        self._look_at(method, answer)
        except TimeoutError:
            return "cancelled", ""
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return "cancelled", ""
        except grpc.aio.AioRpcError as error:
            if error.details() == WRITE_FAILED:
                return "cancelled", ""
            return BUG if incident_of(error) else error.code().name, error.details() or ""
        finally:
            call.cancel()
        return "OK", ""

    def _look_at(self, method: Method, data: bytes) -> None:
        answer = parsed(method.output, data)
        if answer is None:
            self.outcome.failures.append(f"{method.path} answered bytes that are no {method.output.full_name}")
        else:
            self._learn(answer)

    def _learn(self, answer: Message) -> None:
        """Ids and tokens of the servers, for later requests."""
        for name, kept in (("job_id", "job_id"), ("next_page_token", "page_token")):
            value = getattr(answer, name, "")
            if value and len(self._fleet.known[kept]) < 50:
                self._fleet.known[kept].append(value)


async def _send(call: Any, requests: list[bytes]) -> None:
    try:
        for request in requests:
            await call.write(request)
        await call.done_writing()
    except (asyncio.InvalidStateError, grpc.aio.InternalError):
        pass  # the call was over before its stream was sent: its status says how


async def _raw(address: str, method: Method, data: bytes, rng: random.Random) -> tuple[str, str]:
    header = rng.choice(RAW_HEADERS)
    try:
        answer = await raw_call(address, method.path, data, (header,), within_s=method.limit_s + 0.2)
    except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        return "cancelled", ""
    code = next((code for code in grpc.StatusCode if code.value[0] == answer.status), None)
    return (code.name if code is not None else "reset"), f"with header {header}"


async def fuzz(calls: int, seed: int) -> Outcome:
    """A whole run: the cluster is started, fuzzed, and must be as it was before."""
    with TemporaryDirectory() as folder:
        async with running_fleet(Path(folder)) as fleet:
            fuzzer = Fuzzer(fleet, seed)
            bugs = Bugs(fuzzer.outcome)
            logging.getLogger().addHandler(bugs)
            asyncio.get_running_loop().set_exception_handler(
                lambda loop, context: fuzzer.outcome.failures.append(f"event loop: {context}")
            )
            try:
                await fuzzer.canary()
                tasks = len(asyncio.all_tasks())
                await fuzzer.run(calls)
                await fuzzer.canary()
                fuzzer.outcome.failures += await fleet.left_behind(tasks)
            finally:
                logging.getLogger().removeHandler(bugs)
            return fuzzer.outcome


def main() -> None:
    """Exit status 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(handlers=[logging.NullHandler()])  # `Bugs` listens, the terminal stays quiet
    begun_s = time.monotonic()
    outcome = asyncio.run(fuzz(options.calls, options.seed))
    result = {
        "seed": options.seed,
        "calls": outcome.calls,
        "methods": len({method for method, _ in outcome.answers}),
        "canaries": outcome.canaries,
        "statuses": dict(outcome.statuses()),
        "answered": {method: count for (method, status), count in sorted(outcome.answers.items()) if status == "OK"},
        "failures": outcome.failures[:50],
        "seconds": round(time.monotonic() - begun_s, 1),
    }
    print(json.dumps(result, indent=2))
    sys.exit(bool(outcome.failures))


if __name__ == "__main__":
    import conftest  # noqa: F401  threads and other settings, before torch is imported

    main()
