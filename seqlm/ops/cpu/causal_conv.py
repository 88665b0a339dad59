"""The causal convolution in float32, in one forward and one backward pass."""

# B batch, T time, D width, K kernel

import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled
from seqlm.ops.cpu.numbers import load
from seqlm.ops.cpu.threads import run_rows
from seqlm.ops.states import Tensors


def serves(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    width, kernel = len(weight), weight.shape[-1]
    if (weight.shape, x.shape[2:], bias.shape) != ((width, 1, kernel), (width,), (width,)):
        return False
    return x.shape[1] >= kernel and x.dtype == weight.dtype == bias.dtype == torch.float32


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensors, Tensors]:
    batch, places, width = x.shape
    x, weight = x.contiguous(), weight[:, 0].t().contiguous()  # (K, D): rows of channels
    y = x.new_empty(batch, places - len(weight) + 1, width)
    run_rows(conv_forward, batch, 1, x, weight, bias.contiguous(), y)
    return (y,), (x, weight)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    (x, weight), (dy,) = saved, gradients
    dx, partial_sums = torch.zeros_like(x), x.new_zeros(len(x), len(weight) + 1, x.shape[2])
    run_rows(conv_backward, len(x), 1, x, weight, dy.contiguous(), dx, partial_sums)
    *dw, db = partial_sums.sum(0)
    return dx, torch.stack(dw, dim=1).unsqueeze(1), db


@compiled()
def conv_forward(x, weight, bias, y, block, first, end):
    """x: (B, K - 1 + T, D), weight: (K, D) -> y: (B, T, D)."""
    for b in range(first * block, min(end * block, x.shape[0])):
        for t in range(y.shape[1]):
            out = y[b, t]
            load(out, bias)
            for k in range(weight.shape[0]):
                row, w = x[b, t + k], weight[k]
                for j in range(len(out)):
                    out[j] += w[j] * row[j]


@compiled()
def conv_backward(x, weight, dy, dx, partial_sums, block, first, end):
    """Adds dL/dx to dx.  dy: dL/dy.  partial_sums: (B, K + 1, D), zeros, to which each row of the
    batch adds its summands of dL/d(weight) and, last, of dL/d(bias)."""
    for b in range(first * block, min(end * block, x.shape[0])):
        d_bias = partial_sums[b, weight.shape[0]]
        for t in range(dy.shape[1]):
            d_out = dy[b, t]
            for j in range(len(d_out)):
                d_bias[j] += d_out[j]
            for k in range(weight.shape[0]):
                row, d_row, w, dw = x[b, t + k], dx[b, t + k], weight[k], partial_sums[b, k]
                for j in range(len(d_out)):
                    dw[j] += d_out[j] * row[j]
                for j in range(len(d_out)):
                    d_row[j] += d_out[j] * w[j]
