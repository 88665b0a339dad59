"""Linear layers in float32: few rows by a loop, many by oneDNN.

For one character's few rows the loop takes about as long as reading the weights from memory.  For
many rows PyTorch calls Intel's MKL, which on other makers' processors may be half as fast as
oneDNN.
"""

# R rows, I inputs, O outputs

import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.ops.cpu.compile import compiled
from seqlm.ops.cpu.products import write_product
from seqlm.ops.cpu.steps import for_one_character
from seqlm.ops.states import Tensors

FEW_ROWS = 8  # at most: computed by the loop
MANY_ROWS = 64  # at least: computed by oneDNN; PyTorch computes products between the two


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if weight.ndim != 2 or x.ndim == 0:
        return False
    inputs = weight.shape[1]
    if x.shape[-1] != inputs:
        return False
    rows = x.numel() // inputs
    if rows <= FEW_ROWS:
        return for_one_character(x, weight, bias)
    if rows < MANY_ROWS or torch.is_autocast_enabled("cpu") or not onednn():
        return False
    return all(t is None or t.dtype == torch.float32 for t in (x, weight, bias))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensors, tuple[Tensor | None, ...]]:
    outputs, inputs = weight.shape
    if x.numel() <= FEW_ROWS * inputs:
        y = x.new_empty(*x.shape[:-1], outputs)
        x, weight = x.contiguous(), weight.contiguous()
        bias = bias if bias is None else bias.contiguous()
        bias_at = 0 if bias is None else bias.data_ptr()
        at = x.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr()
        step_linear(*at, x.numel() // inputs, inputs, outputs)
        return (y,), ()
    rows, weight = x.reshape(-1, inputs).contiguous(), weight.contiguous()
    return (product(rows, weight, bias).view(*x.shape[:-1], -1),), (rows, weight, bias)


def backward(saved: tuple[Tensor | None, ...], gradients: Tensors) -> tuple[Tensor | None, ...]:
    (rows, weight, bias), (dy,) = saved, gradients
    assert rows is not None
    assert weight is not None  # only the bias may be left out
    d = dy.reshape(len(rows), -1).contiguous()
    dx = product(d, weight.t().contiguous()).view(*dy.shape[:-1], -1)
    return dx, d.t() @ rows, None if bias is None else d.sum(0)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias by oneDNN, through an undocumented operator of PyTorch."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def onednn() -> bool:
    """Whether that operator exists, accepts the arguments above and computes the product."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    x, weight, bias = torch.ones(2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)
    try:
        y = product(x, weight, bias)
    except (AttributeError, RuntimeError, TypeError):  # another version of PyTorch
        return False
    return torch.allclose(y, F.linear(x, weight, bias))


@compiled()
def step_linear(x_at, w_at, bias_at, y_at, rows, inputs, outputs):
    """y = x w^T + bias, contiguous.  The address 0 means no bias."""
    write_product(x_at, inputs, w_at, bias_at, y_at, outputs, rows, inputs, 0, outputs)
