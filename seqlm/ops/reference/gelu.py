"""GELU by PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from seqlm.ops.states import Tensors


def forward(x: Tensor) -> tuple[Tensors, Tensors]:
    return (F.gelu(x),), ()
