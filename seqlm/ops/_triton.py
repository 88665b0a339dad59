"""The ops as kernels for CUDA devices, compiled by Triton on first use and kept on disk.

In this order: numbers; the gated and the linear scan; diagonal LEM and CfC; the block scan; LEM
in heads; and how a kernel is called.

Numbers are float32, bfloat16 or float16 in memory; states and sums are float32.  A lane is one
channel of one row of the batch, which no other lane has to do with: it goes through time step by
step, as the equations do.  Of UNROLL steps at a time it asks for all that memory has to send before
it uses the first, as what is sent does not depend on the state.  Kernels read and write (B, T, C)
as the model has it.

Under Triton's interpreter (TRITON_INTERPRET=1, set before this file is imported) the same kernels
run on the CPU, slowly, for tests.
"""

# B batch, T time, H state width

from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 32  # channels of a program whose steps take longer than what they read: one a thread
MOST = 64  # channels of a program: two a thread, of which bfloat16 fill a bus' transfer
LANES = 512  # of a multiprocessor, which keep its share of the bus busy
SHORTEST = 64  # steps of a chunk
ROWS = 16  # of a batch that share a head's weights: the least that a product of tiles takes
WIDEST = 64  # units of a head, whose weights of 32 kB in bfloat16 the registers of a program hold

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def read(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(pointer, offsets, x, mask):
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def only(mask, condition):
    """The mask where the condition, one number, holds; `&` would make no mask of it in Triton's
    interpreter."""
    return tl.where(condition, mask, False)


@triton.jit
def lanes(H, BLOCK: tl.constexpr):
    """The program's row of the batch, its channels, and which of them there are."""
    tiles = tl.cdiv(H, BLOCK)
    program = tl.program_id(0)
    c = program % tiles * BLOCK + tl.arange(0, BLOCK)
    return (program // tiles).to(tl.int64), c, c < H


@triton.jit
def sigmoid(x):
    """And 1 minus it, neither of which rounds to 0 before the other is 1."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    return tl.where(x >= 0, large, e * large), tl.where(x >= 0, e * large, large)


@triton.jit
def candidate(u, POSITIVE: tl.constexpr):
    """g(u) and its derivative."""
    g, slope = u, tl.full(u.shape, 1.0, tl.float32)
    if POSITIVE:
        s, rest = sigmoid(u)
        g, slope = tl.where(u >= 0, u + 0.5, s), tl.where(u >= 0, 1.0, s * rest)
    return g, slope


@triton.jit
def gate(k, k_i, PARTS: tl.constexpr):
    """z and 1 - z, of the logit k; or of two gates' logits k and k_i, of which only the ratio
    counts where both are small: neither overflows."""
    z, keep = sigmoid(k)
    if PARTS == 3:
        shift = tl.maximum(-40.0 - tl.maximum(k, k_i), 0.0)
        # where, not minimum: that one would let no NaN through
        f = 1.0 + tl.exp(tl.where(k + shift < -80.0, 80.0, -(k + shift)))
        i = 1.0 + tl.exp(tl.where(k_i + shift < -80.0, 80.0, -(k_i + shift)))
        z, keep = f / (f + i), i / (f + i)
    return z, keep


@triton.jit
def coefficients(x, x_i, y, PARTS: tl.constexpr, POSITIVE: tl.constexpr):
    """a and b of a step h = a h + b: x and y themselves, or of the drive of a gated scan."""
    a, b = x, y
    if PARTS > 1:
        z, a = gate(x, x_i, PARTS)
        g, _ = candidate(y, POSITIVE)
        b = z * g
    return a, b


@triton.jit
def gradients(d, old, x, x_i, y, PARTS: tl.constexpr, POSITIVE: tl.constexpr):
    """Those of x, x_i and y, and of the old h, where d is that of the new h."""
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
    """x, x_i and y at a row of (B T, H) each, or of one drive (B T, PARTS H)."""
    x = read(xs + row * PARTS * H, c, mask)
    x_i = x
    if PARTS == 3:
        x_i = read(xs + row * PARTS * H + H, c, mask)
    return x, x_i, read(ys + (row * PARTS + PARTS - 1) * H, c, mask)


@triton.jit
def beginning(first, ends, b, c, H, inside):
    """A chunk's state before its first step: that before all, or the end of the chunk before."""
    chunk = tl.program_id(1)
    before = b * (tl.num_programs(1) - 1) + chunk - 1
    alone = read(first + b * H, c, only(inside, chunk == 0))
    return alone + read(ends + before * H, c, only(inside, chunk > 0))


@triton.jit
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


@triton.jit
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


@triton.jit
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
    """What a chunk makes of its beginning: factor * beginning + offset, (B, chunks - 1, H) each.

    Backwards, chunks count from the last step on, and ys is dh, (B, T, H).
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


@triton.jit
def tanh(x):
    """To 1e-7, absolutely; and its derivative."""
    e = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x >= 0, 1.0 - e, e - 1.0) * r, 4.0 * (e * r) * r


@triton.jit
def mix(old, new, gate, dt):
    """(1 - D) old + D tanh(new) with D = dt sigmoid(gate)."""
    g, _ = sigmoid(gate)
    f, _ = tanh(new)
    return old + dt * g * (f - old)


@triton.jit
def d_mix(d, old, new, gate, dt):
    """The gradients of old, new and gate in `mix`, where d is that of what it gives."""
    g, rest = sigmoid(gate)
    f, slope = tanh(new)
    return d * (1.0 - dt + dt * rest), d * dt * g * slope, d * (f - old) * dt * g * rest


@triton.jit
def parts_at(pointer, offsets, H, mask, PARTS: tl.constexpr):
    """Three or four of H numbers one behind the other; where they are three, the fourth is none."""
    x, y = read(pointer, offsets, mask), read(pointer + H, offsets, mask)
    z = read(pointer + 2 * H, offsets, mask)
    last = z
    if PARTS == 4:
        last = read(pointer + 3 * H, offsets, mask)
    return x, y, z, last


@triton.jit
def diagonal_lem_forward(
    drive,
    y0,
    z0,
    weights,
    h,
    zs,
    y_last,
    z_last,
    dt,
    T,
    H,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """drive: (B, T, 4 H), weights: (4, H), of both gates, the new z and the new y."""
    b, c, inside = lanes(H, BLOCK)
    y, z = read(y0 + b * H, c, inside), read(z0 + b * H, c, inside)
    w_gate_z, w_gate_y, w_z, w_y = parts_at(weights, c, H, inside, 4)
    for start in range(0, T, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            drives += (parts_at(drive + row * 4 * H, c, H, only(inside, start + i < T), 4),)
        for i in tl.static_range(UNROLL):
            there = start + i < T
            row = b * T + start + i
            gate_z, gate_y, new_z, new_y = drives[i]
            gate_y += w_gate_y * y
            z = tl.where(there, mix(z, new_z + w_z * y, gate_z + w_gate_z * y, dt), z)
            y = tl.where(there, mix(y, new_y + w_y * z, gate_y, dt), y)
            write(h + row * H, c, y, only(inside, there))
            write(zs + row * H, c, z, only(inside, there))
    write(y_last + b * H, c, y, inside)
    write(z_last + b * H, c, z, inside)


@triton.jit
def diagonal_lem_backward(
    drive,
    y0,
    z0,
    weights,
    h,
    zs,
    dh,
    d_drive,
    dy_at,
    dz_at,
    parts,
    dt,
    T,
    H,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """dy_at, dz_at: of the last state when it begins, of the first when it ends.  parts: (B, 4, H),
    a row's part in the gradient of the weights."""
    b, c, inside = lanes(H, BLOCK)
    dy, dz = read(dy_at + b * H, c, inside), read(dz_at + b * H, c, inside)
    first_y, first_z = read(y0 + b * H, c, inside), read(z0 + b * H, c, inside)
    w_gate_z, w_gate_y, w_z, w_y = parts_at(weights, c, H, inside, 4)
    sum_gate_z, sum_gate_y = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    sum_z, sum_y = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    z = read(zs + (b * T + T - 1) * H, c, inside)
    for start in range(0, T, UNROLL):
        drives, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row = b * T + t
            drives += (parts_at(drive + row * 4 * H, c, H, only(inside, t >= 0), 4),)
            before = (row - 1) * H
            old = (
                read(h + before, c, only(inside, t > 0)),
                read(zs + before, c, only(inside, t > 0)),
            )
            olds += (old,)
            d_outs += (read(dh + row * H, c, only(inside, t >= 0)),)
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            gate_z, gate_y, new_z, new_y = drives[i]
            old_y, old_z = olds[i]
            old_y, old_z = tl.where(t > 0, old_y, first_y), tl.where(t > 0, old_z, first_z)
            # beyond the first step d is 0, so that sums stay as they are
            d = tl.where(t >= 0, dy + d_outs[i], 0.0)
            dy_old, d_y, d_gate_y = d_mix(d, old_y, new_y + w_y * z, gate_y + w_gate_y * old_y, dt)
            d = tl.where(t >= 0, dz + w_y * d_y, 0.0)
            gate_z += w_gate_z * old_y
            dz_old, d_z, d_gate_z = d_mix(d, old_z, new_z + w_z * old_y, gate_z, dt)
            dy_old += w_gate_z * d_gate_z + w_gate_y * d_gate_y + w_z * d_z
            dy, dz = tl.where(t >= 0, dy_old, dy), tl.where(t >= 0, dz_old, dz)
            sum_gate_z, sum_gate_y = sum_gate_z + d_gate_z * old_y, sum_gate_y + d_gate_y * old_y
            sum_z, sum_y, z = sum_z + d_z * old_y, sum_y + d_y * z, old_z
            to = d_drive + (b * T + t) * 4 * H
            write_parts(to, c, H, d_gate_z, d_gate_y, d_z, d_y, only(inside, t >= 0), 4)
    write(dy_at + b * H, c, dy, inside)
    write(dz_at + b * H, c, dz, inside)
    write_parts(parts + b * 4 * H, c, H, sum_gate_z, sum_gate_y, sum_z, sum_y, inside, 4)


@triton.jit
def two_at(pointer, offsets, H, mask):
    """Two of H numbers one behind the other."""
    return read(pointer, offsets, mask), read(pointer + H, offsets, mask)


@triton.jit
def write_parts(pointer, offsets, H, x, y, z, last, mask, PARTS: tl.constexpr):
    """Where `parts_at` reads."""
    write(pointer, offsets, x, mask)
    write(pointer + H, offsets, y, mask)
    write(pointer + 2 * H, offsets, z, mask)
    if PARTS == 4:
        write(pointer + 3 * H, offsets, last, mask)


@triton.jit
def new_of(f_1, f_2, k, GATED: tl.constexpr):
    """tanh(f_1) (1 - s) + s tanh(f_2) with s = sigmoid(k); without GATED, tanh(f_1) is whole."""
    u, _ = tanh(f_1)
    v, _ = tanh(f_2)
    s, rest = sigmoid(k)
    if GATED:
        u = u * rest
    return u + s * v


@triton.jit
def d_new_of(d, f_1, f_2, k, GATED: tl.constexpr):
    """The gradients of f_1, f_2 and k in `new_of`, where d is that of what it gives."""
    u, u_slope = tanh(f_1)
    v, v_slope = tanh(f_2)
    s, rest = sigmoid(k)
    d_1, apart = d * u_slope, v
    if GATED:
        d_1, apart = d_1 * rest, v - u
    return d_1, d * s * v_slope, d * apart * s * rest


@triton.jit
def diagonal_cfc_forward(
    drive,
    h0,
    weights,
    h,
    last,
    tau,
    T,
    H,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """drive: (B, T, 3 H), or (B, T, 4 H) with a leak.  weights: (3, H)."""
    b, c, inside = lanes(H, BLOCK)
    state = read(h0 + b * H, c, inside)
    w_1, w_2, w_k, _ = parts_at(weights, c, H, inside, 3)
    for start in range(0, T, UNROLL):
        drives = ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            mask = only(inside, start + i < T)
            drives += (parts_at(drive + row * PARTS * H, c, H, mask, PARTS),)
        for i in tl.static_range(UNROLL):
            there = start + i < T
            f_1, f_2, k, leak = drives[i]
            k = tau * (k + w_k * state)
            new = new_of(f_1 + w_1 * state, f_2 + w_2 * state, k, GATED)
            if PARTS == 4:
                g, _ = sigmoid(leak)
                new = state + g * (new - state)
            state = tl.where(there, new, state)
            write(h + (b * T + start + i) * H, c, state, only(inside, there))
    write(last + b * H, c, state, inside)


@triton.jit
def diagonal_cfc_backward(
    drive,
    h0,
    weights,
    h,
    dh,
    d_drive,
    d_at,
    parts,
    tau,
    T,
    H,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """d_at: of the last state when it begins, of the first when it ends.  parts: (B, 3, H), a row's
    part in the gradient of the weights."""
    b, c, inside = lanes(H, BLOCK)
    carry, first = read(d_at + b * H, c, inside), read(h0 + b * H, c, inside)
    w_1, w_2, w_k, _ = parts_at(weights, c, H, inside, 3)
    sum_1, sum_2 = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    sum_k = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, T, UNROLL):
        drives, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row = b * T + t
            there = only(inside, t >= 0)
            drives += (parts_at(drive + row * PARTS * H, c, H, there, PARTS),)
            olds += (read(h + (row - 1) * H, c, only(inside, t > 0)),)
            d_outs += (read(dh + row * H, c, there),)
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            f_1, f_2, k, leak = drives[i]
            old = tl.where(t > 0, olds[i], first)
            f_1, f_2, k = f_1 + w_1 * old, f_2 + w_2 * old, tau * (k + w_k * old)
            # beyond the first step d is 0, so that sums stay as they are
            d = tl.where(t >= 0, carry + d_outs[i], 0.0)
            d_new, d_old, d_leak = d, tl.full((BLOCK,), 0.0, tl.float32), leak
            if PARTS == 4:
                g, rest = sigmoid(leak)
                d_leak = d * (new_of(f_1, f_2, k, GATED) - old) * g * rest
                d_new, d_old = d * g, d * rest
            d_1, d_2, d_k = d_new_of(d_new, f_1, f_2, k, GATED)
            d_k = tau * d_k
            d_old += w_1 * d_1 + w_2 * d_2 + w_k * d_k
            carry = tl.where(t >= 0, d_old, carry)
            sum_1, sum_2, sum_k = sum_1 + d_1 * old, sum_2 + d_2 * old, sum_k + d_k * old
            to = d_drive + (b * T + t) * PARTS * H
            write_parts(to, c, H, d_1, d_2, d_k, d_leak, only(inside, t >= 0), PARTS)
    write(d_at + b * H, c, carry, inside)
    write_parts(parts + b * 3 * H, c, H, sum_1, sum_2, sum_k, sum_k, inside, 3)


@triton.jit
def block_forward(a, b_in, h0, h, T, H, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Gates (B, T, 2, 2, H), the rest (B, T, 2, H) and (B, 2, H)."""
    b, c, inside = lanes(H, BLOCK)
    p, q = two_at(h0 + b * 2 * H, c, H, inside)
    for start in range(0, T, UNROLL):
        gates, news = (), ()
        for i in tl.static_range(UNROLL):
            row = b * T + start + i
            mask = only(inside, start + i < T)
            gates += (parts_at(a + row * 4 * H, c, H, mask, 4),)
            news += (two_at(b_in + row * 2 * H, c, H, mask),)
        for i in tl.static_range(UNROLL):
            there = start + i < T
            pp, pq, qp, qq = gates[i]
            p_new, q_new = news[i]
            p_new, q_new = p_new + pp * p + pq * q, q_new + qp * p + qq * q
            p, q = tl.where(there, p_new, p), tl.where(there, q_new, q)
            to = h + (b * T + start + i) * 2 * H
            write(to, c, p, only(inside, there))
            write(to + H, c, q, only(inside, there))


@triton.jit
def block_backward(a, h0, h, dh, da, db, dh0, T, H, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """The gradients of `block_forward`, from the last step to the first."""
    b, c, inside = lanes(H, BLOCK)
    first_p, first_q = two_at(h0 + b * 2 * H, c, H, inside)
    dp, dq = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, T, UNROLL):
        gates, olds, d_outs = (), (), ()
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row = b * T + t
            gates += (parts_at(a + row * 4 * H, c, H, only(inside, t >= 0), 4),)
            olds += (two_at(h + (row - 1) * 2 * H, c, H, only(inside, t > 0)),)
            d_outs += (two_at(dh + row * 2 * H, c, H, only(inside, t >= 0)),)
        for i in tl.static_range(UNROLL):
            t = T - 1 - start - i
            row = b * T + t
            there = only(inside, t >= 0)
            pp, pq, qp, qq = gates[i]
            p, q = olds[i]
            p, q = tl.where(t > 0, p, first_p), tl.where(t > 0, q, first_q)
            d_p, d_q = d_outs[i]
            d_p, d_q = d_p + dp, d_q + dq
            write_parts(da + row * 4 * H, c, H, d_p * p, d_p * q, d_q * p, d_q * q, there, 4)
            write(db + row * 2 * H, c, d_p, there)
            write(db + row * 2 * H + H, c, d_q, there)
            dp = tl.where(t >= 0, pp * d_p + qp * d_q, dp)
            dq = tl.where(t >= 0, pq * d_p + qq * d_q, dq)
    write(dh0 + b * 2 * H, c, dp, inside)
    write(dh0 + b * 2 * H + H, c, dq, inside)


@triton.jit
def square_at(pointer, block, i, j, S, like):
    """A block (S, S) at rows i and columns j, 0 beyond, in the dtype of what is at `like`."""
    x = read(pointer + block * S * S, i * S + j, (i < S) & (j < S))
    return x.to(like.dtype.element_ty)


@triton.jit
def product(x, w, total):
    """total + x w, x in w's dtype; of float32 to about its own precision."""
    x = x.to(w.dtype)
    if INTERPRETED:  # where a product of bfloat16 is one of their bits
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, total, input_precision="tf32x3")


@triton.jit
def heads_of(B, S, G, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The program's head, its rows of the batch and their columns, and which of these there are."""
    g = tl.program_id(0) % G
    r = (tl.program_id(0) // G * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    j = tl.arange(0, WIDE)[None, :]
    return g, r, g * S + j, (r < B) & (j < S)


@triton.jit
def lem_forward(
    drive,
    y_at,
    z_at,
    from_y,
    from_z,
    h,
    kept,
    dt,
    B,
    T,
    S,
    G,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y_at, z_at: (B, D), the first state when it begins, the last when it ends.  kept:
    (B, T, 5 D), what goes into the gates of z and y and into the tanh of z; z; what goes into the
    tanh of y.

    A program does a head of ROWS rows of the batch, whose weights it keeps.
    """
    g, r, c, inside = heads_of(B, S, G, ROWS, WIDE)
    D = G * S
    y, z = read(y_at, r * D + c, inside), read(z_at, r * D + c, inside)
    o, i = tl.arange(0, WIDE)[None, :], tl.arange(0, WIDE)[:, None]
    w_gate_z, w_gate_y = (
        square_at(from_y, g, o, i, S, drive),
        square_at(from_y, G + g, o, i, S, drive),
    )
    w_z, w_y = square_at(from_y, 2 * G + g, o, i, S, drive), square_at(from_z, g, o, i, S, drive)
    gate_z, gate_y, new_z, new_y = parts_at(drive, r * T * 4 * D + c, D, inside, 4)
    for t in range(T):
        # asked for a step ahead
        to = (r * T + t + 1) * 4 * D + c
        later_1, later_2, later_3, later_4 = parts_at(drive, to, D, only(inside, t + 1 < T), 4)
        gate_z, gate_y = product(y, w_gate_z, gate_z), product(y, w_gate_y, gate_y)
        new_z = product(y, w_z, new_z)
        z = mix(z, new_z, gate_z, dt)
        new_y = product(z, w_y, new_y)
        y = mix(y, new_y, gate_y, dt)
        to = (r * T + t) * 5 * D + c
        write_parts(kept, to, D, gate_z, gate_y, new_z, z, inside, 4)
        write(kept + 4 * D, to, new_y, inside)
        write(h, (r * T + t) * D + c, y, inside)
        gate_z, gate_y, new_z, new_y = later_1, later_2, later_3, later_4
    write(y_at, r * D + c, y, inside)
    write(z_at, r * D + c, z, inside)


@triton.jit
def lem_step_at(t, dh, y0, z0, h, kept, r, c, T, D, inside):
    """What `lem_backward` reads of a step: dh, y and z before it, and what went into its gates and
    tanh."""
    there = only(inside, t >= 0)
    later, first = only(there, t > 0), only(there, t == 0)
    row = r * T + t
    old_y = read(h, (row - 1) * D + c, later) + read(y0, r * D + c, first)
    old_z = read(kept + 3 * D, (row - 1) * 5 * D + c, later) + read(z0, r * D + c, first)
    gate_z, gate_y, new_z, _ = parts_at(kept, row * 5 * D + c, D, there, 3)
    new_y = read(kept + 4 * D, row * 5 * D + c, there)
    return read(dh, row * D + c, there), old_y, old_z, gate_z, gate_y, new_z, new_y


@triton.jit
def lem_backward(
    dh,
    y0,
    z0,
    h,
    kept,
    from_y,
    from_z,
    d_drive,
    dy_at,
    dz_at,
    dt,
    B,
    T,
    S,
    G,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dy_at, dz_at: (B, D), of the last state when it begins, of the first when it ends."""
    g, r, c, inside = heads_of(B, S, G, ROWS, WIDE)
    D = G * S
    dy, dz = read(dy_at, r * D + c, inside), read(dz_at, r * D + c, inside)
    o, i = tl.arange(0, WIDE)[:, None], tl.arange(0, WIDE)[None, :]
    w_gate_z, w_gate_y = square_at(from_y, g, o, i, S, dh), square_at(from_y, G + g, o, i, S, dh)
    w_z, w_y = square_at(from_y, 2 * G + g, o, i, S, dh), square_at(from_z, g, o, i, S, dh)
    given = dh, y0, z0, h, kept, r, c, T, D, inside
    d, old_y, old_z, gate_z, gate_y, new_z, new_y = lem_step_at(T - 1, *given)
    for back in range(T):
        t = T - 1 - back
        # asked for a step ahead
        n_d, n_y, n_z, n_gate_z, n_gate_y, n_new_z, n_new_y = lem_step_at(t - 1, *given)
        dy, d_y, d_gate_y = d_mix(dy + d, old_y, new_y, gate_y, dt)
        dz = product(d_y, w_y, dz)
        dz, d_z, d_gate_z = d_mix(dz, old_z, new_z, gate_z, dt)
        dy = product(d_gate_z, w_gate_z, dy)
        dy = product(d_gate_y, w_gate_y, dy)
        dy = product(d_z, w_z, dy)
        to = (r * T + t) * 4 * D + c
        write_parts(d_drive, to, D, d_gate_z, d_gate_y, d_z, d_y, inside, 4)
        d, old_y, old_z = n_d, n_y, n_z
        gate_z, gate_y, new_z, new_y = n_gate_z, n_gate_y, n_new_z, n_new_y
    write(dy_at, r * D + c, dy, inside)
    write(dz_at, r * D + c, dz, inside)


def scan(x: Tensor, y: Tensor, h0: Tensor, positive: bool = False) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t: (B, T, H) in y's dtype, and the last h.

    x, y: a and b; or, of a gated scan, the drive twice.
    """
    batch, time, width, form = _form(x, h0, positive)
    h, last = y.new_empty(batch, time, width), torch.empty_like(h0)
    ends, length = _chunked(x, y, h0, time, form, BACKWARD=False)
    given = x, y, h0, ends, h, last, time, width, length
    grid = _tiles(h0), triton.cdiv(time, length)
    _launch(scan_forward, grid, *given, **form, UNROLL=_steps(16, length))
    return h, last


def scan_gradients(
    x: Tensor, y: Tensor, h0: Tensor, h: Tensor, dh: Tensor, dlast: Tensor, positive: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `scan`: of x, y and h0, of which the first two are one for a gated scan.
    Those of a plain scan do not depend on y."""
    batch, time, width, form = _form(x, h0, positive)
    dx, dh0 = torch.empty_like(x), torch.empty_like(h0)
    dy = torch.empty_like(y) if form["PARTS"] == 1 else dx
    ends, length = _chunked(x, dh, dlast, time, form, BACKWARD=True)
    given = x, y, h0, h, dh, dlast, ends, dx, dy, dh0, time, width, length
    grid = _tiles(h0), triton.cdiv(time, length)
    _launch(scan_backward, grid, *given, **form, UNROLL=_steps(8, length))
    return dx, dy, dh0


def run(kernel: Any, state: Tensor, time: int, *arguments: Any, **constants: Any) -> None:
    """A kernel that takes its lanes step by step through all of time; state: (B, ..., H)."""
    batch, width = len(state), state.shape[-1]
    block = _block(width, FEW)
    grid = (batch * triton.cdiv(width, block),)
    _launch(kernel, grid, *arguments, time, width, **constants, BLOCK=block, UNROLL=_steps(8, time))


def run_heads(kernel: Any, drive: Tensor, heads: int, size: int, *arguments: Any) -> None:
    """A kernel of heads of `size` units, for a batch and time as those of drive (B, T, ...)."""
    batch, time = drive.shape[:2]
    wide = max(ROWS, triton.next_power_of_2(size))
    grid = (triton.cdiv(batch, ROWS) * heads,)
    given = *arguments, batch, time, size, heads
    _launch(kernel, grid, *given, ROWS=ROWS, WIDE=wide, warps=wide // 8)


def _form(x: Tensor, h0: Tensor, positive: bool) -> tuple[int, int, int, dict[str, Any]]:
    """B, T, H, and what a scan's kernels are compiled for."""
    (batch, time, columns), width = x.shape, h0.shape[1]
    form = dict(PARTS=columns // width, POSITIVE=positive, BLOCK=_block(width))
    return batch, time, width, form


def _chunked(
    x: Tensor, y: Tensor, first: Tensor, time: int, form: dict[str, Any], **direction: bool
) -> tuple[Tensor, int]:
    """What chunks but the last end in, (B, chunks - 1, H), and how many steps a chunk has."""
    batch, width = first.shape
    length = triton.cdiv(time, chunks(batch * width, time, first.device))
    before_last = triton.cdiv(time, length) - 1
    if not before_last:
        return first, length  # which nothing reads
    ends, factors, offsets = (first.new_empty(batch, before_last, width) for _ in range(3))
    given = x, y, factors, offsets, time, width, length
    form = form | direction | dict(UNROLL=_steps(16, length))
    _launch(scan_ends, (_tiles(first), before_last), *given, **form)
    given = factors, offsets, first, first, ends, torch.empty_like(first)
    form = dict(PARTS=1, POSITIVE=False, BLOCK=form["BLOCK"], UNROLL=_steps(8, before_last))
    _launch(scan_forward, (_tiles(first), 1), *given, before_last, width, before_last, **form)
    return ends, length


def chunks(lanes: int, time: int, device: torch.device) -> int:
    """How many chunks of time a scan does side by side.

    A lane mostly waits for memory.  To keep the bus busy, as much has to be under way as it brings
    in the time that a number takes (H100: 3.35 TB/s in 0.7 us, or 18 kB a multiprocessor), and a
    lane has 16 steps of two numbers of 2 or 4 bytes under way, or 64 to 128 bytes, half of the
    time: so 512 lanes a multiprocessor.  Where there are fewer, chunks make up for it.  As it then
    goes through time twice, with two more kernels, fewer than four are not worth it, nor are chunks
    of less than 64 steps; and chunk by chunk goes step by step, so that they are no more than the
    steps of one.  Derived, not measured.
    """
    if device.type != "cuda":
        return 1
    full = LANES * torch.cuda.get_device_properties(device).multi_processor_count
    count = min(full // max(lanes, 1), time // SHORTEST, isqrt(time))
    return count if count >= 4 else 1


def _block(width: int, most: int = MOST) -> int:
    return min(most, triton.next_power_of_2(width))


def _steps(most: int, time: int) -> int:
    """Steps that are asked of memory at once."""
    return min(most, triton.next_power_of_2(time))


def _tiles(state: Tensor) -> int:
    """Programs for the lanes of a state (B, H)."""
    batch, width = state.shape
    return batch * triton.cdiv(width, _block(width))


@torch.compiler.disable
def _launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 1, **constants: Any
) -> None:
    """A program of lanes is one warp: they have nothing to say to each other.

    torch.compile does not look inside, and calls it as it is.
    """
    # fused products and sums, which are the more exact ones: triton 3.9 warns if it is not told
    options = dict(num_warps=warps, enable_fp_fusion=True)
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **options)
