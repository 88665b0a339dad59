"""The linear scan in one forward and one backward pass, in float32.  Keeps the gates and h."""

# B batch, T time, H state width

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled
from seqlm.ops.cpu.numbers import F32, load, store
from seqlm.ops.cpu.threads import channels_of, run_channels
from seqlm.ops.states import Tensors


def forward(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensors, Tensors]:
    gates, inputs, h0 = a.float().contiguous(), b.float().contiguous(), h0.contiguous()
    h = torch.empty_like(inputs)
    run_channels(linear_forward, h0, gates, inputs, h0, h)
    return (h.to(b.dtype), h[:, -1].clone()), (a, h, h0)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    (a, h, h0), (dh, d_last) = saved, gradients
    gates = a.float().contiguous()
    da, db, dh0 = torch.empty_like(gates), torch.empty_like(gates), torch.empty_like(h0)
    arguments = gates, h0, h, dh.float().contiguous(), d_last.contiguous(), da, db, dh0
    run_channels(linear_backward, h0, *arguments)
    return da.to(a.dtype), db.to(dh.dtype), dh0


@compiled()
def linear_forward(a, b, h0, h, block, first, end):
    """a, b: (B, T, H), h0: (B, H) -> h: (B, T, H)."""
    width, time = h0.shape[1], a.shape[1]
    state = np.empty(block, F32)
    for job in range(first, end):
        r, start, n = channels_of(job, width, block)
        s = state[:n]
        load(s, h0[r][start:])
        for t in range(time):
            keep, new = a[r, t][start : start + n], b[r, t][start : start + n]
            out = h[r, t][start : start + n]
            for j in range(n):
                s[j] = keep[j] * s[j] + new[j]
                out[j] = s[j]


@compiled()
def linear_backward(a, h0, h, dh, dlast, da, db, dh0, block, first, end):
    """Writes da, db and dh0: dL/d(a, b, h0).  dh, dlast: dL/dh_t and dL/d(last state) through the
    outputs alone.  total: what step t + 1 adds to dL/dh_t."""
    width, time = h0.shape[1], a.shape[1]
    carry = np.empty(block, F32)
    for job in range(first, end):
        r, start, n = channels_of(job, width, block)
        total = carry[:n]
        load(total, dlast[r][start:])
        for t in range(time - 1, -1, -1):
            old = h[r, t - 1][start : start + n] if t else h0[r][start : start + n]
            keep, d_out = a[r, t][start : start + n], dh[r, t][start : start + n]
            d_keep, d_new = da[r, t][start : start + n], db[r, t][start : start + n]
            for j in range(n):
                d = d_out[j] + total[j]  # the complete dL/dh_t
                d_new[j] = d
                d_keep[j] = d * old[j]
                total[j] = keep[j] * d
        store(dh0[r][start:][:n], total)
