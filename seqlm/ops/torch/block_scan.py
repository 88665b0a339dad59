"""The scan of 2 x 2 blocks: the code of the linear scan serves both."""

from seqlm.ops.torch.linear_scan import backward, forward

__all__ = ["backward", "forward"]
