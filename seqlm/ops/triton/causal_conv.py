"""The depthwise convolution over time: one kernel each way, in chunks of time."""

# B batch, T time, D width, K kernel

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.lanes import block_of, lanes, programs_of, steps
from seqlm.ops.triton.launch import launch
from seqlm.ops.triton.numbers import only, read, write

# Derived for an H100, not measured.  The memory bus is busy while 18 kB are on their way for each
# multiprocessor (3.35 TB/s in 0.7 us).  A program has 8 places of 64 channels on their way, 1 kB of
# bfloat16 or 2 kB of float32, for half of its time: so 16 to 32 programs on each of 132
# multiprocessors.  With more, more of what lies before a chunk would be read twice, and more parts
# would be left to sum.
PROGRAMS = 16 * 132
SHORTEST = 16  # places of a chunk
LONGEST_KERNEL = 16  # whose window, weights and sums registers hold


def serves(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    width, kernel = len(weight), weight.shape[-1]
    if (weight.shape, x.shape[2:], bias.shape) != ((width, 1, kernel), (width,), (width,)):
        return False
    whole = weight.dtype == bias.dtype == torch.float32
    return whole and kernel <= min(x.shape[1], LONGEST_KERNEL)


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensors, Tensors]:
    """In x's dtype; sums are float32."""
    x, weight = x.contiguous(), weight.contiguous()
    (batch, places, width), kernel = x.shape, weight.shape[2]
    time = places - kernel + 1
    y, length = x.new_empty(batch, time, width), chunk(x, time)
    arguments = x, weight, bias.contiguous(), y, time, width, length
    _launch(conv_forward, y, length, *arguments, K=kernel)
    return (y,), (x, weight)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    (x, weight), (dy,) = saved, gradients
    batch, time, width = dy.shape
    kernel, dx, length = weight.shape[2], torch.empty_like(x), chunk(x, x.shape[1])
    count = triton.cdiv(x.shape[1], length)
    parts = weight.new_empty(batch * count, kernel + 1, width)
    arguments = x, weight, dy.contiguous(), dx, parts, time, width, length
    _launch(conv_backward, dx, length, *arguments, K=kernel)
    *dw, db = parts.sum(0)
    return dx, torch.stack(dw, 1).unsqueeze(1), db


@triton.jit
def columns(pointer, row, D, c, inside, N: tl.constexpr):
    """N rows from `row` on, as a tuple."""
    rows = ()
    for i in tl.static_range(N):
        rows += (read(pointer + (row + i) * D, c, inside),)
    return rows


@triton.jit(do_not_specialize=["T", "length"])
def conv_forward(
    x,
    weight,
    bias,
    y,
    T,
    D,
    length,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """y of a chunk of `length` places.  x: (B, K - 1 + T, D), weight: (D, K)."""
    b, c, inside = lanes(D, BLOCK)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, T)
    shift = read(bias, c, inside)
    weights = columns(weight, 0, 1, c * K, inside, K)
    first = b * (T + K - 1)
    past = columns(x, first + begin, D, c, inside, K - 1)
    for start in range(begin, end, UNROLL):
        window = past
        for i in tl.static_range(UNROLL):
            row = first + start + i + K - 1
            window += (read(x + row * D, c, only(inside, start + i < end)),)
        for i in tl.static_range(UNROLL):
            total = shift
            for k in tl.static_range(K):
                total += weights[k] * window[i + k]
            write(y + (b * T + start + i) * D, c, total, only(inside, start + i < end))
        past = window[UNROLL:]


@triton.jit(do_not_specialize=["T", "length"])
def conv_backward(
    x,
    weight,
    dy,
    dx,
    parts,
    T,
    D,
    length,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """dx of a chunk of `length` of the K - 1 + T places of x, and the chunk's part in the gradients
    of the weights and the bias.  parts: (B, chunks, K + 1, D)."""
    b, c, inside = lanes(D, BLOCK)
    begin = tl.program_id(1) * length
    places = T + K - 1
    end = tl.minimum(begin + length, places)
    weights = columns(weight, 0, 1, c * K, inside, K)
    past, sums = (), ()
    for i in tl.static_range(K - 1):
        t = begin + i - (K - 1)
        past += (read(dy + (b * T + t) * D, c, only(inside, (t >= 0) & (t < T))),)
    for _ in tl.static_range(K + 1):
        sums += (tl.full((BLOCK,), 0.0, tl.float32),)
    for start in range(begin, end, UNROLL):
        window, xs = past, ()
        for i in tl.static_range(UNROLL):
            t = start + i
            window += (read(dy + (b * T + t) * D, c, only(inside, t < tl.minimum(end, T))),)
            xs += (read(x + (b * places + t) * D, c, only(inside, t < end)),)
        news = ()
        for k in tl.static_range(K):
            total = sums[k]
            for i in tl.static_range(UNROLL):
                total += window[i + K - 1 - k] * xs[i]
            news += (total,)
        total = sums[K]
        for i in tl.static_range(UNROLL):
            total += window[i + K - 1]
        sums = news + (total,)
        for i in tl.static_range(UNROLL):
            d = tl.full((BLOCK,), 0.0, tl.float32)
            for k in tl.static_range(K):
                d += weights[k] * window[i + K - 1 - k]
            write(dx + (b * places + start + i) * D, c, d, only(inside, start + i < end))
        past = window[UNROLL:]
    to = (b * tl.num_programs(1) + tl.program_id(1)) * (K + 1)
    for k in tl.static_range(K + 1):
        write(parts + (to + k) * D, c, sums[k], inside)


def chunk(x: Tensor, places: int) -> int:
    """Places of a chunk of time; x: (B, ., D), of which `places` are computed."""
    count = triton.cdiv(PROGRAMS, max(programs_of(x), 1))
    return min(max(triton.cdiv(places, count), SHORTEST), places)


def _launch(kernel: Any, over: Tensor, length: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel for every chunk of every lane of `over`: (B, ., D)."""
    _, places, width = over.shape
    constants |= dict(BLOCK=block_of(width), UNROLL=steps(8, length))
    launch(kernel, (programs_of(over), triton.cdiv(places, length)), *arguments, **constants)
