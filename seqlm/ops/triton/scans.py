"""The gated and the linear scan: one forward and one backward kernel.

PARTS: 1 for a linear scan; 2 or 3 for a gated scan, whose drive has so many parts of H channels.

If lanes are few, chunks of time run side by side.  A step is a linear function of the state, and so
is a whole chunk: h = a h + b and end = factor * start + offset.  A first kernel finds every chunk's
factor and offset, a short scan over chunks finds the state in which each chunk ends, and the last
kernel computes every chunk from its first state.
"""

# B batch, T time, H state width

from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.triton.lanes import lanes, run_chunks
from seqlm.ops.triton.numbers import mask_if, read, sigmoid, write

LANES_OF_MULTIPROCESSOR = 512  # enough to keep its share of the memory bus busy
SHORTEST_CHUNK = 64  # time steps
LINEAR = dict(PARTS=1, POSITIVE=False)  # what the kernels of a linear scan are compiled for


@triton.jit
def gate(k, k_i, PARTS: tl.constexpr):
    """z and 1 - z: for the logit k, or for the two gates of the logits k and k_i."""
    z, keep = sigmoid(k)
    if PARTS == 3:
        # where both gates are small, their ratio does not change when both are scaled up: the
        # common shift keeps the exponentials from overflowing
        shift = tl.maximum(-40.0 - tl.maximum(k, k_i), 0.0)
        # tl.where and not tl.minimum, which would replace NaN by a number
        f = 1.0 + tl.exp(tl.where(k + shift < -80.0, 80.0, -(k + shift)))
        i = 1.0 + tl.exp(tl.where(k_i + shift < -80.0, 80.0, -(k_i + shift)))
        z, keep = f / (f + i), i / (f + i)
    return z, keep


@triton.jit
def candidate(u, POSITIVE: tl.constexpr):
    """Returns g(u) and g'(u)."""
    g, slope = u, tl.full(u.shape, 1.0, tl.float32)
    if POSITIVE:
        s, rest = sigmoid(u)
        g, slope = tl.where(u >= 0, u + 0.5, s), tl.where(u >= 0, 1.0, s * rest)
    return g, slope


@triton.jit
def coefficients(x, x_i, y, PARTS: tl.constexpr, POSITIVE: tl.constexpr):
    """a and b of a step h = a h + b: x and y themselves, or computed from a gated scan's drive."""
    a, b = x, y
    if PARTS > 1:
        z, a = gate(x, x_i, PARTS)
        g, _ = candidate(y, POSITIVE)
        b = z * g
    return a, b


@triton.jit
def gradients(d, old, x, x_i, y, PARTS: tl.constexpr, POSITIVE: tl.constexpr):
    """dL/d(x, x_i, y, old state) of a step; d: dL/d(new state)."""
    dx, dx_i, dy, d_old = d * old, d, d, d * x
    if PARTS > 1:
        z, keep = gate(x, x_i, PARTS)
        g, slope = candidate(y, POSITIVE)
        dx, dy, d_old = d * (g - old) * z * keep, d * z * slope, d * keep
    if PARTS == 3:
        _, rest = sigmoid(x)
        _, rest_i = sigmoid(x_i)
        dx, dx_i = -dx * rest, dx * rest_i
    return dx, dx_i, dy, d_old


@triton.jit
def drive_at(xs, ys, row, channels, H, mask, PARTS: tl.constexpr, Y_PARTS: tl.constexpr):
    """x, x_i and y at one row of xs, (B T, PARTS H), and of ys, (B T, Y_PARTS H), where y is the
    last part."""
    x = read(xs + row * PARTS * H, channels, mask)
    x_i = x
    if PARTS == 3:
        x_i = read(xs + row * PARTS * H + H, channels, mask)
    return x, x_i, read(ys + (row * Y_PARTS + Y_PARTS - 1) * H, channels, mask)


@triton.jit
def beginning(first, ends, b, channels, H, inside):
    """A chunk's state before its first step: `first`, or the end of the previous chunk."""
    chunk = tl.program_id(1)
    previous = b * (tl.num_programs(1) - 1) + chunk - 1
    # one of the masks is all False, and gives 0
    state = read(first + b * H, channels, mask_if(inside, chunk == 0))
    return state + read(ends + previous * H, channels, mask_if(inside, chunk > 0))


