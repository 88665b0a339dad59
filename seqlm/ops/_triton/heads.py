"""LEM whose dense weights fall into heads: a program keeps the weights of one."""

# B batch, T time, D width, G heads, S = D / G units of a head

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops._triton.launch import launch
from seqlm.ops._triton.numbers import d_mix, mix, only, parts_at, product, read, write, write_parts

ROWS = 16  # of a batch that share a head's weights: the least that a product of tiles takes
# Bytes of a row of a head's weights, of which a program keeps four matrices and shared memory has
# copies: 64 units in bfloat16, 32 in float32.  Twice as many do not fit the 99 kB of shared memory
# that there are from compute capability 8.6 on.
WIDEST = 128


@triton.jit
def square_at(pointer, block, i, j, S, like):
    """A block (S, S) at rows i and columns j, 0 beyond, in the dtype of what is at `like`."""
    x = read(pointer + block * S * S, i * S + j, (i < S) & (j < S))
    return x.to(like.dtype.element_ty)


@triton.jit
def heads_of(B, S, G, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The program's head, its rows of the batch and their columns, and which of these there are."""
    g = tl.program_id(0) % G
    r = (tl.program_id(0) // G * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    j = tl.arange(0, WIDE)[None, :]
    return g, r, g * S + j, (r < B) & (j < S)


@triton.jit(do_not_specialize=["T"])
def head_forward(
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
    """What `head_backward` reads of a step: dh, y and z before it, and what went into its gates and
    tanh."""
    there = only(inside, t >= 0)
    later, first = only(there, t > 0), only(there, t == 0)
    row = r * T + t
    old_y = read(h, (row - 1) * D + c, later) + read(y0, r * D + c, first)
    old_z = read(kept + 3 * D, (row - 1) * 5 * D + c, later) + read(z0, r * D + c, first)
    gate_z, gate_y, new_z, _ = parts_at(kept, row * 5 * D + c, D, there, 3)
    new_y = read(kept + 4 * D, row * 5 * D + c, there)
    return read(dh, row * D + c, there), old_y, old_z, gate_z, gate_y, new_z, new_y


@triton.jit(do_not_specialize=["T"])
def head_backward(
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


def heads_forward(drive, y, z, from_y, from_z, h, kept, dt) -> None:
    given = drive, y, z, from_y, from_z, h, kept, dt
    _run(head_forward, drive, from_y, *given)


def heads_backward(dh, y0, z0, h, kept, from_y, from_z, d_drive, dy, dz, dt) -> None:
    given = dh, y0, z0, h, kept, from_y, from_z, d_drive, dy, dz, dt
    _run(head_backward, dh, from_y, *given)


def _run(kernel: Any, over_time: Tensor, from_y: Tensor, *arguments: Any) -> None:
    """A kernel of heads, for weights (3, G, S, S) and a batch and time as those of (B, T, ...)."""
    (batch, time), (_, heads, size, _) = over_time.shape[:2], from_y.shape
    wide = max(ROWS, triton.next_power_of_2(size))
    grid = (triton.cdiv(batch, ROWS) * heads,)
    given = *arguments, batch, time, size, heads
    launch(kernel, grid, *given, ROWS=ROWS, WIDE=wide, warps=wide // 8)
