"""Steps that no program can do whole: kernels of tiles, one behind the other.

The end of a kernel is the barrier behind which the next reads whole rows of what all programs of it
made.
"""

# B batch, G heads, S units of a head

from math import prod
from typing import Any

import triton
import triton.language as tl

from seqlm.ops._triton.launch import launch
from seqlm.ops._triton.numbers import product

# Rows of a batch and units that a program does, and bytes of each that its products, all together,
# add at a time.  Derived for an H100, not measured.  A step is short, so all its weights should be
# on their way at once: of LEM with B = 64, D = 512 that is 64 small tiles, each with at most 96 kB
# of bfloat16 to read, which its stages ask for together, and which is what shared memory holds from
# compute capability 8.0 on.  Large tiles read the weights half as often, where there are programs
# enough.  Tiles have more units than rows, as Triton then gives each warp 8 of its own; else all
# would do the same.
SMALL, LARGE = (16, 32, 512), (32, 64, 256)
PROGRAMS, STAGES = 64, 5


@triton.jit
def tile_of(B, S, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The program's head, its rows of the batch, its units of the head, and which there are."""
    r = (tl.program_id(2) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    n = (tl.program_id(0) * UNITS + tl.arange(0, UNITS))[None, :]
    return tl.program_id(1), r, n, (r < B) & (n < S)


@triton.jit
def products(xs, ws, totals, rows, units, K, INNER: tl.constexpr):
    """total + x w of each.  x: (ROWS, 1), w: (1, UNITS), pointers to the first of K numbers side by
    side, of which `rows` and `units` are there, in the dtype of products."""
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
    kernel: Any, shape: tuple[int, int, int], parts: int, *arguments: Any, **constants: Any
) -> None:
    """A kernel for a shape (B, G, S), each of whose programs adds `parts` products at a time."""
    batch, heads, size = shape

    def grid(rows: int, units: int, _: int) -> tuple[int, int, int]:
        return triton.cdiv(size, units), heads, triton.cdiv(batch, rows)

    tile = LARGE if prod(grid(*LARGE)) >= PROGRAMS else SMALL
    rows, units, wide = tile
    wide //= triton.next_power_of_2(parts) * arguments[0].element_size()
    constants |= dict(ROWS=rows, UNITS=units, INNER=wide)
    launch(kernel, grid(*tile), *arguments, **constants, warps=units // 8, stages=STAGES)
