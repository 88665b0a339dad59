"""RMSNorm by PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor) -> tuple[tuple[Tensor], tuple[()]]:
    return (F.rms_norm(x, weight.shape, weight),), ()
