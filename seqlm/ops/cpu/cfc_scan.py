"""CfC's recurrence with its matrix products in one loop over time, forward and backward.

Keeps (B, T, 2 U + 3 D) in the drive's dtype: the argument and the value of the backbone's
activation, and the arguments of both tanh and of the gate.
"""

# B batch, T time, D width, U backbone units

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cfc_scan import index_of, weight_gradients
from seqlm.ops.cpu.activations import activate, activation
from seqlm.ops.cpu.compile import compiled
from seqlm.ops.cpu.gates import add_second_head, head_gradients
from seqlm.ops.cpu.numbers import (
    F32,
    ONE,
    add,
    fill,
    load,
    read,
    sigmoids,
    store,
    tanhs,
)
from seqlm.ops.cpu.products import add_product
from seqlm.ops.cpu.threads import run_batch
from seqlm.ops.states import Tensors


def forward(
    drive: Tensor, h0: Tensor, from_h: Tensor, heads: Tensor, bias: Tensor,
    activation: str, gated: bool,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    (batch, time, units), width = drive.shape, h0.shape[1]
    h = drive.new_empty(batch, time, width)
    kept = drive.new_empty(batch, time, 2 * units + 3 * width)
    state = h0.clone(memory_format=torch.contiguous_format)
    in_h, in_heads = (w.float().t().contiguous() for w in (from_h, heads))
    arguments = drive.contiguous(), state, in_h, in_heads, bias.float().contiguous(), h, kept
    run_batch(cfc_forward, batch, *arguments, index_of(activation), gated)
    return (h, state), (h0, from_h, heads, bias, h, kept)


def backward(saved: Tensors, gradients: Tensors, activation: str, gated: bool) -> Tensors:
    h0, from_h, heads, _, h, kept = saved
    dh, d_last = gradients
    units, width = from_h.shape
    d_drive, d_heads = (h.new_empty(*h.shape[:2], size) for size in (units, 3 * width))
    dh0 = d_last.clone(memory_format=torch.contiguous_format)
    weights = (w.float().contiguous() for w in (from_h, heads))
    arguments = dh.contiguous(), kept, *weights, d_drive, d_heads, dh0
    run_batch(cfc_backward, len(h0), *arguments, index_of(activation), gated)
    return d_drive, dh0, *weight_gradients(d_drive, d_heads, saved)


@compiled()
def cfc_forward(drive, states, in_h, in_heads, bias, h, kept, kind, gated, block, first, end):
    """In place: states, (B, D), holds the first state, then the last.

    Writes h: (B, T, D) and kept: (B, T, 2 U + 3 D).  in_h: (D, U), in_heads: (U, 3 D).
    """
    width, units, time = states.shape[1], drive.shape[2], drive.shape[1]
    for job in range(first, end):
        begin, stop = job * block, min((job + 1) * block, drive.shape[0])
        state, n = states[begin:stop], stop - begin
        p, f = np.empty((n, units), F32), np.empty((n, 3 * width), F32)
        for t in range(time):
            for r in range(n):
                load(p[r], drive[begin + r, t])
                load(f[r], bias)
            add_product(p, 0, state, 0, in_h)
            for r in range(n):
                keep = kept[begin + r, t]
                store(keep[:units], p[r])
                activate(p[r], kind)
                store(keep[units:][:units], p[r])
            add_product(f, 0, p, 0, in_heads)
            for r in range(n):
                row, s = f[r], state[r]
                store(kept[begin + r, t][2 * units :], row)
                tanhs(row[: 2 * width])
                sigmoids(row[2 * width :], ONE)
                load(s, row)
                add_second_head(s, row[width:][:width], row[2 * width :], gated)
                store(h[begin + r, t], s)


@compiled()
def cfc_backward(dh, kept, by_h, by_heads, d_drive, d_heads, dh0, kind, gated, block, first, end):
    """Writes d_drive: dL/d(drive), (B, T, U), and d_heads: dL/d(arguments of both tanh and of the
    gate), (B, T, 3 D).  dh: dL/dh_t through the output alone.

    In place: dh0, (B, D), holds dL/d(last state), then dL/dh0.  by_h: (U, D), by_heads: (3 D, U).
    """
    width, units, time = dh0.shape[1], d_drive.shape[2], dh.shape[1]
    for job in range(first, end):
        begin, stop = job * block, min((job + 1) * block, dh.shape[0])
        carry, n = dh0[begin:stop], stop - begin
        # p: dL/d(the backbone's value), then of its argument.  f: the heads, then dL/d(the heads).
        p, f = np.empty((n, units), F32), np.empty((n, 3 * width), F32)
        for t in range(time - 1, -1, -1):
            for r in range(n):
                total, row = carry[r], f[r]
                add(total, dh[begin + r, t])
                load(row, kept[begin + r, t][2 * units :])
                head_gradients(total, row[:width], row[width:][:width], row[2 * width :], gated)
                store(d_heads[begin + r, t], row)
                fill(total, F32(0))  # h_{t-1} acts on h_t only through the backbone
                fill(p[r], F32(0))
            add_product(p, 0, f, 0, by_heads)
            for r in range(n):
                row, arguments = p[r], kept[begin + r, t]
                for j in range(units):
                    row[j] *= activation(read(arguments[j]), kind)[1]
                store(d_drive[begin + r, t], row)
            add_product(carry, 0, p, 0, by_h)
