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
    """Run a kernel once for every place of the grid.

    warps: of a program; lanes are independent of each other, so a program of lanes is one warp.
    stages: how many blocks of a product are loaded ahead of the one that is computed.

    Triton compiles a kernel anew for whole numbers that are 1 or divisible by 16, except for those
    that the kernel lists under `do_not_specialize`: lengths of time, which change between batches.
    """
    # a product and a sum in one instruction round once: said here because triton 3.9 warns else
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **options)
