"""The two halves of `paged_triton.py`: attention of one program over its share of packed or of raw pages.

All query heads of a KV head, for all query tokens, are the rows of one matrix product; scores are in units of log2.
"""

# Triton's language is typed for its compiler, not for a checker of Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ..pages.dequant_triton import POINT_OFFSET, dot_bf16, load_nibbles, load_scale16, points2, points3, points4


@triton.jit
def _load_query(
    q_ptr, rows, block, DIM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, ROWS: tl.constexpr
):
    """Columns block * WIDTH ... of the query matrix, bf16 [rows, width]; padding is zero."""
    columns = tl.arange(0, WIDTH_PAD)
    mask = (rows < ROWS)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(q_ptr + rows[:, None] * DIM + block * WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _query_dot_mean(q, mean_ptr, block, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr):
    columns = tl.arange(0, WIDTH_PAD)
    mean = tl.load(mean_ptr + block * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    return tl.sum(q.to(tl.float32) * mean[None, :], 1)


@triton.jit
def _packed_scores(
    q0, q1, q2, q3, q_sum, q_mean, head, first, table, position, query_at,
    DIM: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, SCALE_AT: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW: tl.constexpr, ROWS_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr, TOKENS_PAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scores [rows, tokens] of tokens first ... first + TOKENS of a packed page, in units of log2."""
    WIDTH: tl.constexpr = DIM // (2 if BITS == 4 else 4)
    columns, offsets = tl.arange(0, WIDTH_PAD), tl.arange(0, TOKENS_PAD)
    tokens = first + offsets
    mask = (columns < WIDTH)[:, None] & (offsets < TOKENS)[None, :]
    x = tl.load(head + tokens[None, :] * WIDTH + columns[:, None], mask=mask, other=0)
    s = tl.zeros([ROWS_PAD, TOKENS_PAD], tl.float32)
    if BITS == 4:
        p0, p1 = points4(x, table, ASM)
        s = dot_bf16(q0, p0, s, ASM)
        s = dot_bf16(q1, p1, s, ASM)
    else:
        if BITS == 3:
            h = load_nibbles(head + PAGE * WIDTH, tokens[None, :], columns[:, None], WIDTH, mask)
            p0, p1, p2, p3 = points3(x, h, table, ASM)
        else:
            p0, p1, p2, p3 = points2(x, table, ASM)
        s = dot_bf16(q0, p0, s, ASM)
        s = dot_bf16(q1, p1, s, ASM)
        s = dot_bf16(q2, p2, s, ASM)
        s = dot_bf16(q3, p3, s, ASM)
    scale = load_scale16((head + SCALE_AT).to(tl.pointer_type(tl.int16)) + tokens, offsets < TOKENS)
    s = (2.0 * s - POINT_OFFSET * q_sum[:, None]) * scale[None, :] + q_mean[:, None]
    seen = (offsets < TOKENS)[None, :]
    if WINDOW > 0:
        seen = seen & ((position + tokens)[None, :] > query_at[:, None] - WINDOW)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _add_values(
    acc, offset, p, points, head, first,
    SCALE_AT: tl.constexpr, TOKENS: tl.constexpr, TOKENS_PAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Adds p · scale · points to acc, and p · scale, as it was rounded, to offset."""
    offsets = tl.arange(0, TOKENS_PAD)
    scale = load_scale16((head + SCALE_AT).to(tl.pointer_type(tl.int16)) + first + offsets, offsets < TOKENS)
    weights = (p * scale[None, :]).to(tl.bfloat16)
    return dot_bf16(weights, points, acc, ASM), offset + tl.sum(weights.to(tl.float32), 1)


@triton.jit
def _finish(acc, m, weight, out, lse, rows, dims, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Stores the normalised output and its log-sum-exp in units of log2 (-inf where nothing was seen)."""
    inside = rows < ROWS
    norm = tl.where(weight > 0, weight, 1.0)
    mask = inside[:, None] & (dims < DIM)[None, :]
    tl.store(out + rows[:, None] * DIM + dims[None, :], acc / norm[:, None], mask=mask)
    tl.store(lse + rows, tl.where(weight > 0, m + tl.log2(norm), float("-inf")), mask=inside)


@triton.jit
def packed_split(
    q_ptr, pool, table_row, start, end, length, out, lse, key_table, value_table, head_index,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    HEAD_BYTES: tl.constexpr, CODES_VALUE: tl.constexpr, SCALE_KEY: tl.constexpr, SCALE_VALUE: tl.constexpr,
    MEAN_KEY: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr,
    ROWS_PAD: tl.constexpr, DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = GROUP * QUERIES
    K_GROUPS: tl.constexpr = 2 if KEY_BITS == 4 else 4
    V_GROUPS: tl.constexpr = 2 if VALUE_BITS == 4 else 4
    WIDTH: tl.constexpr = DIM // K_GROUPS
    WIDTH_PAD: tl.constexpr = max(16, DIM_PAD // K_GROUPS)
    TOKENS: tl.constexpr = PAGE // V_GROUPS
    TOKENS_PAD: tl.constexpr = max(16, PAGE_PAD // V_GROUPS)
    rows, dims, offsets = tl.arange(0, ROWS_PAD), tl.arange(0, DIM_PAD), tl.arange(0, TOKENS_PAD)
    query_at = length - QUERIES + rows // GROUP
    q0 = _load_query(q_ptr, rows, 0, DIM, WIDTH, WIDTH_PAD, ROWS)
    q1 = _load_query(q_ptr, rows, 1, DIM, WIDTH, WIDTH_PAD, ROWS)
    q_sum = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
    q2, q3 = q0, q1
    if K_GROUPS == 4:
        q2 = _load_query(q_ptr, rows, 2, DIM, WIDTH, WIDTH_PAD, ROWS)
        q3 = _load_query(q_ptr, rows, 3, DIM, WIDTH, WIDTH_PAD, ROWS)
        q_sum += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
    m = tl.full([ROWS_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS_PAD], tl.float32)
    offset = tl.zeros([ROWS_PAD], tl.float32)
    acc = tl.zeros([ROWS_PAD, DIM_PAD], tl.float32)
    value_mask = (offsets < TOKENS)[:, None] & (dims < DIM)[None, :]
    for page in range(start, end):
        slot = tl.load(table_row + page).to(tl.int64)
        head = pool + (slot * HEADS + head_index) * HEAD_BYTES
        mean = (head + MEAN_KEY).to(tl.pointer_type(tl.bfloat16))
        q_mean = _query_dot_mean(q0, mean, 0, WIDTH, WIDTH_PAD) + _query_dot_mean(q1, mean, 1, WIDTH, WIDTH_PAD)
        if K_GROUPS == 4:
            q_mean += _query_dot_mean(q2, mean, 2, WIDTH, WIDTH_PAD) + _query_dot_mean(q3, mean, 3, WIDTH, WIDTH_PAD)
        codes = head + CODES_VALUE
        x = tl.load(codes + dims[None, :] * TOKENS + offsets[:, None], mask=value_mask, other=0)
        position = page * PAGE
        s0 = _packed_scores(
            q0, q1, q2, q3, q_sum, q_mean, head, 0, key_table, position, query_at,
            DIM, PAGE, KEY_BITS, SCALE_KEY, TOKENS, WINDOW, ROWS_PAD, WIDTH_PAD, TOKENS_PAD, ASM,
        )  # fmt: skip
        s1 = _packed_scores(
            q0, q1, q2, q3, q_sum, q_mean, head, TOKENS, key_table, position, query_at,
            DIM, PAGE, KEY_BITS, SCALE_KEY, TOKENS, WINDOW, ROWS_PAD, WIDTH_PAD, TOKENS_PAD, ASM,
        )  # fmt: skip
        largest = tl.maximum(tl.max(s0, 1), tl.max(s1, 1))
        if V_GROUPS == 4:
            s2 = _packed_scores(
                q0, q1, q2, q3, q_sum, q_mean, head, 2 * TOKENS, key_table, position, query_at,
                DIM, PAGE, KEY_BITS, SCALE_KEY, TOKENS, WINDOW, ROWS_PAD, WIDTH_PAD, TOKENS_PAD, ASM,
            )  # fmt: skip
            s3 = _packed_scores(
                q0, q1, q2, q3, q_sum, q_mean, head, 3 * TOKENS, key_table, position, query_at,
                DIM, PAGE, KEY_BITS, SCALE_KEY, TOKENS, WINDOW, ROWS_PAD, WIDTH_PAD, TOKENS_PAD, ASM,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.maximum(tl.max(s2, 1), tl.max(s3, 1)))
        m_new = tl.maximum(m, largest)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows that have seen nothing yet
        fade = tl.exp2(m - base)
        acc, offset, weight, m = acc * fade[:, None], offset * fade, weight * fade, m_new
        e0, e1 = tl.exp2(s0 - base[:, None]), tl.exp2(s1 - base[:, None])
        weight += tl.sum(e0, 1) + tl.sum(e1, 1)
        if V_GROUPS == 2:
            p0, p1 = points4(x, value_table, ASM)
        else:
            if VALUE_BITS == 3:
                h = load_nibbles(codes + DIM * TOKENS, dims[None, :], offsets[:, None], TOKENS, value_mask)
                p0, p1, p2, p3 = points3(x, h, value_table, ASM)
            else:
                p0, p1, p2, p3 = points2(x, value_table, ASM)
        acc, offset = _add_values(acc, offset, e0, p0, head, 0, SCALE_VALUE, TOKENS, TOKENS_PAD, ASM)
        acc, offset = _add_values(acc, offset, e1, p1, head, TOKENS, SCALE_VALUE, TOKENS, TOKENS_PAD, ASM)
        if V_GROUPS == 4:
            e2, e3 = tl.exp2(s2 - base[:, None]), tl.exp2(s3 - base[:, None])
            weight += tl.sum(e2, 1) + tl.sum(e3, 1)
            acc, offset = _add_values(acc, offset, e2, p2, head, 2 * TOKENS, SCALE_VALUE, TOKENS, TOKENS_PAD, ASM)
            acc, offset = _add_values(acc, offset, e3, p3, head, 3 * TOKENS, SCALE_VALUE, TOKENS, TOKENS_PAD, ASM)
    _finish(2.0 * acc - POINT_OFFSET * offset[:, None], m, weight, out, lse, rows, dims, ROWS, DIM)


@triton.jit
def raw_split(
    q_ptr, raw_k, raw_v, table_row, start, end, packed_from, packed_to, length, out, lse, head_index,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    WINDOW: tl.constexpr, ROWS_PAD: tl.constexpr, DIM_PAD: tl.constexpr, PAGE_PAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Raw pages start ... end, counted without the packed ones between them."""
    ROWS: tl.constexpr = GROUP * QUERIES
    rows, dims, offsets = tl.arange(0, ROWS_PAD), tl.arange(0, DIM_PAD), tl.arange(0, PAGE_PAD)
    query_at = length - QUERIES + rows // GROUP
    q = _load_query(q_ptr, rows, 0, DIM, DIM, DIM_PAD, ROWS)
    m = tl.full([ROWS_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS_PAD], tl.float32)
    acc = tl.zeros([ROWS_PAD, DIM_PAD], tl.float32)
    for index in range(start, end):
        page = tl.where(index < packed_from, index, index + tl.maximum(packed_to - packed_from, 0))
        slot = tl.load(table_row + page).to(tl.int64)
        at = (slot * PAGE * HEADS + head_index) * DIM
        mask = (offsets < PAGE)[None, :] & (dims < DIM)[:, None]
        key = tl.load(raw_k + at + offsets[None, :] * (HEADS * DIM) + dims[:, None], mask=mask, other=0.0)
        s = dot_bf16(q, key.to(tl.bfloat16), tl.zeros([ROWS_PAD, PAGE_PAD], tl.float32), ASM)
        position = page * PAGE + offsets
        seen = (offsets < PAGE)[None, :] & (position[None, :] <= query_at[:, None])
        if WINDOW > 0:
            seen = seen & (position[None, :] > query_at[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        fade, p = tl.exp2(m - base), tl.exp2(s - base[:, None])
        weight, m = weight * fade + tl.sum(p, 1), m_new
        # What lies after the newest token was never written: it must not meet a weight of zero as NaN.
        mask = (page * PAGE + offsets < length)[:, None] & (offsets < PAGE)[:, None] & (dims < DIM)[None, :]
        value = tl.load(raw_v + at + offsets[:, None] * (HEADS * DIM) + dims[None, :], mask=mask, other=0.0)
        acc = dot_bf16(p.to(tl.bfloat16), value.to(tl.bfloat16), acc * fade[:, None], ASM)
    _finish(acc, m, weight, out, lse, rows, dims, ROWS, DIM)
