"""The gated and the linear scan: one kernel each way, in chunks of time where lanes are few.

PARTS: 1 for a linear scan; 2 or 3 for a gated scan, whose drive has so many parts of H channels.
"""

# B batch, T time, H state width

from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.triton.lanes import block_of, lanes, programs_of, steps
from seqlm.ops.triton.launch import launch
from seqlm.ops.triton.numbers import only, read, sigmoid, write

LANES = 512  # as many of a multiprocessor keep its share of the memory bus busy
SHORTEST = 64  # steps of a chunk


@triton.jit
def gate(k, k_i, PARTS: tl.constexpr):
    """z and 1 - z: for the logit k, or for the two gates of the logits k and k_i."""
    z, keep = sigmoid(k)
    if PARTS == 3:
        # only the ratio of the gates counts where both are small: both are scaled up together,
        # so that no exponential overflows
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
    """The gradients of x, x_i, y and the old h; d: the gradient of the new h."""
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
def drive_at(xs, ys, row, c, H, mask, PARTS: tl.constexpr):
    """x, x_i and y at one row: of (B T, H) each, or of one drive (B T, PARTS H)."""
    x = read(xs + row * PARTS * H, c, mask)
    x_i = x
    if PARTS == 3:
        x_i = read(xs + row * PARTS * H + H, c, mask)
    return x, x_i, read(ys + (row * PARTS + PARTS - 1) * H, c, mask)


@triton.jit
def beginning(first, ends, b, c, H, inside):
    """A chunk's state before its first step: `first`, or the end of the chunk before."""
    chunk = tl.program_id(1)
    before = b * (tl.num_programs(1) - 1) + chunk - 1
    alone = read(first + b * H, c, only(inside, chunk == 0))
    return alone + read(ends + before * H, c, only(inside, chunk > 0))


