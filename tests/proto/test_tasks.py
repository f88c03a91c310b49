"""Background tasks: an exception is logged with its trace, counted, and followed by another try or by its owner."""

import asyncio
import logging

import pytest

from isthmus.proto import tasks as module
from isthmus.proto.tasks import Tasks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(module, "LAST_PAUSE_S", 0.002)


class Loop:
    """Raises so many times, and then runs until it is cancelled."""

    def __init__(self, failures: int) -> None:
        self.left, self.tries = failures, 0
        self.steady = asyncio.Event()

    async def run(self) -> None:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise ValueError("boom")
        self.steady.set()
        await asyncio.Event().wait()


async def test_a_loop_that_raises_goes_on_and_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    tasks, loop = Tasks(), Loop(2)
    with caplog.at_level(logging.ERROR):
        task = tasks.start("looks", loop.run, about="at 7")
        await asyncio.wait_for(loop.steady.wait(), 10)
    assert (loop.tries, tasks.failures, tasks.failing) == (3, {"looks": 2}, [])
    assert task.get_name() == "looks at 7"
    assert "ValueError: boom" in caplog.text
    await tasks.stop()
    assert task.cancelled()


async def test_a_loop_that_raises_again_and_again_is_failing_until_it_is_steady(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, loop, other = Tasks(), Loop(1000_000), Loop(1000_000)
    tasks.start("looks", loop.run)
    tasks.start("minor", other.run, vital=False)
    while tasks.failing != ["looks"] or other.tries < 10:
        await asyncio.sleep(0.001)
    loop.left = 0
    await asyncio.wait_for(loop.steady.wait(), 10)
    assert tasks.failing == ["looks"]  # it has only just begun
    monkeypatch.setattr(module, "STEADY_S", 0.0)
    assert tasks.failing == []
    await tasks.stop()


async def test_an_end_is_an_end() -> None:
    async def once() -> None:
        pass

    tasks = Tasks()
    await tasks.start("short", once)
    await asyncio.sleep(0)
    assert tasks._running == {}
    assert not tasks.failures


async def test_a_cancellation_that_nobody_asked_for_is_a_failure() -> None:
    async def cancelled_elsewhere() -> None:
        if loop.tries == 0:
            loop.tries += 1
            other = asyncio.ensure_future(asyncio.Event().wait())
            other.cancel()
            await other
        await loop.run()

    tasks, loop = Tasks(), Loop(0)
    tasks.start("looks", cancelled_elsewhere)
    await asyncio.wait_for(loop.steady.wait(), 10)
    assert tasks.failures == {"looks": 1}
    await tasks.stop()


async def test_who_waits_for_one_try_is_told() -> None:
    told: list[Exception] = []
    tasks = Tasks()
    await tasks.once("once", Loop(1).run, on_failure=told.append)
    assert [str(error) for error in told] == ["boom"]
    assert tasks.failures == {"once": 1}
