"""RMSNorm: one kernel each way, a few whole rows at a time."""

# N rows, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops._triton.launch import launch
from seqlm.ops._triton.numbers import read, write

# Derived for an H100, not measured.  A thread has 16 numbers of a tile, which its warp reads in
# whole lines of 128 bytes, and mostly at most 128 registers, of which a multiprocessor has enough
# for 16 warps: 32 kB of float32 under way, of 18 that keep its part of the bus busy (3.35 TB/s in
# 0.7 us), so that warps may compute almost half of the time.
OF_A_WARP = 16 * 32  # numbers
WARPS = 16 * 132  # that add up parts, each of as many tiles as it takes
WIDEST_ROW = 1 << 13  # 16 warps
EPS = torch.finfo(torch.float32).eps  # torch's for rows of 2 bytes, too


@triton.jit
def rows_at(first, end, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows: which, which are there, where their numbers are, and which numbers are there."""
    r = (first + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.arange(0, BLOCK)
    return r, r < end, r[:, None] * D + c[None, :], (r < end)[:, None] & (c < D)[None, :]


@triton.jit(do_not_specialize=["N"])
def norm_forward(x, weight, y, scales, eps, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y: (N, D) as x, scales: (N,), 1 / sqrt(mean(x^2) + eps) of each row."""
    r, rows, at, there = rows_at(tl.program_id(0) * ROWS, N, D, ROWS, BLOCK)
    c = tl.arange(0, BLOCK)
    u = read(x, at, there)
    scale = 1.0 / tl.sqrt(tl.sum(u * u, 1) / D + eps)
    write(scales, r, scale, rows)
    write(y, at, u * scale[:, None] * read(weight, c, c < D)[None, :], there)


@triton.jit(do_not_specialize=["N", "length"])
def norm_backward(
    x,
    weight,
    scales,
    dy,
    dx,
    parts,
    N,
    D,
    length,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of `length` rows, and their part in the gradient of the weight.  parts: (programs, D)."""
    begin = tl.program_id(0) * length
    end = tl.minimum(begin + length, N)
    c = tl.arange(0, BLOCK)
    w = read(weight, c, c < D)[None, :]
    total = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for first in range(begin, end, ROWS):
        r, rows, at, there = rows_at(first, end, D, ROWS, BLOCK)
        u, d = read(x, at, there), read(dy, at, there)
        scale = read(scales, r, rows)[:, None]
        normed = u * scale
        total += d * normed
        d *= w
        mean = tl.sum(d * normed, 1) / D
        write(dx, at, (d - normed * mean[:, None]) * scale, there)
    to = parts + tl.program_id(0).to(tl.int64) * D
    write(to, c, tl.sum(total, 0), c < D)


def normed(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows (N, D) normed, in the dtype, and the factor of each, (N,)."""
    (count, width), (warps, tile) = x.shape, _tile(x.shape[1])
    y, scales = torch.empty_like(x, dtype=dtype), x.new_empty(count, dtype=torch.float32)
    grid = (triton.cdiv(count, tile["ROWS"]),)
    launch(norm_forward, grid, x, weight, y, scales, EPS, count, width, **tile, warps=warps)
    return y, scales


def normed_gradients(
    x: Tensor, weight: Tensor, scales: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """dx in x's dtype, and the gradient of the weight in float32."""
    (count, width), (warps, tile) = x.shape, _tile(x.shape[1])
    rows = tile["ROWS"]
    # a program's rows are whole tiles
    length = rows * triton.cdiv(triton.cdiv(count, rows), WARPS // warps)
    grid = (triton.cdiv(count, max(length, 1)),)
    dx, parts = torch.empty_like(x), scales.new_empty(*grid, width)
    given = x, weight, scales, dy, dx, parts, count, width, length
    launch(norm_backward, grid, *given, **tile, warps=warps)
    return dx, parts.sum(0)


def _tile(width: int) -> tuple[int, dict[str, int]]:
    """Warps of a program, and its rows at a time of a width."""
    block = triton.next_power_of_2(width)
    warps = max(4, block // OF_A_WARP)
    return warps, dict(ROWS=warps * OF_A_WARP // block, BLOCK=block)
