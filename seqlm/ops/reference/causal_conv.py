"""The causal convolution by PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[tuple[Tensor], tuple[()]]:
    return (F.conv1d(x.mT, weight, bias, groups=len(weight)).mT,), ()
