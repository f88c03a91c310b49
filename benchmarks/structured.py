"""Whether structured output is what was asked for, and what it costs.

    .venv/bin/python benchmarks/structured.py --json OUT.json

First answers to JSON schemas, random ones and hard ones, of a small model with random weights, in a cluster within
this process; with --kill-every decode workers are killed meanwhile. Each finished answer is checked by `jsonschema`;
one that comes to its last token before its end is none (`unfinished`). A schema that the gateway refuses is counted.

Then the masks of --model's vocabulary: what one takes to compute and to apply for each token of a request, of schemas
with values in them, and what a decode step takes with and without, at --batch requests.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("ISTHMUS_TLS", "off")

import grpc
import jsonschema
import numpy as np
from support.help import Paragraphs
from support.in_process import InProcess, in_process
from support.report import Count, Report, conditions, say
from support.schemas import HARD_SCHEMAS, Schema, random_schemas
from support.tiny_model import make_tiny, tiny_config

from isthmus.cluster.client.client import build_request
from isthmus.decode.pool.dense import DenseKvPool
from isthmus.decode.runner import DecodeRunner
from isthmus.decode.sequence import DecodeSequence, TokenStream
from isthmus.kvtransfer.codecs.registry import build_codec
from isthmus.model.grammar.constraint import Constraint
from isthmus.model.grammar.masking import MaskThread
from isthmus.model.load.loader import load_model
from isthmus.model.model import Model
from isthmus.model.sampling import SampledToken, sample
from isthmus.proto.common_pb2 import FINISH_REASON_EOS, Grammar
from isthmus.proto.grammar import Grammar as GrammarValue
from isthmus.proto.sampling import Sampling
from isthmus.worker.grammars import GrammarCompiler
from isthmus.worker.step_plan import SequenceId, SequencePlan, StepBatch

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": "string"}}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
_PEOPLE = {"type": "array", "items": _PERSON, "minItems": 1000}  # no output ends while it is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--model", default="smollm2-135m", help="whose vocabulary the masks are measured with")
    parser.add_argument("--schemas", type=int, default=200, help="finished answers to random schemas")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-every", type=float, help="seconds between two kills of a decode worker; default: none")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="decode steps of each kind; 0: no measurement of masks")
    parser.add_argument("--work", type=Path, default=Path("/tmp/isthmus-structured"), help="for the small model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with Report(options.json) as report:
        report.put(**conditions(model=options.model, seed=options.seed, kill_every_s=options.kill_every))
        if options.schemas:
            asyncio.run(ask_all(report, options))
        if options.steps:
            report.put(**mask_cost(load_model(options.model), options.batch, options.steps, options.seed))


async def ask_all(report: Report, options: argparse.Namespace) -> None:
    """Until so many answers to random schemas were finished, and all hard ones were tried."""
    folder = options.work / "tiny-llama"
    if not folder.exists():
        make_tiny(tiny_config("llama", {}), folder)
    hard = [(f"hard: {name}", schema) for name, schema in HARD_SCHEMAS.items()]
    drawn = [("random", schema) for schema in random_schemas(3 * options.schemas, options.seed)]
    counts, count = Counter[str](), Count("finished answers to random schemas", options.schemas)
    waiting = asyncio.Semaphore(options.batch)

    async def ask(number: int, name: str, schema: Schema) -> None:
        kind = name.partition(":")[0]
        async with waiting:
            if kind == "random" and counts["random finished"] >= options.schemas:
                return
            outcome = await ask_one(running, schema, number)
        counts[f"{kind} {outcome}"] += 1
        if outcome in ("valid", "invalid"):
            counts[f"{kind} finished"] += 1
        if outcome == "invalid":
            report.append("invalid", {"name": name, "schema": schema, "seed": number})
        count.reach(min(options.schemas, counts["random finished"]))

    async with in_process(str(folder)) as running:
        killer = asyncio.create_task(kill_often(running, options.kill_every)) if options.kill_every else None
        try:
            await asyncio.gather(*(ask(number, *item) for number, item in enumerate([*hard, *drawn])))
        finally:
            if killer is not None:
                killer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await killer
        counts["decode workers killed"] = running.killed
    report.put(
        json_valid=counts["random valid"] + counts["hard valid"],
        json_total=counts["random finished"] + counts["hard finished"],
        answers=dict(sorted(counts.items())),
    )


async def kill_often(running: InProcess, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        await asyncio.shield(running.kill_busy())


async def ask_one(running: InProcess, schema: Schema, number: int) -> str:
    """valid, invalid, unfinished or refused."""
    sampling = {"grammar": Grammar(json_schema=json.dumps(schema)), "seed": number, "max_tokens": 600}
    request = build_request(token_ids=[number % 250 + 3, 7, 8, 9], sampling=sampling)
    try:
        answer = await running.client.answer(request, timeout_s=300)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise
        say(f"refused: {error.details()}")
        return "refused"
    if answer.finish_reason != FINISH_REASON_EOS:
        return "unfinished"
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    try:
        return "valid" if checker.is_valid(json.loads(answer.text)) else "invalid"
    except ValueError:
        return "invalid"


def mask_cost(model: Model, batch: int, steps: int, seed: int) -> dict[str, Any]:
    """Microseconds of a mask for a token, computed by itself; milliseconds of a decode step, with and without."""
    compiler, grammar = GrammarCompiler(model), GrammarValue(kind="json_schema", text=json.dumps(_PEOPLE))
    ready_ms = _ms(lambda: compiler.compile(grammar))
    compile_ms = _ms(lambda: compiler.compile(GrammarValue(kind="json_object")))
    took_ms = list[float]()
    for number in range(batch):
        took_ms += _mask_ms(compiler.compile(grammar), random.Random(seed + number))
    plain, masked = _step_ms(model, [compiler.compile(grammar) for _ in range(batch)], steps)
    return {
        "mask_us_per_token": round(1e3 * sum(took_ms) / len(took_ms), 1),
        "mask_us": {"p50": round(1e3 * median(took_ms), 1), "most": round(1e3 * max(took_ms), 1)},
        "first_compile_ms": round(ready_ms, 1),
        "compile_ms": round(compile_ms, 2),
        "batch": batch,
        "step_ms": {"plain": round(plain, 2), "masked": round(masked, 2)},
        "step_more": round(masked / plain - 1, 4),
    }


def _ms(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began_s)


def _mask_ms(constraint: Constraint, draw: random.Random) -> list[float]:
    """Of the tokens of one output, each drawn from those that may come."""
    took_ms, output = list[float](), list[int]()
    while len(took_ms) < 200:
        took_ms.append(_ms(lambda: constraint.allowed(output)))
        output.append(_draw(constraint, output, draw))
    return took_ms


def _draw(constraint: Constraint, output: list[int], draw: random.Random) -> int:
    bits_W = constraint.allowed(output)
    assert bits_W is not None
    return int(draw.choice(np.flatnonzero(np.unpackbits(bits_W.view(np.uint8), bitorder="little"))))


def _step_ms(model: Model, constraints: list[Constraint], steps: int) -> tuple[float, float]:
    """Medians of a step without masks and with them, by turns: the forward and the sampling pass.

    Outputs stay within the grammar in both, and steps of the two kinds have equally long ones.
    """
    codec, page, context = build_codec("raw", model.layers, 64), 64, 256
    batch, tokens = len(constraints), context + 2 * steps + 8
    pool = DenseKvPool(model, lambda _: codec, batch * -(-tokens // page), page, cached_pages=0)
    runner = DecodeRunner(model, pool, before_layer=lambda: None)
    sampling = Sampling(temperature=0.8, max_tokens=tokens - context, min_tokens=tokens - context)
    sequences = [
        DecodeSequence(SequenceId(number), [5] * context, sampling, codec, TokenStream(), constraint=constraint)
        for number, constraint in enumerate(constraints)
    ]
    draws = [random.Random(number) for number in range(batch)]
    for sequence, constraint, draw in zip(sequences, constraints, draws, strict=True):
        assert pool.allocate(sequence, tokens, tokens)
        sequence.output.append(_draw(constraint, [], draw))
    masks, took_ms = MaskThread("benchmark"), {False: list[float](), True: list[float]()}
    for masked in [False, True] * (steps + 2):
        took_ms[masked].append(_ms(partial(_step, runner, pool, sequences, masks if masked else None)))
        for sequence in sequences:
            sequence.computed = sequence.length
        assert not pool.finish_step([(sequence, sequence.computed) for sequence in sequences])
        for sequence, constraint, draw in zip(sequences, constraints, draws, strict=True):
            sequence.output.append(_draw(constraint, sequence.output, draw))
    return median(took_ms[False][2:]), median(took_ms[True][2:])


def _step(
    runner: DecodeRunner, pool: DenseKvPool, sequences: list[DecodeSequence], masks: MaskThread | None
) -> list[SampledToken]:
    plans = tuple(SequencePlan(s.id, s.length - 1, s.length, len(s.prompt), samples=True) for s in sequences)
    token_ids = tuple((sequence.output[-1],) for sequence in sequences)
    pages = tuple(pool.step_pages(sequence, sequence.length) for sequence in sequences)
    if masks is not None:
        masks.begin((sequence.constraint, sequence.output) for sequence in sequences)
    logits_RV = runner.run(StepBatch(plans, token_ids, pages))
    rows = [sequence.sample_row(frozenset()) for sequence in sequences]
    return sample(logits_RV, rows if masks is not None else [replace(row, constraint=None) for row in rows])


if __name__ == "__main__":
    main()
