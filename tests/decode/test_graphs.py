"""Decode steps that are filled up to recorded shapes give what unpadded ones give; only recording them needs CUDA."""

import asyncio
import logging
from collections.abc import Callable

import pytest
import torch
from harness import worker_pair
from models import model_path
from torch import Tensor

from isthmus.decode.graphs import Call, PaddedSteps, Record, page_counts, recorder, token_counts
from isthmus.decode.pool.local import needs_raw
from isthmus.decode.pool.packed import PackedKvPool
from isthmus.decode.runner import DecodeRunner
from isthmus.decode.scheduler import DecodeScheduler
from isthmus.decode.sequence import DecodeSequence, TokenStream
from isthmus.kernels.cpu.half_gemm import has_half_tiles
from isthmus.kvtransfer.codecs.tq import TqCodec
from isthmus.model.load.loader import load_model
from isthmus.model.model import Model
from isthmus.proto.sampling import Sampling
from isthmus.worker.step_plan import SequenceId, StepBatch

PAGE = 16
PROMPTS = (1, 15, 47, 16, 17, 31, 63, 64, 100)  # around the borders of pages and of what is packed
GREEDY = Sampling(temperature=0, max_tokens=200, ignore_eos=True)


def as_it_is(call: Call) -> Call:
    """What a graph does, without one."""
    return call


class Side:
    """A pool of its own and the steps on it."""

    def __init__(self, model: Model, record: Record | None) -> None:
        self._codec = TqCodec("tq-k4v4", model.layers, PAGE)
        self._pool = PackedKvPool(model, self._codec, 160, PAGE, 10, cached_pages=0)
        padded = PaddedSteps(model, self._pool, most_tokens=10) if record else None
        if padded and record:
            padded.record(record)
        self.runner = DecodeRunner(model, self._pool, padded, before_layer=lambda: None)
        self._model, self._scheduler = (
            model,
            DecodeScheduler(
                total_pages=160,
                page_tokens=PAGE,
                max_batch=10,
                chunk_tokens=512,
                idle_chunk_tokens=512,
                raw_tokens=10_000,
            ),
        )
        self.sequences: dict[int, DecodeSequence] = {}

    def join(self, number: int) -> None:
        prompt = [(31 * number + 7 * position) % 500 for position in range(PROMPTS[number])]
        sequence = DecodeSequence(SequenceId(number), prompt, GREEDY, self._codec, TokenStream())
        tokens = len(prompt)
        assert self._pool.allocate(sequence, tokens + 90, tokens + 90)
        self._scheduler.add_request(
            sequence.id, prompt_tokens=tokens, max_tokens=tokens + 90, rank=1, arrived_s=float(number)
        )
        self._scheduler.mark_allocated(sequence.id)
        raw_tokens = tokens * needs_raw(self._codec, self._model.dtype, 0, tokens, PAGE)
        self._scheduler.mark_running(sequence.id, computed=0, known=tokens, raw_tokens=raw_tokens)
        self.sequences[number] = sequence

    def leave(self, number: int) -> None:
        sequence = self.sequences.pop(number)
        self._scheduler.remove_request(sequence.id)
        self._pool.free(sequence)
        assert bool(self._pool.in_use) == bool(self.sequences)

    def step(self) -> Tensor:
        """Logits of all requests, in order."""
        plan = self._scheduler.plan(0.0, lambda plans: plans)
        work = [(self.sequences[part.sequence], part) for part in plan.sequences]
        token_ids = tuple(tuple(sequence.tokens(part.start, part.end)) for sequence, part in work)
        pages = tuple(self._pool.step_pages(sequence, part.end) for sequence, part in work)
        for part, of in zip(plan.sequences, pages, strict=True):
            self.runner.open_prompt(part, of)
        logits = self.runner.run(StepBatch(plan.sequences, token_ids, pages)).clone()
        for sequence, part in work:
            sequence.computed = part.end
            assert self.runner.prompt_failure(sequence.id) is None
            self.runner.close_prompt(sequence.id)
        assert not self._pool.finish_step([(sequence, part.end) for sequence, part in work])
        self._scheduler.complete(plan)
        assert [sequence for sequence, part in work if part.samples] == list(self.sequences.values())
        return logits


def in_step(plain: Side, padded: Side, batches: list[int], steps: int, check: Callable[[Tensor, Tensor], None]) -> int:
    """Requests join one by one up to each number of `batches` and leave down to it, `steps` after each; both sides get
    the same tokens. How many steps were padded."""
    for batch in batches:
        while len(plain.sequences) > batch:
            for side in (plain, padded):
                side.leave(min(side.sequences))
        while len(plain.sequences) < batch:
            for side in (plain, padded):
                side.join(len(side.sequences))
            step(plain, padded, check)
        for _ in range(steps):
            step(plain, padded, check)
    for side in (plain, padded):
        for number in list(side.sequences):
            side.leave(number)
    assert plain.runner.graph_steps == 0
    return padded.runner.graph_steps


