"""Attention over raw and packed pages, in Triton. Reference and `PagedKV`: `paged.py`; formats: `pages/layout.py`.

Packed pages are attended to as they are: with q' = W_k⁻ᵀ q and y the rotated space of the values,

    score = scale_k · (q' · c_k) + q' · mean
    out_y = sum p · scale_v · c_v
    out   = W_v⁻¹ out_y

1. `_partial`: one program for each sequence, KV head and split of the pages, all query heads of the KV head together as
   the rows of a matrix product. Splits 0 .. S-1 share the packed pages, splits S .. S+R-1 the raw ones. Numbers come
   from the codes in registers (`paged_splits_triton.py`, `pages/dequant_triton.py`) as 128 + v in bf16; their offset is
   taken out of the sums: 2 sum(q v') - 383 sum(q).
2. `_merge`: joins the splits by log-sum-exp, and rotates what came from packed pages back.
"""

# Triton's language is typed for its compiler, not for a checker of Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pages.dequant_triton import point_table
from ..pages.rotation import Rotations
from ..pages.unpack_triton import current, uses_asm
from .paged import MAX_QUERY_TOKENS, PagedKV
from .paged_splits_triton import packed_split, raw_split

_LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _partial(
    q, q_rotated, raw_k, raw_v, pool, table, table_stride, packed_from_ptr, packed_to_ptr, lengths, out, lse,
    key_table, value_table, packed_splits, raw_splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    HEAD_BYTES: tl.constexpr, CODES_VALUE: tl.constexpr, SCALE_KEY: tl.constexpr, SCALE_VALUE: tl.constexpr,
    MEAN_KEY: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr,
    ROWS_PAD: tl.constexpr, DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, KV heads, splits). q, q_rotated: bf16 [B, KV heads, rows, D], scaled by log2(e)."""
    ROWS: tl.constexpr = GROUP * QUERIES
    sequence, head_index, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (sequence * HEADS + head_index).to(tl.int64)
    partial = place * (packed_splits + raw_splits) + split
    length = tl.load(lengths + sequence)
    packed_from, packed_to = tl.load(packed_from_ptr + sequence), tl.load(packed_to_ptr + sequence)
    table_row = table + sequence.to(tl.int64) * table_stride
    first = 0
    if WINDOW > 0:  # pages that no query sees any more
        first = tl.maximum(length - QUERIES - WINDOW + 1, 0) // PAGE
    if split < packed_splits:
        begin = tl.maximum(packed_from, first)
        share = tl.cdiv(tl.maximum(packed_to - begin, 0), packed_splits)
        start = begin + split * share
        packed_split(
            q_rotated + place * ROWS * DIM, pool, table_row, start, tl.minimum(start + share, packed_to), length,
            out + partial * ROWS * DIM, lse + partial * ROWS, key_table, value_table, head_index,
            HEADS, DIM, PAGE, KEY_BITS, VALUE_BITS, HEAD_BYTES, CODES_VALUE, SCALE_KEY, SCALE_VALUE, MEAN_KEY,
            GROUP, QUERIES, WINDOW, ROWS_PAD, DIM_PAD, PAGE_PAD, ASM,
        )  # fmt: skip
    else:
        packed = tl.maximum(packed_to - packed_from, 0)
        pages = tl.cdiv(length, PAGE) - packed
        begin = tl.minimum(first, packed_from) + tl.maximum(first - tl.maximum(packed_to, packed_from), 0)
        share = tl.cdiv(tl.maximum(pages - begin, 0), raw_splits)
        start = begin + (split - packed_splits) * share
        raw_split(
            q + place * ROWS * DIM, raw_k, raw_v, table_row, start, tl.minimum(start + share, pages),
            packed_from, packed_to, length, out + partial * ROWS * DIM, lse + partial * ROWS, head_index,
            HEADS, DIM, PAGE, GROUP, QUERIES, WINDOW, ROWS_PAD, DIM_PAD, PAGE_PAD, ASM,
        )  # fmt: skip


@triton.jit
def _merged(
    out, lse, m, rows, columns, first, count,
    ROWS: tl.constexpr, DIM: tl.constexpr, ROWS_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """Some columns of the sum of the splits' outputs, weighted by 2^(lse - m)."""
    acc = tl.zeros([ROWS_PAD, WIDTH_PAD], tl.float32)
    mask = (rows < ROWS)[:, None] & (columns < DIM)[None, :]
    for split in range(first, first + count):
        share = tl.exp2(tl.load(lse + split * ROWS + rows, mask=rows < ROWS, other=float("-inf")) - m)
        part = tl.load(out + split * ROWS * DIM + rows[:, None] * DIM + columns[None, :], mask=mask, other=0.0)
        acc += part * share[:, None]
    return acc


