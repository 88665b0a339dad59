"""The recurrence of a diagonal CfC in one forward and one backward pass.

Keeps only the drive and h; the backward pass computes everything else again.
"""

# B batch, T time, D width, P parts of the drive

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled, inlined
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
    d_drive, weight_sums = torch.empty_like(drive), weights.new_zeros(len(h), *weights.shape)
    dh0 = d_last.clone(memory_format=torch.contiguous_format)
    dh = dh.contiguous()
    run_channels(diagonal_cfc_backward, h0, *saved, dh, d_drive, dh0, weight_sums, gated, tau)
    return d_drive, dh0, weight_sums.sum(0)


@inlined()
def diagonal_heads(inputs, drive, weights, h, width, start, tau):
    """Writes inputs: (P, n), the arguments of both tanh, of the gate and, if any, of the leak."""
    n = len(h)
    for i in range(len(inputs)):
        load(inputs[i][:n], drive[i * width + start :])
    for i in range(3):
        add_scaled(inputs[i][:n], weights[i][start:], h)
    gate = inputs[2]
    for j in range(n):
        gate[j] *= tau


@inlined()
def leak_gradients(d_state, old, new, leak):
    """The gradient of state = mix(old, new, sigmoid(leak)).

    In place: d_state holds dL/d(state), then dL/d(old).  new and leak hold their values, then
    dL/d(new) and dL/d(leak).
    """
    for j in range(len(d_state)):
        g, rest = sigmoid(leak[j])
        leak[j] = d_state[j] * (new[j] - old[j]) * g * rest
        new[j] = d_state[j] * g
        d_state[j] *= rest


@compiled()
def diagonal_cfc_forward(drive, h0, weights, h, last, gated, tau, block, first, end):
    """drive: (B, T, 3 D), or (B, T, 4 D) with a leak.  weights: (3, D)."""
    width, time = h0.shape[1], drive.shape[1]
    leaky = drive.shape[2] == 4 * width
    state, inputs = np.empty(block, F32), np.empty((drive.shape[2] // width, block), F32)
    for job in range(first, end):
        b, start, n = channels_of(job, width, block)
        s, new, second, gate = state[:n], inputs[0][:n], inputs[1][:n], inputs[2][:n]
        load(s, h0[b][start:])
        for t in range(time):
            diagonal_heads(inputs, drive[b, t], weights, s, width, start, tau)
            tanhs(new)
            tanhs(second)
            sigmoids(gate, ONE)
            add_second_head(new, second, gate, gated)
            if leaky:
                leak = inputs[3][:n]
                sigmoids(leak, ONE)
                mix(s, new, leak)
            else:
                load(s, new)
            store(h[b, t][start:][:n], s)
        store(last[b][start:][:n], s)


@compiled()
def diagonal_cfc_backward(
    drive, h0, weights, h, dh, d_drive, dh0, weight_sums, gated, tau, block, first, end
):
    """Writes d_drive: dL/d(drive).  dh: dL/dh_t through the output alone.

    In place: dh0, (B, D), holds dL/d(last state), then dL/dh0.  weight_sums: (B, 3, D), zeros, to
    which each row of the batch adds its summands of dL/d(weights).
    """
    width, time = h0.shape[1], drive.shape[1]
    leaky = drive.shape[2] == 4 * width
    inputs = np.empty((drive.shape[2] // width, block), F32)
    rows = np.empty((4, block), F32)
    for job in range(first, end):
        b, start, n = channels_of(job, width, block)
        d_state, old, s = dh0[b][start:][:n], rows[0][:n], rows[3][:n]
        new, second = rows[1][:n], rows[2][:n]
        f_1, f_2, gate = inputs[0][:n], inputs[1][:n], inputs[2][:n]
        for t in range(time - 1, -1, -1):
            if t:
                load(old, h[b, t - 1][start:])
            else:
                load(old, h0[b][start:])
            diagonal_heads(inputs, drive[b, t], weights, old, width, start, tau)
            add(d_state, dh[b, t][start:])
            if leaky:
                load(new, f_1)
                load(second, f_2)
                tanhs(new)
                tanhs(second)
                load(s, gate)
                sigmoids(s, ONE)
                add_second_head(new, second, s, gated)
                leak_gradients(d_state, old, new, inputs[3][:n])
            else:
                load(new, d_state)
                fill(d_state, F32(0))
            # new holds dL/d(new)
            head_gradients(new, f_1, f_2, gate, gated)
            for j in range(n):
                gate[j] *= tau
            for i in range(3):
                add_scaled(d_state, weights[i][start:], inputs[i])
                add_scaled(weight_sums[b, i][start:][:n], inputs[i], old)
            for i in range(len(inputs)):
                store(d_drive[b, t][i * width + start :][:n], inputs[i])
