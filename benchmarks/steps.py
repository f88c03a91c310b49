"""How long a decode step on the packed pool takes, replayed from a CUDA graph and launched kernel by kernel.

    .venv/bin/python benchmarks/steps.py --json OUT.json

Requests with made-up KV go through the decode worker's own runner; a step ends when its tokens are on the host. Both
kinds take turns in one run. Times are medians. On a CPU there is no graph: a filled-up step is compared with one that
is not.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from support.help import Paragraphs
from support.report import Report, conditions, each

from isthmus.decode.graphs import PaddedSteps, recorder
from isthmus.decode.pool.packed import PackedKvPool
from isthmus.decode.runner import DecodeRunner
from isthmus.decode.sequence import DecodeSequence, TokenStream
from isthmus.kvtransfer.codecs.tq import TqCodec
from isthmus.model.load.loader import load_model
from isthmus.model.model import Model
from isthmus.proto.sampling import Sampling
from isthmus.worker.step_plan import SequenceId, SequencePlan, StepBatch

PAGE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, action="append", help="requests of a step; default: 1, 8, 32")
    parser.add_argument("--context", type=int, default=1000, help="tokens of each request")
    parser.add_argument("--steps", type=int, default=50, help="of each kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with Report(options.json) as report:
        model = load_model(options.model, device=options.device)
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
        report.put(**conditions(model=options.model, device=device, context=options.context, steps=options.steps))
        for batch in each(options.batch or [1, 8, 32], "batches"):
            report.append("rows", compare(model, batch, options.context, options.steps))


def compare(model: Model, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step of each kind, of so many requests."""
    codec = TqCodec("tq-k4v4", model.layers, PAGE)
    tokens = context + 2 * steps + 4
    pool = PackedKvPool(model, codec, batch * -(-tokens // PAGE), PAGE, batch, cached_pages=0)
    padded = PaddedSteps(model, pool, most_tokens=batch)
    began_s = time.monotonic()
    padded.record(recorder(model.device) or (lambda call: call))
    record_s = time.monotonic() - began_s
    sequences = []
    for number in range(batch):
        sampling = Sampling(temperature=0, max_tokens=tokens - context, ignore_eos=True)
        sequence = DecodeSequence(SequenceId(number), [5] * context, sampling, codec, TokenStream(), output=[5])
        assert pool.allocate(sequence, tokens, tokens)
        sequences.append(sequence)
    kinds = {
        kind: DecodeRunner(model, pool, steps_of, before_layer=lambda: None)
        for kind, steps_of in (("graph", padded), ("plain", None))
    }
    times = {kind: list[float]() for kind in kinds}
    for kind, runner in [*kinds.items()] * (steps + 2):
        times[kind].append(step_s(runner, pool, sequences))
    result = {f"{kind}_ms": round(1e3 * median(of[2:]), 3) for kind, of in times.items()}
    return {"batch": batch, **result, "record_s": round(record_s, 1)}


def step_s(runner: DecodeRunner, pool: PackedKvPool, sequences: list[DecodeSequence]) -> float:
    """One greedy step; what comes after its tokens does not count."""
    plans = tuple(
        SequencePlan(sequence.id, sequence.length - 1, sequence.length, len(sequence.prompt), samples=True)
        for sequence in sequences
    )
    token_ids = tuple((sequence.output[-1],) for sequence in sequences)
    batch = StepBatch(plans, token_ids, tuple(pool.step_pages(sequence, sequence.length) for sequence in sequences))
    began_s = time.perf_counter()
    tokens = runner.run(batch).argmax(-1).tolist()
    took_s = time.perf_counter() - began_s
    for sequence, token in zip(sequences, tokens, strict=True):
        sequence.computed = sequence.length
        sequence.output.append(token)
    assert not pool.finish_step([(sequence, sequence.computed) for sequence in sequences])
    return took_s


if __name__ == "__main__":
    main()
