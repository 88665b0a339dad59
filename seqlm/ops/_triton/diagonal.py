"""Diagonal LEM and CfC, whose units see themselves alone: a pass over time each way."""

# B batch, T time, H state width

import triton
import triton.language as tl

from seqlm.ops._triton.lanes import lanes
from seqlm.ops._triton.numbers import (
    d_mix,
    d_new_of,
    mix,
    new_of,
    only,
    parts_at,
    read,
    sigmoid,
    write,
    write_parts,
)


@triton.jit(do_not_specialize=["T"])
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


@triton.jit(do_not_specialize=["T"])
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


@triton.jit(do_not_specialize=["T"])
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


@triton.jit(do_not_specialize=["T"])
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
