"""`isthmus demo`: a real cluster, real prompts over gRPC, and what moving their KV took."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from ....proto.generation_pb2 import GenerateEvent, GenerateRequest
from ....proto.rpc.transport import MIB
from ...client.client import Answer, Client, build_request
from ...client.measures import Figures, figures_of
from ...config import ClusterConfig
from ...launch.progress import StartProgress
from ...launch.ray_cluster import RayCluster
from ...launch.supervisor import Supervisor
from ..terminal.columns import print_lines, table_lines
from .prompts import AT_ONCE, ONE_BY_ONE, DemoRequest

Row = tuple[DemoRequest, Figures]
WIDTH = 80  # of what is printed, answers excepted
NOTES = (
    "Handover: from the first token's sampling on the prefill worker to its arrival",
    "at the client. Sent early: share of the bytes sent before the prompt was done.",
)


def run_demo(settings: ClusterConfig, *, as_json: bool = False) -> int:
    """Runs the whole demo; the exit code. Answers go to stderr where stdout is for JSON."""
    return asyncio.run(_Demo(settings, as_json=as_json).run())


class _Demo:
    def __init__(self, settings: ClusterConfig, *, as_json: bool) -> None:
        self._settings = settings
        self._as_json = as_json
        self._console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False)
        self._begun_s = time.monotonic()

    async def run(self) -> int:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        shown = StartProgress()
        supervisor = Supervisor(self._settings, RayCluster(self._settings), shown.step)
        try:
            with shown:
                gateway = await supervisor.start()
            async with Client(gateway.address) as client:
                rows = await self._requests(client)
            self._report(rows)
        finally:
            await supervisor.stop(0)
        return 0

    async def _requests(self, client: Client) -> list[Row]:
        rows: list[Row] = []
        for request in ONE_BY_ONE:
            answer = await self._stream(client, request)
            if not rows:
                took_s = answer.arrivals_unix_ns[0] / 1e9 - time.time() + time.monotonic() - self._begun_s
                self._console.print(f"[dim](first token {took_s:.1f} s after the command)[/]")
            rows.append((request, figures_of(answer)))
        return [*rows, *await self._together(client, AT_ONCE)]

    async def _stream(self, client: Client, request: DemoRequest) -> Answer:
        """One request, its answer printed as it comes."""
        self._console.print(f"\n[bold cyan]{request.title}[/]  [dim]{_shortened(request)}[/]", soft_wrap=True)

        def show(event: GenerateEvent) -> None:
            self._console.print(Text(event.text), end="", soft_wrap=True)

        answer = await client.answer(_message(request), on_event=show)
        self._console.print()
        return answer

    async def _together(self, client: Client, requests: Sequence[DemoRequest]) -> list[Row]:
        """Several requests at once, each in a panel of its own."""
        self._console.print(f"\n[bold cyan]{len(requests)} at once[/]")
        texts = [Text() for _ in requests]

        async def run(request: DemoRequest, text: Text) -> Answer:
            return await client.answer(_message(request), on_event=lambda event: text.append(event.text))

        pairs = list(zip(requests, texts, strict=True))
        if not self._console.is_terminal:  # nobody watches them grow
            answers = await asyncio.gather(*(run(request, text) for request, text in pairs))
            for request, text in pairs:
                self._console.print(f"\n{request.title}", text, sep="\n", soft_wrap=True)
            return [(request, figures_of(answer)) for request, answer in zip(requests, answers, strict=True)]
        panels = Group(*(Panel(text, title=request.title) for request, text in pairs))
        with Live(panels, console=self._console, refresh_per_second=10):
            answers = await asyncio.gather(*(run(request, text) for request, text in pairs))
        return [(request, figures_of(answer)) for request, answer in zip(requests, answers, strict=True)]

    def _report(self, rows: Sequence[Row]) -> None:
        if self._as_json:
            print(json.dumps([{"request": request.title, **asdict(figures)} for request, figures in rows]))
            return
        settings = self._settings
        self._console.print()
        print_lines(_table(rows), self._console)
        for line in (f"{settings.model}, codec {settings.codec}.", *NOTES):
            self._console.print(Text(line, style="dim"), soft_wrap=not self._console.is_terminal)


def _message(request: DemoRequest) -> GenerateRequest:
    sampling = {"temperature": 0, "max_tokens": request.max_tokens}
    if request.chat:
        return build_request(chat=[{"role": "user", "content": request.text}], sampling=sampling)
    return build_request(prompt=request.text, sampling=sampling)


def _shortened(request: DemoRequest) -> str:
    text, room = " ".join(request.text.split()), WIDTH - len(f"{request.title}  ")
    half = (room - len(" ... ")) // 2
    return text if len(text) <= room else f"{text[:half]} ... {text[-half:]}"


def _table(rows: Sequence[Row]) -> list[Text]:
    titles = (
        *("request", "prompt\ntokens", "output\ntokens", "TTFT\nms", "ITL ms\np50/p99", "handover\nms"),
        *("MiB\nbf16", "MiB\nsent", "ratio", "sent\nearly"),
    )
    return table_lines(titles, map(_cells, rows), right=titles[1:])


def _cells(row: Row) -> list[str]:
    request, figures = row
    early = figures.sent_before_prefill_end
    return [
        request.title.replace(" ", "-"),
        str(figures.prompt_tokens),
        str(figures.output_tokens),
        _number(figures.ttft_ms, 0),
        f"{_short(figures.itl_p50_ms)}/{_short(figures.itl_p99_ms)}",
        _number(figures.handover_ms, 1),
        _number(figures.kv_bytes_bf16 / MIB, 2),
        _number(figures.kv_bytes_wire / MIB, 2),
        _number(figures.ratio, 2, "x"),
        _number(None if early is None else 100 * early, 0, "%"),
    ]


def _short(ms: float | None) -> str:
    return _number(ms, 1 if ms is None or ms < 100 else 0)


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"
