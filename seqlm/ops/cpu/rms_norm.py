"""RMSNorm: a pass over whole rows each way, and a call by addresses for one character."""

# N rows, D width

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import REASSOCIATED, compiled, part
from seqlm.ops.cpu.numbers import F32, ONE, read, write
from seqlm.ops.cpu.steps import for_one_character, rows_at
from seqlm.ops.cpu.threads import run_rows
from seqlm.ops.states import Tensors, autocast_dtype

EPSILON = np.finfo(np.float32).eps  # as torch.nn.functional.rms_norm has it
FEW = 1 << 13  # numbers up to which PyTorch is faster where a gradient is wanted
BLOCK = 256  # rows of a job, whatever the number of threads: sums over rows are made of these
WRITTEN = (torch.float32, torch.bfloat16)


def serves(x: Tensor, weight: Tensor) -> bool:
    if not x.numel() or weight.ndim != 1 or weight.shape != x.shape[-1:]:
        return False
    if x.numel() <= FEW:
        return for_one_character(x, weight)
    return x.dtype == weight.dtype == torch.float32 and autocast_dtype(x) in WRITTEN


def forward(x: Tensor, weight: Tensor) -> tuple[Tensors, Tensors]:
    """In autocast's dtype where that is on."""
    weight = weight.contiguous()
    if x.numel() <= FEW:
        x, width = x.contiguous(), len(weight)
        y = torch.empty_like(x)
        at = x.data_ptr(), weight.data_ptr(), y.data_ptr()
        step_norm(*at, x.numel() // width, width)
        return (y,), ()
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y, scale = torch.empty_like(rows, dtype=autocast_dtype(x)), rows.new_empty(len(rows))
    run_rows(norm_forward, len(rows), BLOCK, rows, weight, y, scale)
    return (y.view(x.shape),), (rows, weight, scale)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    (x, weight, scale), (dy,) = saved, gradients
    dx, parts = torch.empty_like(x), x.new_zeros(-(-len(x) // BLOCK), x.shape[1])
    given = x, weight, scale, dy.reshape(x.shape).contiguous()
    run_rows(norm_backward, len(x), BLOCK, *given, dx, parts)
    return dx.view(dy.shape), parts.sum(0)


@part(fastmath=REASSOCIATED)
def norm_row(x, weight, y):
    """Writes the normed row y; returns the factor 1 / sqrt(mean(x^2) + eps)."""
    total = F32(0)
    for c in range(len(x)):
        total += x[c] * x[c]
    r = ONE / np.sqrt(total / F32(len(x)) + EPSILON)
    for c in range(len(x)):
        write(y, c, x[c] * r * weight[c])
    return r


@compiled(fastmath=REASSOCIATED)
def norm_forward(x, weight, y, scale, block, first, end):
    """x, y: (N, D), scale: (N,), the factor of each row."""
    for row in range(first * block, min(end * block, x.shape[0])):
        scale[row] = norm_row(x[row], weight, y[row])


@compiled(fastmath=REASSOCIATED)
def norm_backward(x, weight, scale, dy, dx, parts, block, first, end):
    """parts: (jobs, D), zeros, then each job's part of the weight's gradient."""
    width = x.shape[1]
    for job in range(first, end):
        d_weight = parts[job]
        for row in range(job * block, min((job + 1) * block, x.shape[0])):
            inside, d_in, d_out, r = x[row], dx[row], dy[row], scale[row]
            total = F32(0)
            for c in range(width):
                total += read(d_out[c]) * weight[c] * inside[c]
            share = total * r * r * r / F32(width)
            for c in range(width):
                d = read(d_out[c])
                d_weight[c] += d * inside[c] * r
                d_in[c] = d * weight[c] * r - inside[c] * share


@compiled(fastmath=REASSOCIATED)
def step_norm(x_at, weight_at, y_at, rows, width):
    x, y = rows_at(x_at, rows, width), rows_at(y_at, rows, width)
    weight = rows_at(weight_at, 1, width)[0]
    for row in range(rows):
        norm_row(x[row], weight, y[row])
