"""One step of the gated scan, for one character."""

# B batch, H state width

import torch
from torch import Tensor

from seqlm.ops.cpu.compile import compiled
from seqlm.ops.cpu.gated_scan import advance
from seqlm.ops.cpu.numbers import load
from seqlm.ops.cpu.steps import for_one_character, rows_at
from seqlm.ops.states import Tensors


def serves(drive: Tensor, h: Tensor, candidate: str) -> bool:
    rows, width = h.shape
    fits = drive.shape in ((rows, 2 * width), (rows, 3 * width))
    return fits and for_one_character(drive, h)


def forward(drive: Tensor, h: Tensor, candidate: str) -> tuple[Tensors, Tensors]:
    drive, h = drive.contiguous(), h.contiguous()
    new, (rows, width) = torch.empty_like(h), h.shape
    at = drive.data_ptr(), h.data_ptr(), new.data_ptr()
    step_gated(*at, rows, drive.shape[1] // width, width, candidate == "positive")
    return (new,), ()


@compiled()
def step_gated(drive_at, h_at, new_at, rows, parts, width, positive):
    drive, h = rows_at(drive_at, rows, parts * width), rows_at(h_at, rows, width)
    new = rows_at(new_at, rows, width)
    for r in range(rows):
        load(new[r], h[r])
        advance(new[r], drive[r], width, 0, positive)
