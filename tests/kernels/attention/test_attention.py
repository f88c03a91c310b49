import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from isthmus.kernels.attention.dense import Span, ragged_attention, span_attention

SLOTS = 500


def make_spans(rng: random.Random) -> list[Span]:
    """Up to four sequences with old and new tokens, in one range of slots or in two."""
    spans, row = [], 0
    for _ in range(rng.randint(1, 4)):
        new, past = rng.choice([1, 1, 2, 5, 40]), rng.choice([0, 1, 7, 63, 64, 100])
        cut = rng.choice([0, rng.randint(0, past + new)])
        lengths = [tokens for tokens in (cut, past + new - cut) if tokens]
        ranges = tuple((rng.randint(0, SLOTS - tokens), tokens) for tokens in lengths)
        spans.append(Span(row, new, past, ranges, output=rng.random() < 0.5))
        row += new
    return spans


def token_by_token(q: Tensor, keys: Tensor, values: Tensor, spans: list[Span], scale: float, window: int | None):
    """The definition, in double precision."""
    out = torch.empty_like(q, dtype=torch.float64)
    groups = q.shape[1] // keys.shape[1]
    for span in spans:
        k, v = (
            torch.cat([rows[slot : slot + n] for slot, n in span.slot_ranges]).double().repeat_interleave(groups, dim=1)
            for rows in (keys, values)
        )
        for index in range(span.new):
            at = span.past + index
            seen = slice(0 if window is None else max(0, at - window + 1), at + 1)
            scores = torch.einsum("hd,shd->hs", q[span.row + index].double(), k[seen]) * scale
            out[span.row + index] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[seen])
    return out


@pytest.mark.parametrize("window", [None, 1, 8, 50, 64])
@pytest.mark.parametrize(("kv_heads", "groups", "dim"), [(1, 1, 16), (3, 3, 64), (2, 4, 80), (1, 4, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_definition(window, kv_heads, groups, dim, dtype):
    rng = random.Random(dim)
    torch.manual_seed(dim)
    for _ in range(5):
        keys, values = torch.randn(2, SLOTS, kv_heads, dim).to(dtype)
        spans = make_spans(rng)
        q = torch.randn(spans[-1].row + spans[-1].new, kv_heads * groups, dim).to(dtype)
        out = ragged_attention(q, keys, values, spans, dim**-0.5, window)
        expected = token_by_token(q, keys, values, spans, dim**-0.5, window)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 8, 64])
@pytest.mark.parametrize(("kv_heads", "groups", "dim"), [(1, 1, 16), (3, 3, 64), (2, 4, 80)])
def test_what_a_gpu_computes_agrees_with_the_definition(window, kv_heads, groups, dim):
    """In fp32 on a CPU, where PyTorch's causal bias becomes a mask: the alignment of queries and keys is the same."""
    torch.manual_seed(dim)
    keys, values = torch.randn(2, SLOTS, kv_heads, dim)
    for new, past, cut in ((5, 0, 0), (40, 0, 7), (1, 30, 8), (5, 7, 0), (40, 64, 50), (40, 100, 0), (2, 6, 0)):
        ranges = tuple(one for one in ((200, cut), (9, past + new - cut)) if one[1])
        q = torch.randn(3 + new, kv_heads * groups, dim)
        out = span_attention(q, keys, values, Span(3, new, past, ranges), dim**-0.5, window)
        expected = token_by_token(q[3:], keys, values, [Span(0, new, past, ranges)], dim**-0.5, window)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 200])
def test_a_chunk_on_a_gpu_attends_through_flash_attention(window):
    """With every other kernel ruled out, which is an error where it is needed; `window` is never reached."""
    torch.manual_seed(1)
    keys, values = torch.randn(2, SLOTS, 2, 64, device="cuda").bfloat16()
    spans = [Span(0, 64, 128, ((64, 192),)), Span(64, 40, 0, ((300, 40),)), Span(104, 40, 64, ((0, 64), (400, 40)))]
    q = torch.randn(144, 6, 64, device="cuda").bfloat16()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = ragged_attention(q, keys, values, spans, 0.125, window)
    expected = token_by_token(q.cpu(), keys.cpu(), values.cpu(), spans, 0.125, window)
    torch.testing.assert_close(out.cpu().double(), expected, atol=2e-2, rtol=2e-2)


def test_a_sequence_sees_nothing_of_another():
    torch.manual_seed(1)
    keys, values = torch.randn(2, 128, 2, 16)
    spans = [Span(0, 1, 39, ((0, 40),), output=True), Span(1, 3, 10, ((64, 13),))]
    q = torch.randn(4, 4, 16)
    before = ragged_attention(q, keys, values, spans, 0.25, None)
    keys[64:], values[64:] = 7.0, 7.0
    after = ragged_attention(q, keys, values, spans, 0.25, None)
    assert torch.equal(before[:1], after[:1])
    assert not torch.allclose(before[1:], after[1:])


@pytest.mark.parametrize("window", [None, 100, 512])
@pytest.mark.parametrize("groups", [1, 3])
def test_where_a_prompt_is_cut_and_lies_changes_no_bit(window, groups):
    rng = random.Random(groups)
    torch.manual_seed(groups)
    keys, values = torch.randn(2, 1600, 2, 64)
    q = torch.randn(1600, 2 * groups, 64)
    whole = ragged_attention(q[:1500], keys, values, [Span(0, 1500, 0, ((0, 1500),))], 0.125, window)
    elsewhere = [torch.cat([x[:64], x[64:].roll(640, 0)]) for x in (keys, values)]  # slots from 64 on lie later
    for _ in range(8):
        total = rng.randint(1, 1500 - 640)
        cuts = sorted({0, total, *(rng.randrange(total // 64 + 1) * 64 for _ in range(3)), total - 1})
        for past, end in pairwise(cuts):
            ranges = ((0, min(end, 64)), (704, end - 64)) if end > 64 else ((0, end),)
            spans = [Span(0, end - past, past, ranges), Span(end - past, 2, 20, ((64, 22),))]
            out = ragged_attention(torch.cat([q[past:end], q[:2]]), *elsewhere, spans, 0.125, window)
            assert torch.equal(out[: end - past], whole[past:end])


def test_output_that_is_replayed_in_one_span_has_the_same_bits():
    torch.manual_seed(1)
    keys, values, q = torch.randn(300, 2, 64), torch.randn(300, 2, 64), torch.randn(40, 6, 64)
    one_by_one = [
        ragged_attention(q[i : i + 1], keys, values, [Span(0, 1, 200 + i, ((9, 201 + i),), output=True)], 0.125, 128)
        for i in range(40)
    ]
    ranges = ((9, 64), (73, 176))
    spans = [Span(0, 40, 200, ranges, output=True)]
    assert torch.equal(ragged_attention(q, keys, values, spans, 0.125, 128), torch.cat(one_by_one))


def test_a_chunk_in_inference_mode_and_one_outside_of_it_agree() -> None:
    """The memory that both use is made by the first."""
    keys, values = torch.randn(2, 300, 1, 24)
    q = torch.randn(40, 2, 24)
    with torch.inference_mode():
        inside = ragged_attention(q, keys, values, [Span(0, 40, 260, ((0, 300),))], 0.2, None)
    assert torch.equal(ragged_attention(q, keys, values, [Span(0, 40, 260, ((0, 300),))], 0.2, None), inside)
