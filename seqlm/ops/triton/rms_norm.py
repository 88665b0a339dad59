"""RMSNorm: one kernel each way, a few whole rows at a time."""

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
# time: 32 kB of float32 on their way.  18 kB keep its part of the memory bus busy (3.35 TB/s in 0.7
# us), so warps may compute almost half of the time.
OF_A_WARP = 16 * 32  # numbers
WARPS = 16 * 132  # of the backward pass, each of as many tiles as it takes
WIDEST_ROW = 1 << 13  # 16 warps
EPS = torch.finfo(torch.float32).eps  # PyTorch takes it for bfloat16, too
WRITTEN = (torch.float32, torch.bfloat16)


def serves(x: Tensor, weight: Tensor) -> bool:
    fits = x.numel() > 0 and weight.ndim == 1 and weight.shape == x.shape[-1:]
    return fits and len(weight) <= WIDEST_ROW and autocast_dtype(x) in WRITTEN


def forward(x: Tensor, weight: Tensor) -> tuple[Tensors, Tensors]:
    """In autocast's dtype where that is on."""
    rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    (count, width), (warps, tile) = rows.shape, _tile(rows.shape[1])
    y = torch.empty_like(rows, dtype=autocast_dtype(x))
    scales = rows.new_empty(count, dtype=torch.float32)
    grid = (triton.cdiv(count, tile["ROWS"]),)
    launch(norm_forward, grid, rows, weight, y, scales, EPS, count, width, **tile, warps=warps)
    return (y.view(x.shape),), (rows, weight, scales)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    (x, weight, scales), (dy,) = saved, gradients
    (count, width), (warps, tile) = x.shape, _tile(x.shape[1])
    rows = tile["ROWS"]
    # a program's rows are whole tiles
    length = rows * triton.cdiv(triton.cdiv(count, rows), WARPS // warps)
    grid = (triton.cdiv(count, length),)
    dx, parts = torch.empty_like(x), scales.new_empty(*grid, width)
    arguments = x, weight, scales, dy.reshape(x.shape).contiguous(), dx, parts
    launch(norm_backward, grid, *arguments, count, width, length, **tile, warps=warps)
    return dx.view(dy.shape), parts.sum(0).to(weight.dtype)


@triton.jit
def rows_at(first, end, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows: their indices, which exist, where their numbers are, and which numbers exist."""
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
    """dx of `length` rows, and their part of the weight's gradient.  parts: (programs, D)."""
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


def _tile(width: int) -> tuple[int, dict[str, int]]:
    """Warps of a program, and its rows at a time of a width."""
    block = triton.next_power_of_2(width)
    warps = max(4, block // OF_A_WARP)
    return warps, dict(ROWS=warps * OF_A_WARP // block, BLOCK=block)
