"""Inputs of an earlier run, sent again."""

import random
from pathlib import Path

from .calls import ask
from .files import Parsers
from .fleet import Fleet
from .fuzzer import Fuzzer
from .inputs import Input, Outcome
from .sockets import deliver


async def replay(path: Path, fleet: Fleet, outcome: Outcome, parsers: Parsers, fuzzer: Fuzzer) -> None:
    """Sends each input of a file to where it went; pages that lie are drawn again, from the run's seed."""
    for line in path.read_text().splitlines():
        made = Input.of_line(line)
        rng = random.Random(f"{outcome.seed}:{made.number}")
        if made.kind == "frames":
            await fuzzer.lie_again(made.number)
            continue
        outcome.sent(made)
        if made.kind == "file":
            await parsers.read_again(made)
            continue
        address = fleet.address_of(made.target)
        if made.kind == "rpc":
            method = next(method for method in fleet.methods if method.path == made.what)
            status, details = await ask(fleet, outcome, fleet.channel(address), method, made, rng)
            outcome.statuses[status] += 1
            outcome.statuses[f"{made.what}: {status}: {details[:100]}"] += 1
        elif made.kind in ("http2", "raw"):
            await deliver(fleet, address, made.data, rng, inside=made.kind == "http2")
