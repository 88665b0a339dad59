"""A linear layer by PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[tuple[Tensor], tuple[()]]:
    return (F.linear(x, weight, bias),), ()
