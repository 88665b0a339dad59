"""The base class of the cells that wrap PyTorch's nn.GRU and nn.LSTM."""

# B batch, T time, D width, G gates

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seqlm.cells._contract import Recurrence, State
from seqlm.ops import Linear


class TorchRNN(Recurrence):
    """A recurrent layer of PyTorch with D units.

    PyTorch's own code computes a whole sequence, in the state's dtype; `recur` computes a single
    step.
    Parameters are the same as PyTorch's, with two biases per gate, and start from
    U(-1/sqrt(D), 1/sqrt(D)) as there.
    """

    group = "gated"
    gates: int  # number of gates, the candidate included

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.inputs = Linear(width, self.gates * width, parts=self.gates)
        self.from_h = Linear(width, self.gates * width, parts=self.gates)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def project(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(len(x)) if state is None else state
        # torch.gru and torch.lstm compute everything in one dtype, so it is the state's: under
        # autocast, a state in bfloat16 would lose what a step adds to it
        dtype = state[0].dtype
        layers = self.inputs, self.from_h
        weights = [layer.weight.to(dtype) for layer in layers]
        weights += [layer.bias.to(dtype) for layer in layers]
        if x.is_cuda:
            weights = _side_by_side(weights)
        with torch.autocast(x.device.type, enabled=False):
            h, end = self._sequence(x.to(dtype), [s.unsqueeze(0) for s in state], weights)
        return h.to(x.dtype), tuple(s.squeeze(0).clone() for s in end)

    def _sequence(
        self, x: Tensor, state: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """(B, T, D) and the last state, (1, B, D) each."""
        raise NotImplementedError


def _side_by_side(weights: list[Tensor]) -> list[Tensor]:
    """The weights in one block of memory; otherwise cuDNN copies them, with a warning."""
    flat = torch.cat([weight.flatten() for weight in weights])
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
