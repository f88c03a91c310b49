"""Packed and dense pools hold the same numbers: the same greedy tokens, whichever a decode worker has."""

import asyncio

import pytest
import torch
from harness import worker_pair
from models import model_path

from isthmus.decode.config import DecodeConfig
from isthmus.decode.memory import keeps_packed
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.sampling import Sampling

GREEDY = Sampling(temperature=0, max_tokens=150, ignore_eos=True)


def prompts(vocab: int) -> list[list[int]]:
    """Lengths around every border of the packed range."""
    lengths = (1, 62, 64, 127, 128, 191, 192, 250)
    return [[(17 * position + 5 * tokens) % vocab for position in range(tokens)] for tokens in lengths]


@pytest.mark.parametrize(
    ("name", "codec"), [("tiny-llama", "tq-k4v4"), ("tiny-mistral", "tq-k3v2"), ("tiny-gemma3", "tq-k4v4")]
)
async def test_the_same_tokens_from_both_pools(name: str, codec: str) -> None:
    tokens = {}
    for pool in ("dense", "packed"):
        own = {"default_codec": codec, "pool": pool}
        async with worker_pair(model_path(name), prefill={"default_codec": codec}, decode=own) as pair:
            answers = await asyncio.gather(*(pair.generate(prompt, GREEDY, codec) for prompt in prompts(500)))
            tokens[pool] = [answer.token_ids for answer in answers]
    assert tokens["packed"] == tokens["dense"]


async def test_the_same_tokens_from_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Triton's interpreter, which is slow: one page comes packed, another fills and is packed, six steps in."""
    own = {"page_tokens": 16, "default_codec": "tq-k4v4"}
    short = Sampling(temperature=0, max_tokens=9, ignore_eos=True)
    tokens = []
    for interpreted in (False, True):
        monkeypatch.setattr("isthmus.decode.pool.packed.uses_triton", lambda device, yes=interpreted: yes)
        async with worker_pair(model_path("tiny-llama"), prefill=own, decode=own | {"pool": "packed"}) as pair:
            tokens.append((await pair.generate(list(range(3, 61)), short, "tq-k4v4")).token_ids)
    assert tokens[0] == tokens[1]


async def test_pages_that_fill_while_decoding_are_packed() -> None:
    """With pages of 8 tokens most of the output has gone through the codec, so it differs from raw in the end."""
    small = {"page_tokens": 8, "default_codec": "tq-k2v2", "chunk_tokens": 64}
    own = {"page_tokens": 8, "default_codec": "tq-k2v2", "pool": "dense"}
    async with worker_pair(model_path("tiny-llama"), prefill=small, decode=own) as pair:
        packed = await pair.generate([1, 2, 3], GREEDY, "tq-k2v2")
        raw = await pair.generate([1, 2, 3], GREEDY, "raw")
    assert packed.token_ids[:20] == raw.token_ids[:20], "the first two full pages are raw"
    assert packed.token_ids != raw.token_ids


def test_the_pool_by_default_and_by_choice() -> None:
    auto, raw = DecodeConfig(model="m"), DecodeConfig(model="m", default_codec="raw")
    assert [keeps_packed(auto, device) for device in ("cpu", "cuda")] == [False, True]
    assert not keeps_packed(raw, "cuda")
    with pytest.raises(InvalidRequest, match="packed pool cannot hold codec 'raw'"):
        keeps_packed(DecodeConfig(model="m", default_codec="raw", pool="packed"), "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
async def test_a_gpu_decodes_what_a_cpu_prefilled() -> None:
    own = {"pool": "packed", "device": "cuda"}
    async with worker_pair(model_path("tiny-llama"), prefill={"device": "cpu"}, decode=own) as pair:
        on_gpu = [await pair.generate(prompt, GREEDY, "tq-k4v4") for prompt in prompts(500)]
        assert pair.decode.server.report().counters["graph_steps"] > 100, "steps are replayed from CUDA graphs"
    async with worker_pair(model_path("tiny-llama"), decode={"pool": "dense", "device": "cpu"}) as pair:
        on_cpu = [await pair.generate(prompt, GREEDY, "tq-k4v4") for prompt in prompts(500)]
    same = sum(a.token_ids[:32] == b.token_ids[:32] for a, b in zip(on_gpu, on_cpu, strict=True))
    assert same >= 6, "bf16 products on the tensor cores may turn a near tie, no more"
