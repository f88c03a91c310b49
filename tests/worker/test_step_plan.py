"""A step is a value: schedulers make it without tensors, and it travels as plain numbers."""

import subprocess
import sys
from dataclasses import astuple

import msgpack
import pytest

from isthmus.decode.scheduler import DecodeScheduler
from isthmus.prefill.scheduler import PrefillScheduler
from isthmus.worker.step_plan import SequenceId, SequencePages, SequencePlan, StepBatch, StepPlan

A, B = SequenceId(1), SequenceId(2)
HEAVY = {"torch", "grpc", "ray"}


def sent(value: StepPlan | StepBatch) -> list:
    """What another process gets."""
    return msgpack.unpackb(msgpack.packb(astuple(value)), use_list=False)


def test_a_plan_of_either_role_travels_as_plain_values() -> None:
    prefill = PrefillScheduler(chunk_tokens=256, page_tokens=64)
    prefill.add_request(A, 300, now_s=0)
    decode = DecodeScheduler(
        total_pages=10, page_tokens=64, max_batch=8, chunk_tokens=64, idle_chunk_tokens=128, raw_tokens=1000
    )
    for sequence, computed in ((A, 100), (B, 0)):
        decode.add_request(sequence, prompt_tokens=100, max_tokens=200, rank=1, arrived_s=float(sequence))
        decode.mark_allocated(sequence)
        decode.mark_running(sequence, computed=computed, known=101 if computed else 100)
    plans = [prefill.plan(0, 1000.0, lambda _: 64), decode.plan(0, lambda parts: parts)]
    assert plans == [
        StepPlan((SequencePlan(A, 64, 300, 300, samples=True),)),
        StepPlan((SequencePlan(A, 100, 101, 100, samples=True), SequencePlan(B, 0, 64, 100, samples=False))),
    ]
    for plan in plans:
        (parts,) = sent(plan)
        assert StepPlan(tuple(SequencePlan(*part) for part in parts)) == plan


def test_a_batch_travels_as_plain_values_and_can_be_divided() -> None:
    plans = SequencePlan(A, 100, 101, 100, samples=True), SequencePlan(B, 0, 2, 100, samples=False)
    pages = SequencePages((4, 5), "tq-k4v4", (1, 2)), SequencePages((7, 6), "raw")
    batch = StepBatch(plans, ((9,), (3, 4)), pages)
    parts, token_ids, slots = sent(batch)
    assert (
        StepBatch(tuple(SequencePlan(*part) for part in parts), token_ids, tuple(SequencePages(*of) for of in slots))
        == batch
    )
    assert batch.select([False, True]) == StepBatch(plans[1:], ((3, 4),), pages[1:])


def test_a_step_that_is_complete_is_where_the_next_one_begins() -> None:
    decode = DecodeScheduler(
        total_pages=10, page_tokens=64, max_batch=8, chunk_tokens=64, idle_chunk_tokens=128, raw_tokens=1000
    )
    decode.add_request(A, prompt_tokens=100, max_tokens=200, rank=1, arrived_s=0)
    decode.mark_allocated(A)
    assert not decode.plan(0, lambda parts: parts), "its KV is on the way"
    decode.mark_running(A, computed=0, known=100)
    assert not decode.plan(0, lambda _: []), "nobody gets pages"
    seen = []
    for _ in range(3):
        plan = decode.plan(0, lambda parts: parts)
        decode.complete(plan)
        seen += [(part.start, part.end, part.samples) for part in plan.sequences]
    assert seen == [(0, 100, True), (100, 101, True), (101, 102, True)]


@pytest.mark.parametrize("module", ["prefill.scheduler", "decode.scheduler", "worker.step_plan"])
def test_schedulers_import_neither_torch_nor_grpc_nor_ray(module: str) -> None:
    script = f"import sys, isthmus.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)
