"""The linear scan and the block scan in chunks of time.  Keeps the gates and the exact h."""

# B batch, T time, H state width

from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.torch import scans
from seqlm.ops.torch.scans import Scan, input_gradients, scan_backward


def forward(a: Tensor, b: Tensor, h0: Tensor, scan: Scan = scans.scan) -> tuple[Tensors, Tensors]:
    """scan: solves the recurrence in h0's dtype."""
    h = scan(a.to(h0.dtype), b.to(h0.dtype), h0)
    return (h.to(b.dtype), h[:, -1].clone()), (a, h, h0)


def backward(saved: Tensors, gradients: Tensors, scan: Scan = scans.scan) -> Tensors:
    a, h, h0 = saved
    dh, d_last = gradients
    total, exact = dh.to(h0.dtype, copy=True), a.to(h0.dtype)
    total[:, -1] += d_last
    total = scan_backward(exact, total, scan)
    da, dh0 = input_gradients(exact, h, h0, total)
    return da.to(a.dtype), total.to(dh.dtype), dh0
