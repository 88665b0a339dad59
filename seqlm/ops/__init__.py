"""What runs fast: one file an op, one file a backend."""

from seqlm.ops.backend import BACKENDS, current, pick, using
from seqlm.ops.gated_scan import gated_scan, gated_step
from seqlm.ops.linear_scan import linear_scan

__all__ = ["BACKENDS", "current", "gated_scan", "gated_step", "linear_scan", "pick", "using"]
