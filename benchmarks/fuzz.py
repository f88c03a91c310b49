"""Inputs that nobody means well, to a cluster of real processes: `benchmarks/fuzz.py --minutes 10 --json fuzz.json`.

Bytes and HTTP/2 at every port, requests to every RPC, pages from a prefill worker that lies, files that are none. Every
other request is a good one, whose tokens are known. The cluster's processes are others than this one: who dies is told.

No process may die or fall silent, no call be answered UNKNOWN or INTERNAL, no log tell of a bug; good requests get
their tokens in time; and in the end no page, request or connection is held. What broke something is kept
(`--keep FOLDER`), and sent again by `--replay FILE`. Exit status 1 where anything was wrong.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fuzzing.files import Parsers
from fuzzing.fleet import Fleet, running_fleet
from fuzzing.frames import LyingPrefill
from fuzzing.fuzzer import SHARES, Fuzzer
from fuzzing.inputs import Outcome
from fuzzing.replay import replay
from fuzzing.watching import bugs_in_logs, probe, watch
from support.help import Paragraphs
from support.report import Report, conditions, say
from support.tiny_model import make_tiny, tiny_config

SAY_S = 10.0
WARM = 0.2  # of the time, after which memory must not grow


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="", help="default: a small one with random weights that is made for it")
    parser.add_argument("--kinds", default=",".join(SHARES), help="of: " + ", ".join(SHARES))
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that broke something"
    )
    parser.add_argument(
        "--replay", type=Path, help="send the inputs of this file, and nothing else; with the --seed of that run"
    )
    return parser.parse_args()


@asynccontextmanager
async def lying(fleet: Fleet, seed: int) -> AsyncIterator[LyingPrefill]:
    """A prefill worker that lies, in front of a real one, with a certificate that is right."""
    liar = LyingPrefill(fleet.main.of("prefill")[0].address, seed, fleet.doors.transport())
    await liar.start()
    try:
        yield liar
    finally:
        await liar.stop()


async def fuzz(options: argparse.Namespace, report: Report, folder: Path) -> Outcome:
    """A whole run: a cluster is started, fuzzed, and must be as it was before."""
    tiny = folder / "tiny"
    make_tiny(tiny_config("llama", {}), tiny)
    outcome = Outcome(options.seed, options.keep)
    (folder / "logs").mkdir()
    async with running_fleet(options.model or str(tiny), folder / "logs") as fleet:
        parsers = Parsers(tiny, folder, outcome)
        async with lying(fleet, options.seed) as liar:
            fuzzer = Fuzzer(fleet, outcome, parsers, liar)
            await fuzzer.learn()
            # A connection to each port, so that one more is one too many.
            await asyncio.gather(*(fleet.channel(address).channel_ready() for address in fleet.probes))
            await asyncio.gather(*(probe(fleet, node, outcome) for node in fleet.nodes))
            before, connections = fleet.rss_mb(), fleet.connections()
            watching = asyncio.create_task(watch(fleet, outcome))
            try:
                if options.replay:
                    await replay(options.replay, fleet, outcome, parsers, fuzzer)
                    await fuzzer.good(0)
                else:
                    await run_for(fuzzer, fleet, outcome, report, options)
            finally:
                watching.cancel()
                await asyncio.wait({watching})
                await parsers.stop()
        outcome.failures += await fleet.left_behind()
        outcome.failures += await more_connections(fleet, connections)
        report.put(files=dict(sorted(parsers.answers.items())))
        put(report, outcome, fleet, before)
    outcome.failures += bugs_in_logs(folder / "logs")
    put(report, outcome, None, before)
    return outcome


async def more_connections(fleet: Fleet, before: dict[str, int], within_s: float = 20) -> list[str]:
    """Processes that hold more connections than at first, after at most `within_s`."""
    end = time.monotonic() + within_s
    while True:
        now = fleet.connections()
        more = [
            f"{name} has {now[name]} connections, {count} at first"
            for name, count in before.items()
            if now[name] > count
        ]
        if not more or time.monotonic() > end:
            return more
        await asyncio.sleep(0.5)


async def run_for(fuzzer: Fuzzer, fleet: Fleet, outcome: Outcome, report: Report, options: argparse.Namespace) -> None:
    """Fuzzes for the time that was asked for, and tells how far it is."""
    seconds = 60 * options.minutes
    begun_s = time.monotonic()
    kinds = {kind: SHARES[kind] for kind in options.kinds.split(",")}
    running = asyncio.create_task(fuzzer.run(begun_s + seconds, kinds))
    said_s = begun_s
    while not running.done():
        await asyncio.wait({running}, timeout=1)
        now = time.monotonic()
        if "rss_mb" not in report.figures and now - begun_s >= WARM * seconds:
            report.put(rss_mb={"start": sum(fleet.rss_mb().values())}, rss_mb_by_process={"start": fleet.rss_mb()})
        if now - said_s >= SAY_S:
            said_s = now
            good = outcome.good
            say(
                f"{outcome.inputs.total()} inputs, {good['answered']} of {good['asked']} good requests; "
                f"{len(outcome.crashes)} crashes, {len(outcome.hangs)} hangs, {len(outcome.failures)} other failures; "
                f"resident MB {fleet.rss_mb()}"
            )
    await running


def put(report: Report, outcome: Outcome, fleet: Fleet | None, before: dict[str, int]) -> None:
    """The figures of a run."""
    if fleet is not None:
        now, start = fleet.rss_mb(), report.figures.get("rss_mb", {"start": sum(before.values())})
        by_process = report.figures.get("rss_mb_by_process", {})
        report.put(rss_mb=start | {"end": sum(now.values())})
        report.put(rss_mb_by_process=by_process | {"before": before, "end": now})
    done: dict[str, dict[str, int]] = {}
    for (kind, what), count in sorted(outcome.done.items()):
        done.setdefault(kind, {})[what] = count
    report.put(
        inputs=outcome.inputs.total(),
        crashes=len(outcome.crashes),
        hangs=len(outcome.hangs),
        wrong_tokens=outcome.wrong_tokens,
        good=dict(outcome.good),
        statuses=dict(outcome.statuses),
        by_kind=dict(outcome.inputs),
        done=done,
        told={
            "crashes": outcome.crashes[:20],
            "hangs": outcome.hangs[:20],
            "failures": outcome.failures[:50],
            "other_failures": len(outcome.failures),
        },
    )


def main() -> None:
    options = arguments()
    if unknown := set(options.kinds.split(",")) - set(SHARES):
        raise SystemExit(f"no kind {', '.join(unknown)}; allowed: {', '.join(SHARES)}")
    own = {name: str(value) for name, value in vars(options).items() if name in ("minutes", "seed", "model", "kinds")}
    with Report(options.json) as report, tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        report.put(conditions=conditions(**own))
        os.environ["XDG_STATE_HOME"] = folder  # a CA of its own
        os.environ["ISTHMUS_RUNTIME"] = f"{folder}/sockets"
        os.environ.pop("ISTHMUS_TLS", None)
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each write to a peer that hung up
        outcome = asyncio.run(fuzz(options, report, Path(folder)))
    if outcome.crashes or outcome.hangs or outcome.wrong_tokens or outcome.failures:
        print(json.dumps(report.figures["told"], indent=2), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
