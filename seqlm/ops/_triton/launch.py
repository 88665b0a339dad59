"""How a kernel is called."""

from typing import Any

import torch


@torch.compiler.disable
def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 1, **constants: Any
) -> None:
    """A program of lanes is one warp: they have nothing to say to each other.

    torch.compile does not look inside, and calls it as it is.
    """
    # fused products and sums, which are the more exact ones: triton 3.9 warns if it is not told
    options = dict(num_warps=warps, enable_fp_fusion=True)
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **options)
