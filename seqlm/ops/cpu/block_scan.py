"""The scan of 2 x 2 blocks, in float32; the gradient is the same loop over reversed time.

Keeps the gates and h.
"""

# B batch, T time, H state width

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled
from seqlm.ops.cpu.numbers import F32, add_scaled, load, store
from seqlm.ops.cpu.threads import channels_of, run_channels
from seqlm.ops.states import Tensors
from seqlm.ops.torch import linear_scan


def forward(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensors, Tensors]:
    return linear_scan.forward(a, b, h0, scan)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    return linear_scan.backward(saved, gradients, scan)


def scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    run_channels(block_forward, h0, a.contiguous(), b.contiguous(), h0.contiguous(), h)
    return h


@compiled()
def block_forward(a, b, h0, h, block, first, end):
    """Gates (B, T, 2, 2, H), the rest (B, T, 2, H) and (B, 2, H)."""
    width, time = h0.shape[2], b.shape[1]
    state, new = np.empty((2, block), F32), np.empty((2, block), F32)
    for job in range(first, end):
        r, start, n = channels_of(job, width, block)
        for i in range(2):
            load(state[i][:n], h0[r, i][start:][:n])
        for t in range(time):
            for i in range(2):
                load(new[i][:n], b[r, t, i][start:][:n])
                for j in range(2):
                    add_scaled(new[i][:n], a[r, t, i, j][start:][:n], state[j])
            for i in range(2):
                load(state[i], new[i])
                store(h[r, t, i][start:][:n], state[i])
