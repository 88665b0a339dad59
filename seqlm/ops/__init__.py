"""What runs fast: one file an op, one file a backend."""

import torch

from seqlm.ops.backend import BACKENDS, pick, using
from seqlm.ops.gated_scan import gated_scan, gated_step
from seqlm.ops.linear_scan import linear_scan


def warm_up(dtype: str) -> None:
    """Compile what training in the dtype runs on the CPU, before a clock runs: some seconds on a
    machine's first time, and then kept on disk."""
    for one in dict.fromkeys((dtype, "float32")):  # evaluation is in float32
        drive = torch.zeros(1, 1, 2, dtype=getattr(torch, one), requires_grad=True)
        h, _ = gated_scan(drive, torch.zeros(1, 1))
        h.sum().backward()


__all__ = ["warm_up", "BACKENDS", "gated_scan", "gated_step", "linear_scan", "pick", "using"]