def step(plain: Side, padded: Side, check: Callable[[Tensor, Tensor], None]) -> None:
    logits, same = plain.step(), padded.step()
    check(same, logits)
    for side in (plain, padded):
        for sequence, token in zip(side.sequences.values(), logits.argmax(-1).tolist(), strict=True):
            sequence.output.append(token)


def joins_padded(model: Model) -> int:
    """How many of the steps in which requests join are padded: that of a prompt of one token, where the model computes
    in the pool's own numbers, so that the prompt needs no copy beside it."""
    return int(model.dtype == torch.bfloat16)


def equal(a: Tensor, b: Tensor) -> None:
    """To the bit where sums do not depend on the batch (model/cpu/linear.py)."""
    if has_half_tiles():
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral"])
def test_padded_steps_have_the_bits_of_unpadded_ones(name: str) -> None:
    """Batches of 1 to 9 that join and leave; each request crosses borders of pages."""
    model = load_model(model_path(name), dtype="bf16", device="cpu")
    plain, padded = Side(model, None), Side(model, as_it_is)
    assert in_step(plain, padded, [*range(1, 10), *range(8, 0, -1)], 4, equal) == 4 * 17 + joins_padded(model)


def test_padded_steps_through_the_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Triton's interpreter, which is slow: three requests in a step of four."""
    monkeypatch.setattr("isthmus.decode.pool.packed.uses_triton", lambda device: device.type in ("cpu", "cuda"))
    model = load_model(model_path("tiny-llama"), dtype="bf16", device="cpu")
    plain, padded = Side(model, None), Side(model, as_it_is)
    assert in_step(plain, padded, [3], 1, equal) == 1 + joins_padded(model)


def test_the_shapes() -> None:
    assert token_counts(1) == [1] and token_counts(9) == [1, 2, 4, 8, 9]
    assert token_counts(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert token_counts(100) == [*token_counts(64), 96, 100]
    assert (page_counts(5), page_counts(32), page_counts(600)) == ([5], [32], [32, 128, 512, 600])


async def answers(**settings: object) -> tuple[list[list[int]], int]:
    """Greedy tokens of requests that come at once, some computed here, and how many steps were recorded ones."""
    own = {"page_tokens": PAGE, "default_codec": "tq-k4v4"}
    decode = own | {"pool": "packed", "prefix_cache": 0, "max_batch": 5, "chunk_tokens": 32} | settings
    async with worker_pair(model_path("tiny-llama"), prefill=own, decode=decode) as pair:
        requests = []
        for number, tokens in enumerate(PROMPTS[:7]):
            prompt = [(31 * number + 7 * position) % 500 for position in range(tokens)]
            sampling = Sampling(temperature=0, max_tokens=20 + 5 * number, ignore_eos=True)
            requests.append(pair.request(prompt, sampling, "tq-k4v4"))
            if number % 3 == 2:
                del requests[-1].prefill_addresses[:]

        async def answer(request: object) -> list[int]:
            return [token async for event in pair.call(request) for token in event.token_ids]  # type: ignore[arg-type]

        tokens = await asyncio.gather(*map(answer, requests))
        return list(tokens), pair.decode.server.report().counters["graph_steps"]


async def test_a_worker_records_its_steps_where_it_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert recorder(torch.device("cpu")) is None
    monkeypatch.setattr("isthmus.decode.graphs.recorder", lambda device: as_it_is)
    plain, none = await answers(cuda_graphs="never")
    padded, some = await answers()
    assert padded == plain and none == 0 and some >= 30

    def refuse(call: Call) -> Call:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("isthmus.decode.graphs.recorder", lambda device: refuse)
    with caplog.at_level(logging.WARNING):
        assert await answers() == (plain, 0)
    assert "without CUDA graphs, more slowly: operation not permitted" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_graphs_give_what_unrecorded_steps_give() -> None:
    model = load_model(model_path("tiny-llama"), dtype="bf16", device="cuda")
    record = recorder(model.device)
    assert record is not None

    def near(a: Tensor, b: Tensor) -> None:
        assert float((a - b).norm() / b.norm()) < 0.05, "bf16 products of other batches round otherwise"

    assert in_step(Side(model, None), Side(model, record), [*range(1, 10), *range(8, 0, -1)], 4, near) >= 4 * 17


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_what_cannot_be_recorded_is_an_error_and_harms_nothing() -> None:
    record = recorder(torch.device("cuda", 0))
    assert record is not None
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        record(lambda: x.add_(len(x.nonzero())))  # waits for the GPU
    torch.cuda.empty_cache()
    y = torch.zeros(3, device="cuda")
    replay = record(lambda: y.add_(x))
    y.zero_()
    x.fill_(5)
    replay()
    assert y.tolist() == [5, 5, 5]
