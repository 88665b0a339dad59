"""How a kernel is called."""

from typing import Any

import torch


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int = 1,
    stages: int = 3,
    **constants: Any,
) -> None:
    """A program of lanes is one warp: they have nothing to say to each other.  stages: of a loop of
    products, one of which is computed while the others are on their way.

    Kernels are compiled anew for numbers that are 1 or divide by 16, unless they say not to: those
    of time, which change from batch to batch.
    """
    # fused products and sums, which are the more exact ones: triton 3.9 warns if it is not told
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **options)