@triton.jit(do_not_specialize=["T", "length"])
def scan_forward(
    xs,
    ys,
    h0,
    ends,
    h,
    last,
    T,
    H,
    length,
    PARTS: tl.constexpr,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """h of a chunk of `length` steps.  ends: (B, chunks - 1, H), of all chunks but the last."""
    b, c, inside = lanes(H, BLOCK)
    chunk = tl.program_id(1)
    begin = chunk * length
    end = tl.minimum(begin + length, T)
    state = beginning(h0, ends, b, c, H, inside)
    for start in range(begin, end, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            t = start + i
            drives += (drive_at(xs, ys, b * T + t, c, H, only(inside, t < end), PARTS),)
        for i in tl.static_range(UNROLL):
            t = start + i
            x, x_i, y = drives[i]
            keep, new = coefficients(x, x_i, y, PARTS, POSITIVE)
            state = tl.where(t < end, keep * state + new, state)
            write(h + (b * T + t) * H, c, state, only(inside, t < end))
    write(last + b * H, c, state, only(inside, end == T))


@triton.jit(do_not_specialize=["T", "length"])
def scan_backward(
    xs,
    ys,
    h0,
    h,
    dh,
    dlast,
    ends,
    dxs,
    dys,
    dh0,
    T,
    H,
    length,
    PARTS: tl.constexpr,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradients of a chunk of `length` steps, from its last to its first; chunks count from the
    last step on."""
    b, c, inside = lanes(H, BLOCK)
    chunk = tl.program_id(1)
    begin = chunk * length
    end = tl.minimum(begin + length, T)
    carry = beginning(dlast, ends, b, c, H, inside)
    first = read(h0 + b * H, c, inside)
    for start in range(begin, end, UNROLL):
        drives, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            there = only(inside, start + i < end)
            t = T - 1 - start - i
            row = b * T + t
            drives += (drive_at(xs, ys, row, c, H, there, PARTS),)
            olds += (read(h + (row - 1) * H, c, only(there, t > 0)),)
            d_outs += (read(dh + row * H, c, there),)
        for i in tl.static_range(UNROLL):
            there = only(inside, start + i < end)
            t = T - 1 - start - i
            row = b * T + t
            x, x_i, y = drives[i]
            old = tl.where(t > 0, olds[i], first)
            d = d_outs[i] + carry
            dx, dx_i, dy, d_old = gradients(d, old, x, x_i, y, PARTS, POSITIVE)
            write(dxs + row * PARTS * H, c, dx, there)
            if PARTS == 3:
                write(dxs + row * PARTS * H + H, c, dx_i, there)
            write(dys + (row * PARTS + PARTS - 1) * H, c, dy, there)
            carry = tl.where(start + i < end, d_old, carry)
    write(dh0 + b * H, c, carry, only(inside, end == T))


@triton.jit(do_not_specialize=["T", "length"])
def scan_ends(
    xs,
    ys,
    factors,
    offsets,
    T,
    H,
    length,
    PARTS: tl.constexpr,
    POSITIVE: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The linear function that maps a chunk's start to its end: end = factor * start + offset.

    factors, offsets: (B, chunks - 1, H).  BACKWARD: chunks count from the last step to the first,
    and ys is dh, (B, T, H).
    """
    b, c, inside = lanes(H, BLOCK)
    begin = tl.program_id(1) * length
    factor, offset = tl.full((BLOCK,), 1.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(begin, begin + length, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            there = only(inside, start + i < begin + length)
            if BACKWARD:
                row = b * T + T - 1 - start - i
                x = read(xs + row * PARTS * H, c, there)
                x_i = x
                if PARTS == 3:
                    x_i = read(xs + row * PARTS * H + H, c, there)
                drives += ((x, x_i, read(ys + row * H, c, there)),)
            else:
                drives += (drive_at(xs, ys, b * T + start + i, c, H, there, PARTS),)
        for i in tl.static_range(UNROLL):
            x, x_i, y = drives[i]
            keep, new = coefficients(x, x_i, y, PARTS, POSITIVE)
            if BACKWARD:
                new = keep * y
            factor = tl.where(start + i < begin + length, keep * factor, factor)
            offset = tl.where(start + i < begin + length, keep * offset + new, offset)
    to = (b * tl.num_programs(1) + tl.program_id(1)) * H
    write(factors + to, c, factor, inside)
    write(offsets + to, c, offset, inside)


def scan(x: Tensor, y: Tensor, h0: Tensor, positive: bool = False) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t: (B, T, H) in y's dtype, and the last h.

    x and y are a and b; for a gated scan, both are the drive.
    """
    batch, time, width, form = _form(x, h0, positive)
    h, last = y.new_empty(batch, time, width), torch.empty_like(h0)
    ends, length = _chunked(x, y, h0, time, form, BACKWARD=False)
    arguments = x, y, h0, ends, h, last, time, width, length
    grid = programs_of(h0), triton.cdiv(time, length)
    launch(scan_forward, grid, *arguments, **form, UNROLL=steps(16, length))
    return h, last


def scan_gradients(
    x: Tensor, y: Tensor, h0: Tensor, h: Tensor, dh: Tensor, d_last: Tensor, positive: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, y and h0 in `scan`.  For a gated scan the first two are one tensor.

    The gradients of a linear scan do not depend on y: any tensor of its shape and dtype serves.
    """
    _, time, width, form = _form(x, h0, positive)
    dx, dh0 = torch.empty_like(x), torch.empty_like(h0)
    dy = torch.empty_like(y) if form["PARTS"] == 1 else dx
    ends, length = _chunked(x, dh, d_last, time, form, BACKWARD=True)
    arguments = x, y, h0, h, dh, d_last, ends, dx, dy, dh0, time, width, length
    grid = programs_of(h0), triton.cdiv(time, length)
    launch(scan_backward, grid, *arguments, **form, UNROLL=steps(8, length))
    return dx, dy, dh0


def _form(x: Tensor, h0: Tensor, positive: bool) -> tuple[int, int, int, dict[str, Any]]:
    """B, T, H, and what a scan's kernels are compiled for."""
    (batch, time, columns), width = x.shape, h0.shape[1]
    form = dict(PARTS=columns // width, POSITIVE=positive, BLOCK=block_of(width))
    return batch, time, width, form


def _chunked(
    x: Tensor, y: Tensor, first: Tensor, time: int, form: dict[str, Any], **direction: bool
) -> tuple[Tensor, int]:
    """The states in which all chunks but the last end, (B, chunks - 1, H), and a chunk's steps."""
    batch, width = first.shape
    length, count = cut(first, time)
    before_last = count - 1
    if not before_last:
        return first, length  # one chunk: its kernel reads no ends
    ends, factors, offsets = (first.new_empty(batch, before_last, width) for _ in range(3))
    arguments = x, y, factors, offsets, time, width, length
    form = form | direction | dict(UNROLL=steps(16, length))
    launch(scan_ends, (programs_of(first), before_last), *arguments, **form)
    arguments = factors, offsets, first, first, ends, torch.empty_like(first)
    form = dict(PARTS=1, POSITIVE=False, BLOCK=form["BLOCK"], UNROLL=steps(8, before_last))
    launch(
        scan_forward, (programs_of(first), 1), *arguments, before_last, width, before_last, **form
    )
    return ends, length


def cut(state: Tensor, time: int) -> tuple[int, int]:
    """Steps of a chunk, and how many chunks a scan of a state (B, ..., H) takes."""
    lanes = len(state) * state.shape[-1]
    length = triton.cdiv(time, chunks(lanes, time, state.device))
    return length, triton.cdiv(time, length)


def chunks(lanes: int, time: int, device: torch.device) -> int:
    """How many chunks of time a scan computes side by side.

    A lane mostly waits for memory.  The memory bus is busy while as many bytes are on their way as
    it moves in the time that one load takes: on an H100 3.35 TB/s in 0.7 us, or 18 kB for each
    multiprocessor.  A lane has 16 steps of two numbers of 2 or 4 bytes on their way, 64 to 128
    bytes, for half of its time, so 512 lanes a multiprocessor are enough (and plenty for the block
    scan, whose lanes load more).  Where there are fewer lanes, chunks make up for it.  Chunks read
    everything twice and take two more kernels, so fewer than four are not worth it, nor are chunks
    of less than 64 steps; the loop over chunks should not be longer than a chunk.  Derived, not
    measured.
    """
    if device.type != "cuda":
        return 1
    full = LANES * torch.cuda.get_device_properties(device).multi_processor_count
    count = min(full // max(lanes, 1), time // SHORTEST, isqrt(time))
    return count if count >= 4 else 1
