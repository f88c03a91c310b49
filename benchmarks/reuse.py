"""What a shared prefix saves: `python benchmarks/reuse.py --json reuse.json`.

Measures the time to the first token of prompts that begin with the same 2,000 tokens, whose KV is

    recompute             nowhere yet: the prefill worker computes the whole prompt
    decode_held           in the decode worker's pages: it computes the rest itself
    prefill_held          in the prefill worker's caches: it computes the rest and sends all pages to a decode worker
                          that has none of them
    store_after_restart   in the page store only: both workers were restarted

Starts the workers as processes of their own and speaks to the decode worker as the gateway does, so that the place is
this benchmark's choice and not the router's. Each request has an ending of its own behind the prefix, of 24 tokens and,
with other prefixes, of 8: the shorter one leaves little to compute, so that what else a hit costs shows.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from support.dialling import to_worker
from support.processes import ready, worker
from support.report import Report, conditions, each

from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto.common_pb2 import TransferStats
from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.sampling import Sampling

PREFIX_TOKENS, ENDINGS = 2000, (24, 8)  # of the first one are the figures at the top of the JSON
GOALS = {"decode_held": 20.0, "prefill_held": 15.0, "store_after_restart": 10.0}
PLACES = ("recompute", *GOALS)
START_S = 300.0  # for both workers to load the model
STORE_S = 30.0  # for the store to write what the prefill worker has sent


@dataclass
class Pair:
    """A prefill and a decode worker that run."""

    prefill: str
    stub: Any
    fingerprint: str
    vocab_size: int

    async def first_token(self, prompt: Sequence[int], codec: str, *, local: bool) -> tuple[float, TransferStats]:
        """Milliseconds to the first token of a prompt, and what its transfer says. `local`: with no prefill worker."""
        request = DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"reuse-{time.monotonic_ns()}",
            model_fingerprint=self.fingerprint,
            codec=codec,
            prompt_token_ids=prompt,
            sampling=Sampling(temperature=0, max_tokens=2, ignore_eos=True).to_pb(),
            prefill_addresses=[] if local else [self.prefill],
        )
        begun, took, stats = time.perf_counter(), 0.0, TransferStats()
        async for event in self.stub.Generate(request, timeout=300):
            took = took or (time.perf_counter() - begun) * 1e3
            if event.HasField("transfer"):
                stats = event.transfer
        return took, stats


@asynccontextmanager
async def pair_of(prefill: str, decode: str) -> AsyncIterator[Pair]:
    """Two workers, warmed up with prompts that share nothing with any other."""
    reports = await ready([prefill, decode], START_S)
    about = reports[1].model
    async with to_worker(decode, "decode") as channel:
        pair = Pair(prefill, DecodeStub(channel), about.fingerprint, about.vocab_size)
        rng = random.Random(time.monotonic_ns())
        for local in (False, True):
            warm = [rng.randrange(about.vocab_size) for _ in range(300)]
            await pair.first_token(warm, reports[0].default_codec, local=local)
        yield pair


def make_prompt(vocab_size: int, number: int, place: str, ending_tokens: int) -> list[int]:
    """The prefix of that number for that length of endings, and an ending for that place."""
    prefix = random.Random(f"prefix {number} of {ending_tokens}")
    ending = random.Random(f"{place} {number}")
    return [
        *(prefix.randrange(vocab_size) for _ in range(PREFIX_TOKENS)),
        *(ending.randrange(vocab_size) for _ in range(ending_tokens)),
    ]


@dataclass
class Measured:
    """Of one place and length of endings, a figure for each prefix."""

    ttft_ms: list[float] = field(default_factory=list)
    stats: list[TransferStats] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return round(statistics.median(self.ttft_ms), 1)

    def tokens(self) -> dict[str, float]:
        """Where the prompt's tokens came from."""
        fields = ("held_tokens", "cached_tokens", "stored_tokens", "local_tokens")
        return {name: statistics.median(getattr(one, name) for one in self.stats) for name in fields}


async def measure(pair: Pair, place: str, codec: str, requests: int) -> dict[int, Measured]:
    """One request for each prefix; by length of the ending."""
    measured = {ending: Measured() for ending in ENDINGS}
    for number in each(range(requests), place):
        for ending, of in measured.items():
            prompt = make_prompt(pair.vocab_size, number, place, ending)
            took, transfer = await pair.first_token(prompt, codec, local=place == "decode_held")
            of.ttft_ms.append(took)
            of.stats.append(transfer)
    return measured


async def stored(folder: Path, pages: int) -> None:
    """Waits until the store has so many pages; TimeoutError where that takes too long."""
    async with asyncio.timeout(STORE_S):
        while sum(path.is_file() for path in folder.glob("*/??/*")) < pages:
            await asyncio.sleep(0.1)


async def run(report: Report, model: str, dtype: str, codec: str, requests: int) -> None:
    """All places in turn."""
    measured: dict[str, dict[int, Measured]] = {}
    with tempfile.TemporaryDirectory() as store:

        async def at(pair: Pair, place: str) -> None:
            measured[place] = await measure(pair, place, codec, requests)
            report.put(ttft_ms={name: of[ENDINGS[0]].median_ms for name, of in measured.items()})

        with worker("prefill", model, dtype, 1, "--store-dir", store) as prefill:
            with worker("decode", model, dtype, 1) as decode:
                async with pair_of(prefill, decode) as pair:
                    await at(pair, "recompute")
                    await at(pair, "decode_held")
            with worker("decode", model, dtype, 1) as decode:
                async with pair_of(prefill, decode) as pair:
                    await at(pair, "prefill_held")
            await stored(Path(store), len(ENDINGS) * requests * (PREFIX_TOKENS // 64))
        with (
            worker("prefill", model, dtype, 1, "--store-dir", store) as prefill,
            worker("decode", model, dtype, 1) as decode,
        ):
            async with pair_of(prefill, decode) as pair:
                await at(pair, "store_after_restart")
    by_ending = {ending: summarize({place: measured[place][ending] for place in PLACES}) for ending in ENDINGS}
    report.put(**by_ending[ENDINGS[0]], goals=GOALS, by_ending_tokens=by_ending)


def summarize(measured: dict[str, Measured]) -> dict[str, Any]:
    """The figures of one length of endings."""
    ttft = {place: of.median_ms for place, of in measured.items()}
    return {
        "ttft_ms": ttft,
        "times_faster": {place: round(ttft["recompute"] / ttft[place], 1) for place in GOALS},
        "tokens": {place: of.tokens() for place, of in measured.items()},
        "all_ttft_ms": {place: [round(one, 1) for one in of.ttft_ms] for place, of in measured.items()},
    }


def main(
    model: Annotated[str, typer.Option(help="What the workers serve.")] = "smollm2-135m",
    requests: Annotated[int, typer.Option(min=1, help="How many prefixes, each once in every place.")] = 5,
    codec: Annotated[str, typer.Option(help="Of the KV transfer.")] = "tq-k4v4",
    dtype: Annotated[str, typer.Option(help="Of weights and KV.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Measures the time to the first token with a prefix of 2,000 tokens held in each place, against recompute."""
    with Report(json) as report:
        about = conditions(
            model=model,
            codec=codec,
            dtype=dtype,
            requests=requests,
            prefix_tokens=PREFIX_TOKENS,
            ending_tokens=ENDINGS,
            threads_per_worker=1,
        )
        report.put(conditions=about)
        asyncio.run(run(report, model, dtype, codec, requests))


if __name__ == "__main__":
    typer.run(main)
