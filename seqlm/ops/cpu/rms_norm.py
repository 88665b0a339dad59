"""RMSNorm: one pass over rows, forward and backward; a loop by addresses for one character."""

# N rows, D width

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import REASSOCIATED, compiled, inlined
from seqlm.ops.cpu.numbers import F32, ONE, read, write
from seqlm.ops.cpu.steps import for_one_character, rows_at
from seqlm.ops.cpu.threads import run_rows
from seqlm.ops.states import Tensors, autocast_dtype

EPSILON = np.finfo(np.float32).eps  # the default of torch.nn.functional.rms_norm
FEW_NUMBERS = (
    1 << 13
)  # at most: the loop by addresses; PyTorch is faster where gradients are needed
ROWS_OF_JOB = 256  # for any number of threads, so that sums over rows do not depend on it
OUTPUT_DTYPES = (torch.float32, torch.bfloat16)


def serves(x: Tensor, weight: Tensor) -> bool:
    if not x.numel() or weight.ndim != 1 or weight.shape != x.shape[-1:]:
        return False
    if x.numel() <= FEW_NUMBERS:
        return for_one_character(x, weight)
    return x.dtype == weight.dtype == torch.float32 and autocast_dtype(x) in OUTPUT_DTYPES


def forward(x: Tensor, weight: Tensor) -> tuple[Tensors, Tensors]:
    """In autocast's dtype where that is on."""
    weight = weight.contiguous()
    if x.numel() <= FEW_NUMBERS:
        x, width = x.contiguous(), len(weight)
        y = torch.empty_like(x)
        at = x.data_ptr(), weight.data_ptr(), y.data_ptr()
        step_norm(*at, x.numel() // width, width)
        return (y,), ()
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y, scale = torch.empty_like(rows, dtype=autocast_dtype(x)), rows.new_empty(len(rows))
    run_rows(norm_forward, len(rows), ROWS_OF_JOB, rows, weight, y, scale)
    return (y.view(x.shape),), (rows, weight, scale)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    (x, weight, scale), (dy,) = saved, gradients
    dx, partial_sums = torch.empty_like(x), x.new_zeros(-(-len(x) // ROWS_OF_JOB), x.shape[1])
    arguments = x, weight, scale, dy.reshape(x.shape).contiguous(), dx, partial_sums
    run_rows(norm_backward, len(x), ROWS_OF_JOB, *arguments)
    return dx.view(dy.shape), partial_sums.sum(0)


@inlined(fastmath=REASSOCIATED)
def norm_row(x, weight, y):
    """Writes y, the normed row x; returns the factor 1 / sqrt(mean(x^2) + eps)."""
    total = F32(0)
    for j in range(len(x)):
        total += x[j] * x[j]
    r = ONE / np.sqrt(total / F32(len(x)) + EPSILON)
    for j in range(len(x)):
        write(y, j, x[j] * r * weight[j])
    return r


@compiled(fastmath=REASSOCIATED)
def norm_forward(x, weight, y, scale, block, first, end):
    """x, y: (N, D), scale: (N,), the factor of each row."""
    for row in range(first * block, min(end * block, x.shape[0])):
        scale[row] = norm_row(x[row], weight, y[row])


@compiled(fastmath=REASSOCIATED)
def norm_backward(x, weight, scale, dy, dx, partial_sums, block, first, end):
    """Writes dx: dL/dx.  dy: dL/dy.  partial_sums: (jobs, D), zeros, to which each job adds its
    summands of dL/d(weight)."""
    width = x.shape[1]
    for job in range(first, end):
        d_weight = partial_sums[job]
        for row in range(job * block, min((job + 1) * block, x.shape[0])):
            x_row, d_row, d_out, r = x[row], dx[row], dy[row], scale[row]
            total = F32(0)
            for j in range(width):
                total += read(d_out[j]) * weight[j] * x_row[j]
            share = total * r * r * r / F32(width)
            for j in range(width):
                d = read(d_out[j])
                d_weight[j] += d * x_row[j] * r
                d_row[j] = d * weight[j] * r - x_row[j] * share


@compiled(fastmath=REASSOCIATED)
def step_norm(x_at, weight_at, y_at, rows, width):
    x, y = rows_at(x_at, rows, width), rows_at(y_at, rows, width)
    weight = rows_at(weight_at, 1, width)[0]
    for row in range(rows):
        norm_row(x[row], weight, y[row])
