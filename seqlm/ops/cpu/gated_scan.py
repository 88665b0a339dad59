"""The gated scan: activations and recurrence in one forward and one backward pass.

Keeps only the drive and h; the backward pass computes the activations again.
"""

# B batch, T time, H state width

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled, inlined
from seqlm.ops.cpu.numbers import F32, HALF, ONE, exp, load, read, store, write
from seqlm.ops.cpu.threads import channels_of, run_channels
from seqlm.ops.states import Tensors


def forward(drive: Tensor, h0: Tensor, candidate: str) -> tuple[Tensors, Tensors]:
    drive, h0 = drive.contiguous(), h0.contiguous()
    h, last = drive.new_empty(*drive.shape[:2], h0.shape[1]), torch.empty_like(h0)
    run_channels(gated_forward, h0, drive, h0, h, last, candidate == "positive")
    return (h, last), (drive, h, h0)


def backward(saved: Tensors, gradients: Tensors, candidate: str) -> Tensors:
    drive, h, h0 = saved
    dh, d_last = (d.contiguous() for d in gradients)
    d_drive, dh0 = torch.empty_like(drive), torch.empty_like(h0)
    positive = candidate == "positive"
    run_channels(gated_backward, h0, drive, h0, h, dh, d_last, d_drive, dh0, positive)
    return d_drive, dh0


@inlined()
def candidate_and_slope(u, positive):
    """Returns g(u) and g'(u)."""
    s = ONE / (ONE + exp(-u))
    g = u + HALF if u >= F32(0) else s
    slope = ONE if u >= F32(0) else s * (ONE - s)
    return (g, slope) if positive else (u, ONE)


@inlined()
def exp_of_both(k_f, k_i):
    """e^-k_f and e^-k_i, both scaled down where both would overflow, which keeps their ratio."""
    shift = max(F32(-40) - max(k_f, k_i), F32(0))
    return exp(-(k_f + shift)), exp(-(k_i + shift))


@inlined()
def advance(s, row, width, start, positive):
    """One step in place.  s: the state's channels from `start` on.  row: the step's drive."""
    n, parts = len(s), len(row) // width
    u = row[(parts - 1) * width + start :][:n]
    if parts == 2:
        k = row[start:][:n]
        for j in range(n):
            e = exp(-read(k[j]))
            z = ONE / (ONE + e)
            g, _ = candidate_and_slope(read(u[j]), positive)
            s[j] = e * z * s[j] + z * g
    else:
        k_f, k_i = row[start:][:n], row[width + start :][:n]
        for j in range(n):
            e_f, e_i = exp_of_both(read(k_f[j]), read(k_i[j]))
            f, i = ONE + e_f, ONE + e_i
            z = f / (f + i)
            g, _ = candidate_and_slope(read(u[j]), positive)
            s[j] = i / (f + i) * s[j] + z * g


@compiled()
def gated_forward(drive, h0, h, last, positive, block, first, end):
    """drive: (B, T, 2 H) or (B, T, 3 H) -> h: (B, T, H) and last: (B, H)."""
    width, time = h0.shape[1], drive.shape[1]
    state = np.empty(block, F32)
    for job in range(first, end):
        b, start, n = channels_of(job, width, block)
        s = state[:n]
        load(s, h0[b][start:])
        for t in range(time):
            advance(s, drive[b, t], width, start, positive)
            store(h[b, t][start:][:n], s)
        store(last[b][start:][:n], s)


@compiled()
def gated_backward(drive, h0, h, dh, dlast, d_drive, dh0, positive, block, first, end):
    """Writes d_drive and dh0: dL/d(drive) and dL/dh0.  dh, dlast: dL/dh_t and dL/d(last state)
    through the outputs alone.  total: what step t + 1 adds to dL/dh_t."""
    width, time = h0.shape[1], drive.shape[1]
    parts = drive.shape[2] // width
    carry, previous = np.empty(block, F32), np.empty(block, F32)
    for job in range(first, end):
        b, start, n = channels_of(job, width, block)
        total, old = carry[:n], previous[:n]
        load(total, dlast[b][start:])
        for t in range(time - 1, -1, -1):
            if t:
                load(old, h[b, t - 1][start:])
            else:
                load(old, h0[b][start:])
            row, d_row, d_out = drive[b, t], d_drive[b, t], dh[b, t][start : start + n]
            u, du = row[(parts - 1) * width + start :][:n], d_row[(parts - 1) * width + start :][:n]
            if parts == 2:
                k, dk = row[start:][:n], d_row[start:][:n]
                for j in range(n):
                    e = exp(-read(k[j]))
                    z = ONE / (ONE + e)
                    keep = e * z
                    g, slope = candidate_and_slope(read(u[j]), positive)
                    d = read(d_out[j]) + total[j]  # the complete dL/dh_t
                    write(dk, j, d * (g - old[j]) * z * keep)
                    write(du, j, d * z * slope)
                    total[j] = keep * d
            else:
                k_f, dk_f = row[start:][:n], d_row[start:][:n]
                k_i, dk_i = row[width + start :][:n], d_row[width + start :][:n]
                for j in range(n):
                    e_f, e_i = exp_of_both(read(k_f[j]), read(k_i[j]))
                    f, i = ONE + e_f, ONE + e_i
                    z, keep = f / (f + i), i / (f + i)
                    g, slope = candidate_and_slope(read(u[j]), positive)
                    d = read(d_out[j]) + total[j]
                    dk = d * (g - old[j]) * z * keep
                    write(dk_f, j, -dk * (e_f / f))
                    write(dk_i, j, dk * (e_i / i))
                    write(du, j, d * z * slope)
                    total[j] = keep * d
        store(dh0[b][start:][:n], total)
