"""The linear scan: one forward and one backward kernel.  Keeps the gates, and h in b's dtype."""

from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.scans import scan, scan_gradients


def forward(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensors, Tensors]:
    a, b, h0 = a.contiguous(), b.contiguous(), h0.contiguous()
    h, last = scan(a, b, h0)
    return (h, last), (a, h, h0)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    a, h, h0 = saved
    dh, d_last = (d.contiguous() for d in gradients)
    return scan_gradients(a, h, h0, h, dh, d_last)  # in b's place: it has its dtype
