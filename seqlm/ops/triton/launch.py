"""How a kernel is called."""

from typing import Any

import torch


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any,
    warps: int = 1, stages: int = 3, **constants: Any,
) -> None:  # fmt: skip
    """Run a kernel with one program for every place of the grid.

    warps: of a program.  Lanes are independent, so a program of lanes has one warp.
    stages: the blocks of a product that are in flight.

    Triton compiles a kernel again for integers that are 1 or divisible by 16, except for those that
    the kernel lists under `do_not_specialize`: lengths in time, which change between batches.
    """
    # fused multiply-add is Triton's default; triton 3.9 warns where it is not stated
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **options)
