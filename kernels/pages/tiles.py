"""Parts of packing and unpacking on a CPU, compiled by Numba: they work on a tile, the numbers of one KV head and page.

A tile [D, T] has a row for each dimension and a column for each token, so that a rotation is sums of whole rows, and
what belongs to a token stays in one lane of a vector. Only the way in and the way out are transposed.

Indices are unsigned, which spares Numba the look whether they are negative; slices are few, because counting their
references costs as much as a hundred numbers' sum.
"""

from typing import Any

import numpy as np

from ..cpu.compiled import compiled

U = np.uint64
# Sums may be reordered and products fused; NaN and infinity stay what they are, because packing looks for them.
FAST = {"reassoc", "contract", "nsz"}


@compiled(error_model="numpy", fastmath=FAST)
def rotate(tile: Any, columns: int, paley: Any, spare: Any) -> None:
    """tile = H tile, in place. `paley` is H's second factor [m, m] (its transpose gives Hᵀ); `spare` is as long as the
    tile."""
    size, width = len(tile), len(paley) * columns
    if len(paley) > 1:
        spare[:size] = tile
        for start in range(0, size, width):
            _rotate_paley(spare[start : start + width], tile[start : start + width], paley)
    while 4 * width <= size:  # two steps of Sylvester's factor at once
        for start in range(0, size, 4 * width):
            # Slices, because LLVM then knows that these do not overlap.
            a, b = tile[start : start + width], tile[start + width : start + 2 * width]
            c, d = tile[start + 2 * width : start + 3 * width], tile[start + 3 * width : start + 4 * width]
            for i in range(width):
                p, q, r, s = a[i] + b[i], a[i] - b[i], c[i] + d[i], c[i] - d[i]
                a[i], b[i], c[i], d[i] = p + r, q + s, p - r, q - s
        width *= 4
    if width < size:
        a, b = tile[:width], tile[width:]
        for i in range(width):
            p, q = a[i] + b[i], a[i] - b[i]
            a[i], b[i] = p, q


@compiled(error_model="numpy", fastmath=FAST)
def _rotate_paley(source: Any, target: Any, paley: Any) -> None:
    """target = paley source, of as many rows as `paley` has."""
    order = U(len(paley))
    width = U(len(source)) // order
    for row in range(U(0), order):
        for i in range(U(0), width):
            target[row * width + i] = np.float32(0)
        for column in range(U(0), order, U(4)):
            p, q = paley[row, column], paley[row, column + U(1)]
            r, s = paley[row, column + U(2)], paley[row, column + U(3)]
            a, to = column * width, row * width
            b, c, d = a + width, a + U(2) * width, a + U(3) * width
            for i in range(U(0), width):
                target[to + i] += (p * source[a + i] + q * source[b + i]) + (r * source[c + i] + s * source[d + i])


@compiled(error_model="numpy")
def transpose(source: Any, start: Any, rows: Any, columns: Any, out: Any, to: Any, stride: Any) -> None:
    """out[to + stride i + j] = source[start + columns j + i] for all rows j and columns i."""
    for i in range(U(0), columns):
        for j in range(U(0), rows):
            out[to + stride * i + j] = source[start + columns * j + i]


@compiled()
def to_codes(grid: Any, steps: Any, half: int, codes: Any) -> None:
    """Codes of floored numbers, int8 within ±126. `steps`: `codebook.magnitude_steps`; `half`: how many magnitudes.

    n >= m is n kept between m - 1 and m, less m - 1: that stays in bytes, where LLVM widens sums of truth values.
    """
    a, b, c, d, e, f, g = steps[0], steps[1], steps[2], steps[3], steps[4], steps[5], steps[6]
    p, q, r, s = np.int8(a - 1), np.int8(b - 1), np.int8(c - 1), np.int8(d - 1)
    t, u, v = np.int8(e - 1), np.int8(f - 1), np.int8(g - 1)
    base, full = np.int8(half - (p + q + r + s + t + u + v)), np.int8(2 * half - 1)
    for i in range(len(grid)):
        sign = np.int8(grid[i] >> 7)
        n = np.int8(grid[i] ^ sign)
        low = max(min(n, a), p) + max(min(n, b), q) + max(min(n, c), r) + max(min(n, d), s)
        code = np.int8(base + low + max(min(n, e), t) + max(min(n, f), u) + max(min(n, g), v))
        codes[i] = np.uint8(code ^ (sign & full))


@compiled()
def to_centroids(codes: Any, steps: Any, half: int, out: Any) -> None:
    """The centroids of codes, int8."""
    least = steps[7]
    ba, bb, bc, bd, be, bf, bg = steps[8], steps[9], steps[10], steps[11], steps[12], steps[13], steps[14]
    for i in range(len(codes)):
        n = np.int8(codes[i] - half)
        sign = np.int8(n >> 7)
        k: Any = np.int8(n ^ sign)
        low = (-(k > 0) & ba) + (-(k > 1) & bb) + (-(k > 2) & bc) + (-(k > 3) & bd)
        size = np.int8(least + low + (-(k > 4) & be) + (-(k > 5) & bf) + (-(k > 6) & bg))
        out[i] = np.int8((size ^ sign) - sign)
