"""What lies outside the program: a disk that is full or read-only, and a clock that jumps."""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import Pair, worker_pair
from models import model_path

from isthmus.proto.sampling import Sampling

GREEDY = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
SEEDED = Sampling(temperature=0.8, seed=7, max_tokens=40, ignore_eos=True)
RNG = random.Random(1)
PROMPTS = [[RNG.randrange(3, 500) for _ in range(300)] for _ in range(6)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a page or two."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("making a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def answers(pair: Pair) -> list[list[int]]:
    return [(await pair.generate(prompt, GREEDY, "tq-k4v4")).token_ids for prompt in PROMPTS]


async def until_counted(pair: Pair, name: str) -> None:
    """Returns once a counter of the prefill worker is not zero."""
    async with asyncio.timeout(10):
        while not pair.prefill.server.report().counters[name]:
            await asyncio.sleep(0.02)


async def test_a_full_disk_costs_the_store_only(small_disk: Path) -> None:
    async with worker_pair(model_path("tiny-llama"), prefill={"store_dir": str(small_disk / "pages")}) as pair:
        first = await answers(pair)
        await until_counted(pair, "store_write_errors")
        assert await answers(pair) == first
    async with worker_pair(model_path("tiny-llama")) as pair:
        assert await answers(pair) == first


async def test_a_disk_that_turns_read_only_is_read_on(small_disk: Path) -> None:
    settings = {"store_dir": str(small_disk / "pages")}
    async with worker_pair(model_path("tiny-llama"), prefill=settings) as pair:
        first = await answers(pair)
        await until_counted(pair, "store_writes")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    async with worker_pair(model_path("tiny-llama"), prefill=settings) as pair:
        assert await answers(pair) == first
        assert pair.prefill.server.report().counters["store_hits"]


def jumping_clock(seed: int) -> SimpleNamespace:
    """The module `time`, but for a wall clock that jumps by days at each look. Clocks that only go on stay as they are.

    gRPC keeps the real one: with a deadline it looks twice, and here the two looks would be days apart.
    """
    rng = random.Random(seed)
    clock = SimpleNamespace(**vars(time))
    clock.time = lambda: time.time() + rng.uniform(-1e6, 1e6)
    clock.time_ns = lambda: time.time_ns() + rng.randrange(-(10**15), 10**15)
    return clock


async def test_a_clock_that_jumps_matters_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        calm = [(await pair.generate(prompt, SEEDED, "tq-k4v4")).token_ids for prompt in PROMPTS]
        ours = [module for name, module in sys.modules.items() if name.startswith("isthmus.")]
        users = [module for module in ours if getattr(module, "time", None) is time]
        assert len(users) > 5
        for module in users:
            monkeypatch.setattr(module, "time", jumping_clock(2))
        rough = await asyncio.gather(*(pair.generate(prompt, SEEDED, "tq-k4v4") for prompt in PROMPTS))
        assert [answer.token_ids for answer in rough] == calm
        await pair.baseline()
