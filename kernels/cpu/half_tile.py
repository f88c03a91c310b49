"""The inner loop of a product with fp16 weights, written in LLVM's own language.

A tile is a few rows times two vectors of outputs. Its sums must stay in registers from the first term to the last,
which no loop over arrays gets a compiler to do for 28 vectors; here they are values that were never in memory. Each sum
is one chain of fused multiply-adds in the order of the terms, whatever tile it is in: a row's numbers are the same to
the bit however many rows there are.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import compiled, target_cpu

_FEATURES = frozenset(target_cpu()[1].split(","))
_WIDE = "+avx512f" in _FEATURES
LANES = 16 if _WIDE else 8  # numbers of a vector
COLUMNS = 2 * LANES  # outputs of a tile
# Of a tile: with its two sums a row they fill the registers (32 or 16), less those for two weights and one input.
MOST_ROWS = 14 if _WIDE else 6
# How far ahead of the sums weights are asked for. By itself a CPU looks ahead to the end of a page of 4 KB.
_AHEAD = 4096  # bytes

BLOCK_ROWS = 140  # ten full tiles; half as many read the weights too often, more leave the cache

_INDEX, _FLOAT = ir.IntType(64), ir.FloatType()
_VECTOR, _HALVES = ir.VectorType(_FLOAT, LANES), ir.VectorType(ir.HalfType(), LANES)
_ADDRESS = ir.IntType(8).as_pointer()
_ALL_LANES = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)


def may_compile() -> bool:
    """Whether the CPU that is compiled for has the instructions (x86: AVX2, FMA, F16C).

    Only a reason not to try: without them LLVM looks for functions that are not there, which ends the process.
    """
    return {"+avx2", "+fma", "+f16c"} <= _FEATURES


def _half_tile(typingctx, x, weights, out, rows, terms, out_stride):
    """out[r, c] = the sum of x[r, k] weights[k, c] over all k, for 1 to MOST_ROWS rows and COLUMNS columns.

    `x`, `weights` and `out` are addresses: fp32 [rows, terms], fp16 [terms, COLUMNS], aligned to a vector, and fp32
    with `out_stride` numbers from row to row. There is at least one term.
    """
    signature = types.void(types.uintp, types.uintp, types.uintp, types.intp, types.intp, types.intp)

    def build(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> Any:
        x, weights, out, rows, terms, out_stride = args
        end = builder.append_basic_block("end")
        cases = builder.switch(rows, end)
        for count in range(1, MOST_ROWS + 1):
            block = builder.append_basic_block(f"rows{count}")
            cases.add_case(ir.Constant(_INDEX, count), block)
            builder.position_at_end(block)
            sums = _sums(builder, count, x, weights, terms)
            for row, pair in enumerate(sums):
                for half, value in enumerate(pair):
                    place = _at(builder, out, _times(builder, out_stride, 4 * row), 4 * LANES * half)
                    builder.store(value, builder.inttoptr(place, _VECTOR.as_pointer()), align=4)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, build


half_tile: Any = intrinsic(_half_tile)


def _sums(builder: ir.IRBuilder, rows: int, x: Any, weights: Any, terms: Any) -> list[list[Any]]:
    """A loop over the terms with all sums in registers: [rows][2] vectors."""
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
    )
    rows_of_x = [_at(builder, x, _times(builder, terms, 4 * row)) for row in range(rows)]
    before, loop = builder.block, builder.append_basic_block("terms")
    after = builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_INDEX)
    k.add_incoming(ir.Constant(_INDEX, 0), before)
    sums = [[builder.phi(_VECTOR) for _ in range(2)] for _ in range(rows)]
    pair, line = [], _times(builder, k, 2 * COLUMNS)
    _prefetch(builder, _at(builder, weights, line, _AHEAD))
    for half in range(2):
        place = _at(builder, weights, line, 2 * LANES * half)
        halves = builder.load(builder.inttoptr(place, _HALVES.as_pointer()), align=2 * LANES)
        pair.append(builder.fpext(halves, _VECTOR))
    grown = []
    for row, start in enumerate(rows_of_x):
        number = builder.load(builder.inttoptr(_at(builder, start, _times(builder, k, 4)), _FLOAT.as_pointer()))
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        everywhere = builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), _ALL_LANES)
        grown.append([builder.call(fma, [everywhere, pair[half], sums[row][half]]) for half in range(2)])
    following = builder.add(k, ir.Constant(_INDEX, 1))
    k.add_incoming(following, loop)
    for row in range(rows):
        for half in range(2):
            sums[row][half].add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
            sums[row][half].add_incoming(grown[row][half], loop)
    builder.cbranch(builder.icmp_signed("<", following, terms), loop, after)
    builder.position_at_end(after)
    return grown


def _prefetch(builder: ir.IRBuilder, address: Any) -> None:
    """Has the line at an address brought to the nearest cache, for reading; what is no memory of ours is let be."""
    number = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [_ADDRESS, number, number, number])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", (_ADDRESS,), kind)
    reading, nearest, data = (ir.Constant(number, value) for value in (0, 3, 1))
    builder.call(prefetch, [builder.inttoptr(address, _ADDRESS), reading, nearest, data])


def _times(builder: ir.IRBuilder, value: Any, factor: int) -> Any:
    return builder.mul(value, ir.Constant(_INDEX, factor))


def _at(builder: ir.IRBuilder, address: Any, offset: Any, constant: int = 0) -> Any:
    return builder.add(builder.add(address, offset), ir.Constant(_INDEX, constant))


@compiled()
def multiply_panels(x: Any, packed: Any, out: Any, first: int, end: int) -> None:
    """out [T, O] = x [T, I] times the panels [first, end) of the weights [P, I, COLUMNS], bits of fp16."""
    rows, terms = x.shape
    outputs = out.shape[1]
    spare = np.empty(MOST_ROWS * COLUMNS, dtype=np.float32)  # where the last panel has more columns than outputs
    xs, weights, outs = x.ctypes.data, packed.ctypes.data, out.ctypes.data
    for block in range(0, rows, BLOCK_ROWS):
        size = min(BLOCK_ROWS, rows - block)
        tiles = (size + MOST_ROWS - 1) // MOST_ROWS
        for panel in range(first, end):
            whole = (panel + 1) * COLUMNS <= outputs
            panel_at = weights + np.uint64(2 * panel * terms * COLUMNS)
            for tile in range(tiles):
                row, count = block + size * tile // tiles, size * (tile + 1) // tiles - size * tile // tiles
                x_at = xs + np.uint64(4 * row * terms)
                if whole:
                    place = outs + np.uint64(4 * (row * outputs + panel * COLUMNS))
                    half_tile(x_at, panel_at, place, count, terms, outputs)
                    continue
                half_tile(x_at, panel_at, spare.ctypes.data, count, terms, COLUMNS)
                for r in range(count):
                    for column in range(panel * COLUMNS, outputs):
                        out[row + r, column] = spare[r * COLUMNS + column - panel * COLUMNS]
