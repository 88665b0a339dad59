"""LEM over all of time: one kernel where a program can keep a head's weights, else two a step."""

from seqlm.ops._triton.dense_lem import dense_lem_backward, dense_lem_forward
from seqlm.ops._triton.heads import WIDEST, heads_backward, heads_forward


def lem_forward(drive, y, z, from_y, from_z, h, kept, dt) -> None:
    """y, z: (B, D), the first state when it begins, the last when it ends.  kept: as
    `heads.head_forward` writes it."""
    forward = heads_forward if from_y.shape[2] <= WIDEST else dense_lem_forward
    forward(drive, y, z, from_y, from_z, h, kept, dt)


def lem_backward(dh, y0, z0, h, kept, from_y, from_z, d_drive, dy, dz, dt) -> None:
    """dy, dz: (B, D), of the last state when it begins, of the first when it ends."""
    backward = heads_backward if from_y.shape[2] <= WIDEST else dense_lem_backward
    backward(dh, y0, z0, h, kept, from_y, from_z, d_drive, dy, dz, dt)
