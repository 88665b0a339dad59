"""CfC's recurrence with a backbone of one layer, step by step."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from seqlm.ops.cfc_scan import ACTIVATIONS
from seqlm.ops.reference.fold import fold
from seqlm.ops.states import Tensors


def new_state(f_1: Tensor, f_2: Tensor, k: Tensor, gated: bool) -> Tensor:
    """tanh(f_1) (1 - s) + s tanh(f_2) with s = sigmoid(k); not `gated`: tanh(f_1) + s tanh(f_2)."""
    s = torch.sigmoid(k)
    first = torch.tanh(f_1) * (1 - s) if gated else torch.tanh(f_1)
    return first + s * torch.tanh(f_2)


def forward(
    drive: Tensor, h0: Tensor, from_h: Tensor, heads: Tensor, bias: Tensor,
    activation: str, gated: bool,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    from_h, heads, bias = (w.to(drive.dtype) for w in (from_h, heads, bias))

    def step(drive: Tensor, h: Tensor) -> Tensor:
        p = ACTIVATIONS[activation](drive + linear(h.to(drive.dtype), from_h))
        f_1, f_2, k = linear(p, heads, bias).to(h.dtype).chunk(3, dim=-1)
        return new_state(f_1, f_2, k, gated)

    with torch.autocast(drive.device.type, enabled=False):
        h = fold(step, (drive,), h0)
    return (h.to(drive.dtype), h[:, -1].clone()), ()
