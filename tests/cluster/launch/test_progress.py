"""What is shown of a start while it goes on."""

import asyncio
import re
import time

import pytest

from isthmus.cluster.launch import progress
from isthmus.cluster.launch.worker_thread import activity
from isthmus.kernels.cpu import compiled
from isthmus.kvtransfer.calibration.progress import noted
from isthmus.model import phases
from isthmus.proto.errors import Unavailable


async def test_what_a_start_is_at_is_asked_and_told_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    said, told, started = iter(("reading weights", "packing weights")), list[str](), asyncio.Event()

    async def doing() -> str:
        try:
            return next(said)
        except StopIteration:
            started.set()
            raise Unavailable("the worker cannot be reached") from None

    async def start() -> str:
        await started.wait()
        return "10.0.0.7:7001"

    assert await progress.with_activity(start(), doing, told.append) == "10.0.0.7:7001"
    assert told == ["reading weights", "packing weights"]


async def test_what_a_start_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.01)

    async def start() -> None:
        await asyncio.sleep(0.03)
        raise Unavailable("no room")

    async def doing() -> str:
        return ""

    with pytest.raises(Unavailable, match="no room"):
        await progress.with_activity(start(), doing, lambda doing: None)


def test_a_long_step_has_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for what it is at each LINE_S, none for what was said already; none at all of a step that is short."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(progress, "LINE_S", 0.05)
    with progress.StartProgress() as shown, shown.step("decode-0") as set_activity:
        set_activity("reading weights")
        time.sleep(0.06)
        for doing in ("", "compiling kernels [once]", "compiling kernels [once]", "packing weights"):
            set_activity(doing)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "… decode-0: compiling kernels [once] (0 s)"
    assert len(lines) == 2 and re.fullmatch(r"✓ decode-0 \(0\.\d s\)", lines[1])


async def test_an_order_that_takes_long_has_lines_and_a_short_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    monkeypatch.setattr(progress, "LINE_S", 0.05)
    lines = list[str]()

    async def doing() -> str:
        return "decode-1 is draining, 3 requests"

    async def work(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    assert await progress.with_lines(work(0.02), doing, lines.append) == "done"
    assert lines == []
    assert await progress.with_lines(work(0.2), doing, lines.append) == "done"
    assert lines and set(lines) == {"… decode-1 is draining, 3 requests"}


def test_what_a_worker_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert activity() == ""
    with phases.phase("imports"):
        assert activity() == "importing PyTorch and transformers"
    with phases.phase("load"):
        assert activity() == "reading weights"
    with phases.phase("balance"):
        assert activity() == "reading the calibration"
        with noted() as report_progress:
            report_progress(3, 12)
            assert activity() == "calibrating the tq- codecs for this model, once: 25%"
    with phases.phase("speed_up"):
        assert activity() == "packing weights"
        monkeypatch.setattr(compiled, "is_compiling", lambda: True)
        assert activity() == "compiling kernels for this CPU, once"
    assert activity() == ""
