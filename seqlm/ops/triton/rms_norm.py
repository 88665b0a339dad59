"""RMSNorm: one forward and one backward kernel, a few whole rows at a time."""

# N rows, D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors, autocast_dtype
from seqlm.ops.triton.launch import launch
from seqlm.ops.triton.numbers import read, write

# Derived for an H100, not measured.  A thread has 16 numbers of a tile, which its warp reads in
# whole lines of 128 bytes, and mostly at most 128 registers, so a multiprocessor runs 16 warps at a
# time: 32 kB of float32 in flight.  18 kB keep its share of the memory bus busy (3.35 TB/s in 0.7
# us), so warps may compute almost half of the time.
NUMBERS_OF_WARP = 16 * 32  # in a tile
BACKWARD_WARPS = 16 * 132  # of all programs together; a program may compute several tiles
WIDEST_ROW = 1 << 13  # 16 warps
EPSILON = torch.finfo(torch.float32).eps  # PyTorch uses it for bfloat16, too
OUTPUT_DTYPES = (torch.float32, torch.bfloat16)


def serves(x: Tensor, weight: Tensor) -> bool:
    fits = x.numel() > 0 and weight.ndim == 1 and weight.shape == x.shape[-1:]
    return fits and len(weight) <= WIDEST_ROW and autocast_dtype(x) in OUTPUT_DTYPES


def forward(x: Tensor, weight: Tensor) -> tuple[Tensors, Tensors]:
    """In autocast's dtype where that is on."""
    rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    (count, width), (warps, tile) = rows.shape, _tile(rows.shape[1])
    y = torch.empty_like(rows, dtype=autocast_dtype(x))
    scales = rows.new_empty(count, dtype=torch.float32)
    grid = (triton.cdiv(count, tile["ROWS"]),)
    launch(norm_forward, grid, rows, weight, y, scales, EPSILON, count, width, **tile, warps=warps)
    return (y.view(x.shape),), (rows, weight, scales)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    (x, weight, scales), (dy,) = saved, gradients
    (count, width), (warps, tile) = x.shape, _tile(x.shape[1])
    rows = tile["ROWS"]
    # a program's rows are whole tiles
    length = rows * triton.cdiv(triton.cdiv(count, rows), BACKWARD_WARPS // warps)
    grid = (triton.cdiv(count, length),)
    dx, partial_sums = torch.empty_like(x), scales.new_empty(*grid, width)
    arguments = x, weight, scales, dy.reshape(x.shape).contiguous(), dx, partial_sums
    launch(norm_backward, grid, *arguments, count, width, length, **tile, warps=warps)
    return dx.view(dy.shape), partial_sums.sum(0).to(weight.dtype)


@triton.jit
def rows_at(first, end, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The indices of ROWS rows, their mask, the offsets of their numbers, and the numbers' mask."""
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, inside = row[:, None] * D + column[None, :], (row < end)[:, None] & (column < D)[None, :]
    return row, row < end, at, inside


@triton.jit(do_not_specialize=["N"])
def norm_forward(x, weight, y, scales, eps, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y: (N, D) as x, scales: (N,), 1 / sqrt(mean(x^2) + eps) of each row."""
    row, rows, at, inside = rows_at(tl.program_id(0) * ROWS, N, D, ROWS, BLOCK)
    column = tl.arange(0, BLOCK)
    numbers = read(x, at, inside)
    scale = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 1) / D + eps)
    write(scales, row, scale, rows)
    write(y, at, numbers * scale[:, None] * read(weight, column, column < D)[None, :], inside)


@triton.jit(do_not_specialize=["N", "length"])
def norm_backward(
    x, weight, scales, dy, dx, partial_sums, N, D, length, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dL/dx of `length` rows; partial_sums: (programs, D), their summands of dL/d(weight)."""
    begin = tl.program_id(0) * length
    end = tl.minimum(begin + length, N)
    column = tl.arange(0, BLOCK)
    w = read(weight, column, column < D)[None, :]
    total = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for first in range(begin, end, ROWS):
        row, rows, at, inside = rows_at(first, end, D, ROWS, BLOCK)
        numbers, d_out = read(x, at, inside), read(dy, at, inside)
        scale = read(scales, row, rows)[:, None]
        normed = numbers * scale
        total += d_out * normed
        d_normed = d_out * w
        mean = tl.sum(d_normed * normed, 1) / D
        write(dx, at, (d_normed - normed * mean[:, None]) * scale, inside)
    to = partial_sums + tl.program_id(0).to(tl.int64) * D
    write(to, column, tl.sum(total, 0), column < D)


def _tile(width: int) -> tuple[int, dict[str, int]]:
    """The warps of a program, and its tile: the rows at a time, and the columns, of which `width`
    exist."""
    block = triton.next_power_of_2(width)
    warps = max(4, block // NUMBERS_OF_WARP)
    return warps, dict(ROWS=warps * NUMBERS_OF_WARP // block, BLOCK=block)
