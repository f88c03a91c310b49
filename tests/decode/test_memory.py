"""How a decode worker divides its memory for KV."""

import pytest

from isthmus.decode.config import DecodeConfig
from isthmus.decode.memory import GIB, KvBudget, kv_budget
from isthmus.kernels.shapes import LayerShape
from isthmus.proto.errors import InvalidRequest

LLAMA_8B = [LayerShape(kv_heads=8, head_dim=128)] * 32  # 128 KiB a token in bf16
SMOLLM2 = [LayerShape(kv_heads=3, head_dim=64)] * 30  # 45 KiB a token in fp32
PACKED = 32 * 8 * 64 * (128 + 16)  # about what tq-k4v4 makes of a page of the 8B model


def budget(layers: list[LayerShape], itemsize: int, context: int, packed: int | None = None, **settings: object):
    return kv_budget(
        DecodeConfig(model="m", **settings),  # pyright: ignore[reportArgumentType]
        layers,
        itemsize,
        context,
        packed_page_bytes=packed,
    )


def taken(kv: KvBudget) -> int:
    return kv.pool_bytes + kv.raw_bytes + kv.local_bytes


def test_a_dense_pool_leaves_room_for_the_longest_prompt() -> None:
    kv = budget(SMOLLM2, 4, 8192)
    assert kv.local_tokens == 8192
    assert (kv.raw_bytes, kv.max_batch) == (0, 64)
    assert 2 * GIB - kv.page_bytes < taken(kv) <= 2 * GIB


@pytest.mark.parametrize("packed", [None, PACKED])
@pytest.mark.parametrize("gib", [0.5, 1.0, 2.0, 7.3, 40.0])
@pytest.mark.parametrize("context", [2048, 131_072])
def test_pool_gib_is_the_budget_of_all_kv_and_no_prompt_is_too_long(
    packed: int | None, gib: float, context: int
) -> None:
    kv = budget(LLAMA_8B, 2, context, packed, pool_gib=gib)
    assert taken(kv) <= gib * GIB
    assert kv.raw_bytes <= gib * GIB / 2
    assert 1 <= kv.max_batch <= 64
    assert kv.local_tokens == min(context, kv.pages * 64)


def test_the_raw_pages_of_an_8b_model_are_counted() -> None:
    kv = budget(LLAMA_8B, 2, 8192, PACKED, pool_gib=2)
    assert kv.max_batch == 31, "64 requests would take 2 GiB of raw pages alone"
    assert kv.raw_bytes == (4 * 31 + 1) * 64 * 128 * 1024
    assert budget(LLAMA_8B, 2, 8192, PACKED, pool_gib=2, prefix_cache=0).max_batch == 42
    assert budget(LLAMA_8B, 2, 8192, PACKED, pool_gib=16).max_batch == 64


def test_pool_tokens_are_of_the_pool_alone() -> None:
    kv = budget(LLAMA_8B, 2, 8192, PACKED, pool_tokens=64_000, max_batch=8)
    assert (kv.pages, kv.max_batch, kv.local_tokens) == (1000, 8, 8192)
    assert kv.raw_bytes == 33 * 64 * 128 * 1024


@pytest.mark.parametrize("packed", [None, PACKED])
def test_a_budget_that_holds_nothing_is_refused(packed: int | None) -> None:
    with pytest.raises(InvalidRequest, match="raise pool_gib"):
        budget(LLAMA_8B, 2, 8192, packed, pool_gib=0.01)
