"""What HTTP costs beside gRPC: events per second through one gateway, TTFT and ITL of the same streams over both.

    python benchmarks/http_api.py --json http.json

Without a model: a process that answers at a set pace stands for both workers (support/fake_worker.py), one gateway
serves both ports, and this process is the client of all streams. HTTP and gRPC take turns, round by round.

Results are JSON with the fields `events_per_s` (of streams that are given a token as fast as the worker can), the CPU
time of the gateway for each event, `gateway_us_per_event: {grpc, http}`, and of streams at a pace `ttft_ms: {grpc,
http}` (medians) and `itl_ms_p99: {grpc, http}`.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.help import Paragraphs
from support.processes import fake_workers, free_port, isthmus
from support.report import Report, conditions, percentiles, say

from isthmus.cluster.client.client import Client, build_request

MODEL = "smollm2-135m"
START_S = 120.0
BEGIN_S = 1.0  # in which all streams at a pace begin


@dataclass
class Stream:
    """When the events of one stream came, in seconds since it was asked for."""

    arrivals_s: list[float] = field(default_factory=list)

    @property
    def gaps_ms(self) -> list[float]:
        """Between one event and the next."""
        return [(after - before) * 1e3 for before, after in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


class _Reader(asyncio.Protocol):
    """Asks for one stream and notes when its events come: no more than that, so that the client costs little."""

    def __init__(self, request: bytes) -> None:
        self._request, self._rest, self._asked_s = request, b"", 0.0
        self.stream, self.done = Stream(), asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._asked_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter() - self._asked_s
        *events, self._rest = (self._rest + data).split(b"\n\n")
        self.stream.arrivals_s += [
            now_s for event in events if b'"text":"' in event and b'"finish_reason":null' in event
        ]
        if any(b"[DONE]" in event for event in events):
            self._transport.close()
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or RuntimeError(f"the stream ended before its end: {self._rest[:500]!r}"))


async def over_http(port: int, number: int, tokens: int) -> Stream:
    """One stream of HTTP."""
    body = {"prompt": f"prompt {number}", "max_tokens": tokens, "stream": True, "seed": number, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(data)}\r\n\r\n".encode() + data
    _, reader = await asyncio.get_running_loop().create_connection(lambda: _Reader(request), "127.0.0.1", port)
    await reader.done
    return reader.stream


async def over_grpc(client: Client, number: int, tokens: int) -> Stream:
    """One stream of gRPC."""
    sampling = {"max_tokens": tokens, "seed": number, "ignore_eos": True}
    request, asked_s, stream = (
        build_request(prompt=f"prompt {number}", sampling=sampling),
        time.perf_counter(),
        Stream(),
    )
    async for event in client.generate(request):
        if event.text:
            stream.arrivals_s.append(time.perf_counter() - asked_s)
    return stream


async def together(streams: int, within_s: float, ask: Callable[[int], Awaitable[Stream]]) -> list[Stream]:
    """So many streams at once, which begin at random times, the same in each round."""
    draw = random.Random(streams)
    begins_s = [draw.uniform(0, within_s) for _ in range(streams)]

    async def one(number: int) -> Stream:
        await asyncio.sleep(begins_s[number])
        return await ask(number)

    return list(await asyncio.gather(*map(one, range(streams))))


async def measure(
    address: str, port: int, gateway: psutil.Process, options: Any, report: Report, step_ms: float
) -> None:
    """One gateway's figures: at full speed where `step_ms` is 0, else at that pace."""
    async with Client(address) as client:
        ways: dict[str, Callable[[int], Awaitable[Stream]]] = {
            "grpc": lambda number: over_grpc(client, number, options.tokens),
            "http": lambda number: over_http(port, number, options.tokens),
        }
        await _ready(client)
        for ask in ways.values():
            await ask(0)
        streams: dict[str, list[Stream]] = {name: [] for name in ways}
        took_s, cpu_s = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
        for turn in range(options.rounds):
            for name, ask in ways.items():
                before_s, used_s = time.perf_counter(), sum(gateway.cpu_times()[:2])
                streams[name] += await together(options.streams, BEGIN_S if step_ms else 0, ask)
                took_s[name] += time.perf_counter() - before_s
                cpu_s[name] += sum(gateway.cpu_times()[:2]) - used_s
            say(f"{f'a step each {step_ms:g} ms' if step_ms else 'full speed'}: round {turn + 1} of {options.rounds}")
    events = {name: sum(len(each.arrivals_s) for each in found) for name, found in streams.items()}
    if not step_ms:
        report.put(
            events_per_s={name: round(events[name] / took_s[name]) for name in ways},
            gateway_us_per_event={name: round(cpu_s[name] / events[name] * 1e6) for name in ways},
        )
        return
    gaps = {name: [gap for each in found for gap in each.gaps_ms] for name, found in streams.items()}
    firsts = {name: [each.arrivals_s[0] * 1e3 for each in found] for name, found in streams.items()}
    report.put(
        ttft_ms={name: round(statistics.median(found), 2) for name, found in firsts.items()},
        itl_ms_p99={name: percentiles(found)["p99"] for name, found in gaps.items()},
        itl_ms_p50={name: percentiles(found)["p50"] for name, found in gaps.items()},
    )


async def _ready(client: Client) -> None:
    async with asyncio.timeout(START_S):
        while True:
            try:
                await client.answer(build_request(prompt="warm up", sampling={"max_tokens": 1}), timeout_s=10)
                return
            except Exception as error:
                say(f"not ready yet: {type(error).__name__}")
                await asyncio.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    parser.add_argument("--streams", type=int, default=32, help="at once")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5, help="of each way and pace")
    parser.add_argument("--step-ms", type=float, default=25.0, help="between two tokens of a stream")
    options = parser.parse_args()
    os.environ["ISTHMUS_TLS"] = "off"  # as HTTP is on loopback: what differs is not the encryption
    with Report(options.json) as report:
        report.put(**conditions(streams=options.streams, tokens=options.tokens, step_ms=options.step_ms))
        for step_ms in (options.step_ms, 0.0):
            address, port = f"127.0.0.1:{free_port()}", free_port()
            with fake_workers(MODEL, 0, step_ms, options.streams) as workers:
                listen = ("--listen", address, "--admin-listen", f"127.0.0.1:{free_port()}", "--http-port", str(port))
                own = ("--workers", workers, "--model", MODEL, "--no-preflight")
                with isthmus("gateway", *listen, *own) as process:
                    asyncio.run(measure(address, port, psutil.Process(process.pid), options, report, step_ms))


if __name__ == "__main__":
    main()
