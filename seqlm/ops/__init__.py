"""The operations that must be fast: `<op>.py` defines an op, `<backend>/<op>.py` computes it.

dispatch.py chooses the backend.  To remove a backend, see docs/contributing.md.
"""

from seqlm.ops.block_scan import block_scan
from seqlm.ops.causal_conv import causal_conv
from seqlm.ops.cfc_scan import cfc_scan
from seqlm.ops.delta_scan import delta_scan
from seqlm.ops.diagonal_cfc_scan import diagonal_cfc_scan
from seqlm.ops.diagonal_lem_scan import diagonal_lem_scan
from seqlm.ops.diagonal_scan import NewtonCounts, count_newton, diagonal_scan
from seqlm.ops.dispatch import fused, in_one_call, try_kernels
from seqlm.ops.gated_scan import gated_scan, gated_step
from seqlm.ops.gelu import gelu
from seqlm.ops.lem_scan import lem_scan
from seqlm.ops.linear import Linear, linear
from seqlm.ops.linear_scan import linear_scan
from seqlm.ops.loop_over_time import loop_over_time
from seqlm.ops.matrix_scan import matrix_scan
from seqlm.ops.mogrifier_scan import mogrifier_scan
from seqlm.ops.rms_norm import rms_norm

__all__ = [
    "Linear",
    "NewtonCounts",
    "block_scan",
    "causal_conv",
    "cfc_scan",
    "count_newton",
    "delta_scan",
    "diagonal_cfc_scan",
    "diagonal_lem_scan",
    "diagonal_scan",
    "fused",
    "gated_scan",
    "gated_step",
    "gelu",
    "in_one_call",
    "lem_scan",
    "linear",
    "linear_scan",
    "loop_over_time",
    "matrix_scan",
    "mogrifier_scan",
    "rms_norm",
    "try_kernels",
]
