"""The ops as kernels for CUDA devices, compiled by Triton on first use and kept on disk.

Numbers are float32, bfloat16 or float16 in memory; states and sums are float32.  Kernels read and
write (B, T, C) as the model has it.

Under Triton's interpreter (TRITON_INTERPRET=1, set before this is imported) the same kernels run on
the CPU, slowly, for tests.
"""

from seqlm.ops._triton.block import block_scan, block_scan_gradients
from seqlm.ops._triton.conv import LONGEST_KERNEL, convolved, convolved_gradients
from seqlm.ops._triton.dense_cfc import dense_cfc_backward, dense_cfc_forward
from seqlm.ops._triton.diagonal import (
    diagonal_cfc_backward,
    diagonal_cfc_forward,
    diagonal_lem_backward,
    diagonal_lem_forward,
)
from seqlm.ops._triton.lanes import run
from seqlm.ops._triton.lem import lem_backward, lem_forward
from seqlm.ops._triton.norm import WIDEST_ROW, normed, normed_gradients
from seqlm.ops._triton.scans import scan, scan_gradients

__all__ = [
    "LONGEST_KERNEL",
    "WIDEST_ROW",
    "block_scan",
    "block_scan_gradients",
    "convolved",
    "convolved_gradients",
    "dense_cfc_backward",
    "dense_cfc_forward",
    "diagonal_cfc_backward",
    "diagonal_cfc_forward",
    "diagonal_lem_backward",
    "diagonal_lem_forward",
    "lem_backward",
    "lem_forward",
    "normed",
    "normed_gradients",
    "run",
    "scan",
    "scan_gradients",
]
