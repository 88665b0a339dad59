"""Steps of dense recurrences: a program computes a tile, some rows of the batch by some units.

A unit needs the whole last state, which all programs of the step before have written.  The end of a
kernel is the barrier between them, so every step is a kernel of its own, or two.
"""

# B batch, N units

from math import prod
from typing import Any

import triton
import triton.language as tl

from seqlm.ops.triton.launch import launch
from seqlm.ops.triton.numbers import product

# Rows of the batch and units of a tile, and how many bytes of a row its products together add up at
# a time.  Derived for an H100, not measured.  A step is short, so all its weights should be loaded
# at once: for LEM with B = 64, D = 512 that is 64 small tiles, each of which reads at most 96 kB of
# bfloat16, as much as shared memory holds from compute capability 8.0 on.  Large tiles read the
# weights half as often, and are taken where they still make enough programs.  Tiles have more units
# than rows, because Triton then gives each warp 8 units of its own; else all would do the same.
SMALL, LARGE = (16, 32, 512), (32, 64, 256)
PROGRAMS, STAGES = 64, 5


@triton.jit
def tile_of(B, N, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The program's rows of the batch, (ROWS, 1), its units, (1, UNITS), and which exist."""
    r = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    n = (tl.program_id(0) * UNITS + tl.arange(0, UNITS))[None, :]
    return r, n, (r < B) & (n < N)


@triton.jit
def products(xs, ws, totals, rows, units, K, INNER: tl.constexpr):
    """total + x w for each x of xs, w of ws and total of totals.

    x: (ROWS, 1), w: (1, UNITS), pointers to the first of K numbers side by side, in the dtype of
    the products; `rows` and `units` say which exist.
    """
    for start in range(0, K, INNER):
        i = start + tl.arange(0, INNER)
        across, down = i[None, :], i[:, None]
        of_x, of_w, sums = rows & (across < K), units & (down < K), ()
        for part in tl.static_range(len(xs)):
            x = tl.load(xs[part] + across, of_x, other=0.0)
            w = tl.load(ws[part] + down, of_w, other=0.0)
            sums += (product(x, w, totals[part]),)
        totals = sums
    return totals


def run_tiles(
    kernel: Any, shape: tuple[int, int], parts: int, *arguments: Any, **constants: Any
) -> None:
    """Run a kernel for (B, N), each of whose programs adds up `parts` products at a time."""
    batch, size = shape

    def grid(rows: int, units: int, _: int) -> tuple[int, int]:
        return triton.cdiv(size, units), triton.cdiv(batch, rows)

    tile = LARGE if prod(grid(*LARGE)) >= PROGRAMS else SMALL
    rows, units, wide = tile
    wide //= triton.next_power_of_2(parts) * arguments[0].element_size()
    constants |= dict(ROWS=rows, UNITS=units, INNER=wide)
    launch(kernel, grid(*tile), *arguments, **constants, warps=units // 8, stages=STAGES)
