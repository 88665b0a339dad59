"""The recurrence of a diagonal CfC in one pass each way.

Keeps only the drive and h: all else is computed again on the way back.
"""

# B batch, T time, D width, P parts of the drive

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled, part
from seqlm.ops.cpu.gates import add_second_head, head_gradients, mix
from seqlm.ops.cpu.numbers import (
    F32,
    ONE,
    add,
    add_scaled,
    fill,
    load,
    sigmoid,
    sigmoids,
    store,
    tanhs,
)
from seqlm.ops.cpu.threads import channels_of, run_channels
from seqlm.ops.states import Tensors


def forward(
    drive: Tensor, h0: Tensor, weights: Tensor, gated: bool, tau: float
) -> tuple[Tensors, Tensors]:
    drive, h0, weights = (x.contiguous() for x in (drive, h0, weights))
    h, last = drive.new_empty(*drive.shape[:2], h0.shape[1]), torch.empty_like(h0)
    run_channels(diagonal_cfc_forward, h0, drive, h0, weights, h, last, gated, tau)
    return (h, last), (drive, h0, weights, h)


def backward(saved: Tensors, gradients: Tensors, gated: bool, tau: float) -> Tensors:
    drive, h0, weights, h = saved
    dh, d_last = gradients
    d_drive, parts = torch.empty_like(drive), weights.new_zeros(len(h), *weights.shape)
    dh0 = d_last.clone(memory_format=torch.contiguous_format)
    dh = dh.contiguous()
    run_channels(diagonal_cfc_backward, h0, *saved, dh, d_drive, dh0, parts, gated, tau)
    return d_drive, dh0, parts.sum(0)


@part()
def diagonal_heads(inside, drive, weights, h, width, start, tau):
    """Writes inside: (P, n), what goes into both tanh, the gate and, if there is one, the leak."""
    n = len(h)
    for i in range(len(inside)):
        load(inside[i][:n], drive[i * width + start :])
    for i in range(3):
        add_scaled(inside[i][:n], weights[i][start:], h)
    gate = inside[2]
    for c in range(n):
        gate[c] *= tau


@part()
def leak_gradients(d, old, new, leak):
    """The gradient of state = mix(old, new, sigmoid(leak)).

    In place: d holds dL/dstate, then dL/dold; new and leak hold their values, then their gradients.
    """
    for c in range(len(d)):
        g, rest = sigmoid(leak[c])
        leak[c] = d[c] * (new[c] - old[c]) * g * rest
        new[c] = d[c] * g
        d[c] *= rest


@compiled()
def diagonal_cfc_forward(drive, h0, weights, h, last, gated, tau, block, first, end):
    """drive: (B, T, 3 D), or (B, T, 4 D) with a leak.  weights: (3, D)."""
    width, time = h0.shape[1], drive.shape[1]
    leaky = drive.shape[2] == 4 * width
    state, inside = np.empty(block, F32), np.empty((drive.shape[2] // width, block), F32)
    for job in range(first, end):
        b, start, n = channels_of(job, width, block)
        s, new, second, gate = state[:n], inside[0][:n], inside[1][:n], inside[2][:n]
        load(s, h0[b][start:])
        for t in range(time):
            diagonal_heads(inside, drive[b, t], weights, s, width, start, tau)
            tanhs(new)
            tanhs(second)
            sigmoids(gate, ONE)
            add_second_head(new, second, gate, gated)
            if leaky:
                leak = inside[3][:n]
                sigmoids(leak, ONE)
                mix(s, new, leak)
            else:
                load(s, new)
            store(h[b, t][start:][:n], s)
        store(last[b][start:][:n], s)


@compiled()
def diagonal_cfc_backward(
    drive, h0, weights, h, dh, d_drive, dh0, parts, gated, tau, block, first, end
):
    """In place: dh0, (B, D), holds the gradient of the last state, then of the first.

    parts: (B, 3, D), zeros when it begins, a row's part of the weights' gradient when it ends.
    """
    width, time = h0.shape[1], drive.shape[1]
    leaky = drive.shape[2] == 4 * width
    inside = np.empty((drive.shape[2] // width, block), F32)
    rows = np.empty((4, block), F32)
    for job in range(first, end):
        b, start, n = channels_of(job, width, block)
        d, old, share = dh0[b][start:][:n], rows[0][:n], rows[3][:n]
        new, second = rows[1][:n], rows[2][:n]
        f_1, f_2, gate = inside[0][:n], inside[1][:n], inside[2][:n]
        for t in range(time - 1, -1, -1):
            if t:
                load(old, h[b, t - 1][start:])
            else:
                load(old, h0[b][start:])
            diagonal_heads(inside, drive[b, t], weights, old, width, start, tau)
            add(d, dh[b, t][start:])
            if leaky:
                load(new, f_1)
                load(second, f_2)
                tanhs(new)
                tanhs(second)
                load(share, gate)
                sigmoids(share, ONE)
                add_second_head(new, second, share, gated)
                leak_gradients(d, old, new, inside[3][:n])
            else:
                load(new, d)
                fill(d, F32(0))
            head_gradients(new, f_1, f_2, gate, gated)
            for c in range(n):
                gate[c] *= tau
            for i in range(3):
                add_scaled(d, weights[i][start:], inside[i])
                add_scaled(parts[b, i][start:][:n], inside[i], old)
            for i in range(len(inside)):
                store(d_drive[b, t][i * width + start :][:n], inside[i])