@triton.jit
def _merge(
    out, lse, inverse, result, result_lse, packed_splits, raw_splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    ROWS_PAD: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, KV heads). result [B, Q, query heads, D], result_lse [B, Q, query heads].

    The output of packed pages is rotated back BLOCK of its dimensions at a time, so that a block of the rotation, not
    all of it, has to fit the shared memory.
    """
    ROWS: tl.constexpr = GROUP * QUERIES
    sequence, head_index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    splits = packed_splits + raw_splits
    place = (sequence * HEADS + head_index) * splits
    rows, dims, block = tl.arange(0, ROWS_PAD), tl.arange(0, DIM_PAD), tl.arange(0, BLOCK)
    out += place * ROWS * DIM
    lse += place * ROWS
    m = tl.full([ROWS_PAD], float("-inf"), tl.float32)
    for split in range(splits):
        m = tl.maximum(m, tl.load(lse + split * ROWS + rows, mask=rows < ROWS, other=float("-inf")))
    m = tl.where(m == float("-inf"), 0.0, m)
    weight = tl.zeros([ROWS_PAD], tl.float32)
    for split in range(splits):
        weight += tl.exp2(tl.load(lse + split * ROWS + rows, mask=rows < ROWS, other=float("-inf")) - m)
    weight = tl.where(rows < ROWS, weight, 1.0)
    y = _merged(out, lse, m, rows, dims, packed_splits, raw_splits, ROWS, DIM, ROWS_PAD, DIM_PAD)
    for start in range(0, DIM_PAD, BLOCK):
        columns = start + block
        packed = _merged(out, lse, m, rows, columns, 0, packed_splits, ROWS, DIM, ROWS_PAD, BLOCK)
        # inverse[i, j] of W_v⁻¹, read transposed: rows of the product are queries.
        square = (columns < DIM)[:, None] & (dims < DIM)[None, :]
        rotation = tl.load(inverse + dims[None, :] * DIM + columns[:, None], mask=square, other=0.0)
        y = tl.dot(packed, rotation, y, input_precision="ieee")
    y = y / weight[:, None]
    # Row = query token * GROUP + head of the group.
    to = ((sequence * QUERIES + rows // GROUP) * HEADS + head_index) * GROUP + rows % GROUP
    mask = (rows < ROWS)[:, None] & (dims < DIM)[None, :]
    tl.store(result + to[:, None] * DIM + dims[None, :], y.to(result.dtype.element_ty), mask=mask)
    tl.store(result_lse + to, (m + tl.log2(weight)) * _LN2, mask=rows < ROWS)


def paged_attention(
    q_BQHD: Tensor,
    kv: PagedKV,
    rotations: Rotations,
    scale: float,
    window: int | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the newest 1 to 8 tokens of each sequence over its raw and packed pages.

    q_BQHD: bf16, fp16 or fp32 [B, Q, query heads, D]; query token i of sequence b is at position
    lengths_B[b] - Q + i, and its key and value are in the raw pool already. `kv`: see `PagedKV`; all
    tensors contiguous on one device. `splits`: how many programs share the packed pages of one KV head of
    one sequence; None: as many as fill the device. Returns the output [B, Q, query heads, D] in the dtype
    of q and the log-sum-exp (natural) float32 [B, Q, query heads]. ValueError where shapes do not fit
    together.
    """
    batch, queries, heads, dim = q_BQHD.shape
    page, kv_heads = kv.layout.page_tokens, kv.raw_k_RPHD.shape[2]
    _check(q_BQHD, kv, kv_heads)
    group, device = heads // kv_heads, q_BQHD.device
    rows = group * queries
    splits = splits or _splits(batch * kv_heads, kv.table_BN.shape[1], device)
    raw_splits = 1
    q = (
        q_BQHD.float()
        .view(batch, queries, kv_heads, group, dim)
        .permute(0, 2, 1, 3, 4)
        .reshape(batch, kv_heads, rows, dim)
    )
    q = q * (scale * _LOG2E)
    q_rotated = torch.matmul(q, rotations.key_inverse_HDD).to(torch.bfloat16).contiguous()
    partial = torch.empty(batch, kv_heads, splits + raw_splits, rows, dim, dtype=torch.float32, device=device)
    partial_lse = torch.empty(partial.shape[:-1], dtype=torch.float32, device=device)
    rows_pad, dim_pad = triton.next_power_of_2(max(16, rows)), triton.next_power_of_2(max(16, dim))
    layout = kv.layout
    with current(device):
        _partial[(batch, kv_heads, splits + raw_splits)](
            q.to(torch.bfloat16).contiguous(), q_rotated, kv.raw_k_RPHD, kv.raw_v_RPHD, kv.packed_SB,
            kv.table_BN, kv.table_BN.stride(0), kv.packed_from_B, kv.packed_to_B, kv.lengths_B, partial, partial_lse,
            point_table(layout.key_bits, device), point_table(layout.value_bits, device), splits, raw_splits,
            kv_heads, dim, page, layout.key_bits, layout.value_bits,
            layout.head_bytes, layout.codes_value, layout.scale_key, layout.scale_value, layout.mean_key,
            group, queries, window or 0, rows_pad, dim_pad, triton.next_power_of_2(max(16, page)), uses_asm(device),
            num_warps=2,  # fewest instructions a value without spills, by the compiled code for sm_90
        )  # fmt: skip
    out, lse = torch.empty_like(q_BQHD), torch.empty(q_BQHD.shape[:3], dtype=torch.float32, device=device)
    with current(device):
        _merge[(batch, kv_heads)](
            partial, partial_lse, rotations.value_inverse_DD, out, lse, splits, raw_splits,
            kv_heads, dim, group, queries, rows_pad, dim_pad, min(32, dim_pad),
        )  # fmt: skip
    return out, lse


