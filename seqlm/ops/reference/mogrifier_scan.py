"""The Mogrifier LSTM's recurrence, step by step."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from seqlm.ops.reference.fold import fold
from seqlm.ops.states import Tensors


def forward(
    x: Tensor, h0: Tensor, c0: Tensor, rounds: Tensor, gates: Tensor, bias: Tensor
) -> tuple[Tensors, Tensors]:
    exact = h0.dtype

    def product(vector: Tensor, weight: Tensor) -> Tensor:
        return linear(vector.to(x.dtype), weight.to(x.dtype)).to(exact)

    def step(x: Tensor, state: Tensor) -> Tensor:
        x, (h, c) = x.to(exact), state.unbind(1)
        for number, weight in enumerate(rounds, 1):
            if number % 2:
                x = 2 * torch.sigmoid(product(h, weight)) * x
            else:
                h = 2 * torch.sigmoid(product(x, weight)) * h
        logits = product(torch.cat([x, h], dim=-1), gates) + bias.to(exact)
        i, f, g, o = logits.chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.stack([torch.sigmoid(o) * torch.tanh(c), c], dim=1)

    with torch.autocast(x.device.type, enabled=False):
        states = fold(step, (x,), torch.stack([h0, c0], dim=1))  # (B, T, 2, D)
    h, c = states[:, -1].unbind(1)
    return (states[:, :, 0].to(x.dtype), h.clone(), c.clone()), ()