@triton.jit(do_not_specialize=["T", "length"])
def scan_forward(
    xs, ys, h0, ends, h, last, T, H, length,
    PARTS: tl.constexpr, POSITIVE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """h of a chunk of `length` steps.  ends: (B, chunks - 1, H), where chunks but the last end."""
    b, channels, inside = lanes(H, BLOCK)
    chunk = tl.program_id(1)
    begin = chunk * length
    end = tl.minimum(begin + length, T)
    state = beginning(h0, ends, b, channels, H, inside)
    for start in range(begin, end, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            row, mask = b * T + start + i, mask_if(inside, start + i < end)
            drives += (drive_at(xs, ys, row, channels, H, mask, PARTS, PARTS),)
        for i in tl.static_range(UNROLL):
            t = start + i
            x, x_i, y = drives[i]
            keep, new = coefficients(x, x_i, y, PARTS, POSITIVE)
            state = tl.where(t < end, keep * state + new, state)
            write(h + (b * T + t) * H, channels, state, mask_if(inside, t < end))
    write(last + b * H, channels, state, mask_if(inside, end == T))


@triton.jit(do_not_specialize=["T", "length"])
def scan_backward(
    xs, ys, h0, h, dh, d_last, ends, dxs, dys, dh0, T, H, length,
    PARTS: tl.constexpr, POSITIVE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk of `length` steps, from its last step to its first.

    Chunks count from the last time step on.  In: dh, d_last: dL/dh_t and dL/d(last state) through
    the outputs alone; ends: what later chunks pass on to earlier ones, (B, chunks - 1, H).
    Out: dxs, dys and dh0: dL/d(xs, ys, h0).  carry: what step t + 1 adds to dL/dh_t.
    """
    b, channels, inside = lanes(H, BLOCK)
    chunk = tl.program_id(1)
    begin = chunk * length
    end = tl.minimum(begin + length, T)
    carry = beginning(d_last, ends, b, channels, H, inside)
    first = read(h0 + b * H, channels, inside)
    for start in range(begin, end, UNROLL):
        drives, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            mask = mask_if(inside, start + i < end)
            t = T - 1 - start - i
            row = b * T + t
            drives += (drive_at(xs, ys, row, channels, H, mask, PARTS, PARTS),)
            olds += (read(h + (row - 1) * H, channels, mask_if(mask, t > 0)),)
            d_outs += (read(dh + row * H, channels, mask),)
        for i in tl.static_range(UNROLL):
            mask = mask_if(inside, start + i < end)
            t = T - 1 - start - i
            row = b * T + t
            x, x_i, y = drives[i]
            old = tl.where(t > 0, olds[i], first)
            d = d_outs[i] + carry
            dx, dx_i, dy, d_old = gradients(d, old, x, x_i, y, PARTS, POSITIVE)
            write(dxs + row * PARTS * H, channels, dx, mask)
            if PARTS == 3:
                write(dxs + row * PARTS * H + H, channels, dx_i, mask)
            write(dys + (row * PARTS + PARTS - 1) * H, channels, dy, mask)
            carry = tl.where(start + i < end, d_old, carry)
    write(dh0 + b * H, channels, carry, mask_if(inside, end == T))


@triton.jit(do_not_specialize=["T", "length"])
def scan_ends(
    xs, ys, factors, offsets, T, H, length,
    PARTS: tl.constexpr, POSITIVE: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The linear function that maps a chunk's start to its end: end = factor * start + offset.

    factors, offsets: (B, chunks - 1, H).  BACKWARD: the same for the gradient that is passed from
    step to step; chunks count from the last step to the first, and ys is dL/dh, (B, T, H).
    """
    b, channels, inside = lanes(H, BLOCK)
    Y_PARTS: tl.constexpr = 1 if BACKWARD else PARTS
    begin = tl.program_id(1) * length
    end = begin + length
    factor, offset = tl.full((BLOCK,), 1.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(begin, end, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            if BACKWARD:
                row = b * T + T - 1 - start - i
            mask = mask_if(inside, start + i < end)
            drives += (drive_at(xs, ys, row, channels, H, mask, PARTS, Y_PARTS),)
        for i in tl.static_range(UNROLL):
            x, x_i, y = drives[i]
            keep, new = coefficients(x, x_i, y, PARTS, POSITIVE)
            if BACKWARD:
                new = keep * y
            factor = tl.where(start + i < end, keep * factor, factor)
            offset = tl.where(start + i < end, keep * offset + new, offset)
    to = (b * tl.num_programs(1) + tl.program_id(1)) * H
    write(factors + to, channels, factor, inside)
    write(offsets + to, channels, offset, inside)


def scan(x: Tensor, y: Tensor, h0: Tensor, positive: bool = False) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t: (B, T, H) in y's dtype, and the last h.

    x and y are a and b; for a gated scan, both are the drive.
    """
    form = _form(x, h0, positive)
    h, last = y.new_empty(*x.shape[:2], h0.shape[1]), torch.empty_like(h0)
    ends, chunks = chunk_ends(x, y, h0, BACKWARD=False, **form)
    run_chunks(scan_forward, h0, chunks, x, y, h0, ends, h, last, steps=16, **form)
    return h, last


def scan_gradients(
    x: Tensor, y: Tensor, h0: Tensor, h: Tensor, dh: Tensor, d_last: Tensor, positive: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/d(x, y, h0) in `scan`.  For a gated scan the first two are one tensor.

    The gradients of a linear scan do not depend on y: any tensor of its shape and dtype serves.
    """
    form = _form(x, h0, positive)
    dx, dh0 = torch.empty_like(x), torch.empty_like(h0)
    dy = torch.empty_like(y) if form["PARTS"] == 1 else dx
    ends, chunks = chunk_ends(x, dh, d_last, BACKWARD=True, **form)
    run_chunks(scan_backward, h0, chunks, x, y, h0, h, dh, d_last, ends, dx, dy, dh0, **form)
    return dx, dy, dh0


def _form(x: Tensor, h0: Tensor, positive: bool) -> dict[str, Any]:
    return dict(PARTS=x.shape[2] // h0.shape[1], POSITIVE=positive)


def chunk_ends(
    x: Tensor, y: Tensor, first: Tensor, **form: Any
) -> tuple[Tensor, tuple[int, int, int]]:
    """The states in which all chunks but the last end, (B, chunks - 1, H), and the chunks as
    `run_chunks` takes them: T, the steps of a chunk, and their number.

    first: (B, H), the state before the first chunk.  form: for the kernel that finds the chunks'
    linear functions.
    """
    time = x.shape[1]
    count = chunk_count(len(first) * first.shape[-1], time, first.device)
    length = triton.cdiv(time, count)
    count = triton.cdiv(time, length)
    if count == 1:
        return first, (time, length, count)  # one chunk: its kernel reads no ends
    batch, width = first.shape
    ends, offsets, factors = (first.new_empty(batch, count - 1, width) for _ in range(3))
    arguments = x, y, factors, offsets
    run_chunks(scan_ends, first, (time, length, count - 1), *arguments, steps=16, **form)
    arguments = factors, offsets, first, first, ends, torch.empty_like(first)
    run_chunks(scan_forward, first, (count - 1, count - 1, 1), *arguments, **LINEAR)
    return ends, (time, length, count)


def chunk_count(lanes: int, time: int, device: torch.device) -> int:
    """How many chunks of time a scan computes side by side.  Derived, not measured.

    A lane mostly waits for memory.  The memory bus is busy while as many bytes are in flight as it
    moves in the time of one load: on an H100 3.35 TB/s in 0.7 us, or 18 kB for each multiprocessor.
    A lane has 16 steps of two numbers of 2 or 4 bytes in flight, 64 to 128 bytes, for half of its
    time, so 512 lanes a multiprocessor are enough. Where there are fewer lanes, chunks make up for
    them. Chunks read everything twice and need two more kernels, so fewer than four chunks, or
    chunks of less than 64 steps, are not worth it. The loop over chunks should not be longer than a
    chunk.
    """
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    full = LANES_OF_MULTIPROCESSOR * processors
    count = min(full // max(lanes, 1), time // SHORTEST_CHUNK, isqrt(time))
    return count if count >= 4 else 1
