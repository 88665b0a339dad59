"""The identity on a recurrence's states, whose gradient goes back through all earlier steps.

The states may come from any solver: where h_t = f(h_{t-1}) holds, the gradient of the solution is a
scan over the slopes of f, from the last step to the first.
"""

# B batch, T time, S numbers of a unit's state, H units

import torch
from torch import Tensor

from seqlm.ops.block_scan import block_scan
from seqlm.ops.linear_scan import linear_scan
from seqlm.ops.states import Tensors
from seqlm.ops.torch.scans import reversed_gates
from seqlm.runtime import using_backend


def forward(h: Tensor, slopes: Tensor, backend: str) -> tuple[Tensors, Tensors]:
    """h: (B, T, S, H).  slopes: (B, T, S, S, H), d(new state)/d(old state).  backend: computes the
    scan of the gradient."""
    return (h.clone(),), (slopes,)


def backward(saved: Tensors, gradients: Tensors, backend: str) -> tuple[Tensor, None]:
    (slopes,), (dh,) = saved, gradients
    # autograd may run this in a thread of its own, which has no current backend
    with using_backend(backend):
        total = scan_from_zero(*reversed_gates(*blocks(slopes, dh)))
    return total.flip(1).view_as(dh), None


def blocks(slopes: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The shapes that scans take: without the dimensions S where a state is one number."""
    return (slopes, h) if h.shape[2] == 2 else (slopes[:, :, 0, 0], h[:, :, 0])


def scan_from_zero(a: Tensor, b: Tensor) -> Tensor:
    scan = linear_scan if a.ndim == b.ndim else block_scan
    return scan(a, b, torch.zeros_like(b[:, 0]))[0]
