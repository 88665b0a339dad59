"""GELU for one character."""

import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled
from seqlm.ops.cpu.numbers import normal
from seqlm.ops.cpu.steps import for_one_character, rows_at
from seqlm.ops.states import Tensors

FEW_NUMBERS = 1 << 14  # at most: PyTorch is faster for more


def serves(x: Tensor) -> bool:
    return x.numel() <= FEW_NUMBERS and for_one_character(x)


def forward(x: Tensor) -> tuple[Tensors, Tensors]:
    x = x.contiguous()
    y = torch.empty_like(x)
    step_gelu(x.data_ptr(), y.data_ptr(), x.numel())
    return (y,), ()


@compiled()
def step_gelu(x_at, y_at, size):
    x, y = rows_at(x_at, 1, size)[0], rows_at(y_at, 1, size)[0]
    for j in range(size):
        y[j] = x[j] * normal(x[j])[0]
