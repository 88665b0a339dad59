"""Steps of dense recurrences: a program computes a tile, some rows of the batch by some units.

A unit reads the whole previous state, which all programs of the previous step have written.  Only
the end of a kernel is a barrier between programs, so every step has one or two kernels of its own.
"""

# B batch, N units

from math import prod
from typing import Any

import triton
import triton.language as tl

from seqlm.ops.triton.launch import launch
from seqlm.ops.triton.numbers import product

# A tile's rows of the batch, its units, and the bytes of a row that its products load at a time,
# all products together.  Derived for an H100, not measured.  A step is short, so all its weights
# should be loaded at once: LEM with B = 64, D = 512 has 64 small tiles, each of which reads at most
# 96 kB of bfloat16, as much as shared memory holds from compute capability 8.0 on.  Large tiles
# read the weights half as often, and are used where they still make enough programs.  Tiles have
# more units than rows, because Triton then gives each warp 8 units of its own; otherwise all warps
# would compute the same.
SMALL, LARGE = (16, 32, 512), (32, 64, 256)
ENOUGH_PROGRAMS = 64
STAGES = 5  # blocks of a product that are in flight


@triton.jit
def tile_of(B, N, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The program's rows of the batch, (ROWS, 1), its units, (1, UNITS), and the tile's mask."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    unit = (tl.program_id(0) * UNITS + tl.arange(0, UNITS))[None, :]
    return row, unit, (row < B) & (unit < N)


@triton.jit
def products(xs, ws, totals, rows, units, K, INNER: tl.constexpr):
    """total + x w for each x of xs, w of ws and total of totals.

    x: (ROWS, 1), w: (1, UNITS), pointers to the first of K adjacent numbers in the products' dtype;
    rows, units: their masks.
    """
    for start in range(0, K, INNER):
        i = start + tl.arange(0, INNER)
        across, down = i[None, :], i[:, None]
        x_mask, w_mask, sums = rows & (across < K), units & (down < K), ()
        for j in tl.static_range(len(xs)):
            x = tl.load(xs[j] + across, x_mask, other=0.0)
            w = tl.load(ws[j] + down, w_mask, other=0.0)
            sums += (product(x, w, totals[j]),)
        totals = sums
    return totals


def run_tiles(
    kernel: Any, shape: tuple[int, int], together: int, *arguments: Any, **constants: Any
) -> None:
    """Run a kernel for all tiles of a shape (B, N).

    together: the number of products that a program computes at the same time.
    """
    batch, size = shape

    def grid(rows: int, units: int, _: int) -> tuple[int, int]:
        return triton.cdiv(size, units), triton.cdiv(batch, rows)

    tile = LARGE if prod(grid(*LARGE)) >= ENOUGH_PROGRAMS else SMALL
    rows, units, row_bytes = tile
    inner = row_bytes // (triton.next_power_of_2(together) * arguments[0].element_size())
    constants |= dict(ROWS=rows, UNITS=units, INNER=inner)
    launch(kernel, grid(*tile), *arguments, **constants, warps=units // 8, stages=STAGES)
