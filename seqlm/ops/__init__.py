"""What runs fast: one file an op, one file a backend."""

import torch

from seqlm.ops.backend import BACKENDS, pick, using
from seqlm.ops.gated_scan import gated_scan, gated_step
from seqlm.ops.lem_scan import lem_scan
from seqlm.ops.linear_scan import linear_scan
from seqlm.ops.rms_norm import FEW, rms_norm


def warm_up(dtype: str) -> None:
    """Compile what training in the dtype runs on the CPU, before a clock runs: some seconds on a
    machine's first time, and then kept on disk."""
    for one in dict.fromkeys((dtype, "float32")):  # evaluation is in float32
        drive = torch.zeros(1, 1, 2, dtype=getattr(torch, one), requires_grad=True)
        h, _ = gated_scan(drive, torch.zeros(1, 1))
        h.sum().backward()
        state, weights = torch.zeros(1, 1), (torch.zeros(3, 1), torch.zeros(1, 1))
        lem_scan(drive.new_zeros(1, 1, 4).requires_grad_(), state, state, *weights, 1.0)[
            0
        ].sum().backward()
        weight = torch.ones(1, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=one == "bfloat16"):
            rms_norm(weight.expand(FEW + 1, 1), weight).sum().backward()


__all__ = ["BACKENDS", "gated_scan", "gated_step", "lem_scan", "linear_scan", "pick", "rms_norm"]
__all__ += ["using", "warm_up"]