def _check(q_BQHD: Tensor, kv: PagedKV, kv_heads: int) -> None:
    batch, queries, heads, dim = q_BQHD.shape
    layout = kv.layout
    if not 1 <= queries <= MAX_QUERY_TOKENS or heads % kv_heads or dim != layout.head_dim:
        raise ValueError(f"queries {tuple(q_BQHD.shape)} do not fit {kv_heads} KV heads of {layout}")
    pool = (layout.page_tokens, kv_heads, dim)
    if kv.raw_k_RPHD.shape[1:] != pool or kv.raw_v_RPHD.shape != kv.raw_k_RPHD.shape:
        raise ValueError(f"raw pool {tuple(kv.raw_k_RPHD.shape)}; wanted [slots, {', '.join(map(str, pool))}]")
    if kv.packed_SB.shape[1] != kv_heads * layout.head_bytes:
        raise ValueError(f"packed pool {tuple(kv.packed_SB.shape)} does not hold {kv_heads} heads of {layout}")
    if len({batch, len(kv.table_BN), len(kv.packed_from_B), len(kv.packed_to_B), len(kv.lengths_B)}) > 1:
        raise ValueError("queries, page table, packed ranges and lengths are of different numbers of sequences")
    tensors = (q_BQHD, kv.raw_k_RPHD, kv.raw_v_RPHD, kv.packed_SB)
    tables = (kv.table_BN, kv.packed_from_B, kv.packed_to_B, kv.lengths_B)
    if not all(t.is_contiguous() for t in (*tensors, *tables)):
        raise ValueError("queries, pools, page table, packed ranges and lengths must be contiguous")
    if not all(t.dtype == torch.int32 for t in tables):
        raise ValueError("page table, packed ranges and lengths must be int32")


def _splits(programs: int, pages: int, device: torch.device) -> int:
    """Enough programs for four on each multiprocessor, none with fewer than four pages."""
    if device.type != "cuda":
        return 2
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-wanted // programs), -(-pages // 4)))
