"""Linear layers in float32 on the CPU: few rows, a step's, by a compiled loop that reads weights
about as fast as memory gives them; many by oneDNN, where torch takes MKL, which on processors of
other makers than its own may be half as fast."""

# R rows, I inputs, O outputs

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqlm.ops import backend

FEW, MANY = 8, 64  # rows
ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; x: (..., I), weight: (O, I), bias: (O,) -> (..., O).

    In autocast's dtype where that is on.  Few rows are each as if alone.
    """
    outputs, inputs = weight.shape
    tensors = (x, weight) if bias is None else (x, weight, bias)
    plain = all(t.dtype == torch.float32 for t in tensors) and x.shape[-1:] == (inputs,)
    if not plain or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.numel() // inputs
    if rows <= FEW and backend.for_step(*tensors):
        y = x.new_empty(*x.shape[:-1], outputs)
        given = x.contiguous(), weight.contiguous(), bias if bias is None else bias.contiguous()
        loops = backend.loops()
        loops.step(loops.step_linear, (*given, y), rows, inputs, outputs)
        return y
    if rows >= MANY and ONEDNN and backend.of(*tensors) == "cpu":
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        d, dx, dw, db = dy.reshape(len(rows), -1).contiguous(), None, None, None
        if ctx.needs_input_grad[0]:
            dx = _product(d, weight.t().contiguous()).view(*dy.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            dw = d.t() @ rows
        if ctx.needs_input_grad[2]:
            db = d.sum(0)
        return dx, dw, db


class Linear(nn.Linear):
    """nn.Linear, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
