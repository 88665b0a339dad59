"""LEM over all of time: one kernel where a program can keep a head's weights, else two a step."""

from torch import Tensor

from seqlm.ops._triton.dense_lem import dense_lem_backward, dense_lem_forward
from seqlm.ops._triton.heads import WIDEST, heads_backward, heads_forward


def _fits(over_time: Tensor, from_y: Tensor) -> bool:
    return from_y.shape[2] * over_time.element_size() <= WIDEST


def lem_forward(drive, y, z, from_y, from_z, h, kept, dt) -> None:
    """y, z: (B, D), the first state when it begins, the last when it ends.  kept: as
    `heads.head_forward` writes it."""
    forward = heads_forward if _fits(drive, from_y) else dense_lem_forward
    forward(drive, y, z, from_y, from_z, h, kept, dt)


def lem_backward(dh, y0, z0, h, kept, from_y, from_z, d_drive, dy, dz, dt) -> None:
    """dy, dz: (B, D), of the last state when it begins, of the first when it ends."""
    backward = heads_backward if _fits(dh, from_y) else dense_lem_backward
    backward(dh, y0, z0, h, kept, from_y, from_z, d_drive, dy, dz, dt)
