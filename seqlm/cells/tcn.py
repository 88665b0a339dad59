"""tcn: a temporal convolutional network, whose state is a window of characters.

    x <- relu(x + relu(conv(relu(conv(x)))))      at each level, with a dilation of 1, 2, 4, ...
    conv(x)_t = b + sum over k < kernel of W_k x_{t - k dilation}

The network sees 2 (kernel - 1) (2^levels - 1) characters before the last one and nothing earlier.
Weight normalisation and dropout are left out: the block around the cell has a norm and dropout.

Source: Bai et al., An Empirical Evaluation of Generic Convolutional and Recurrent Networks for
Sequence Modeling, arXiv 1803.01271, section 3.
"""

# B batch, T time, D model width

import torch
from torch import Tensor, nn

from seqlm.cells._contract import Cell, State
from seqlm.errors import UsageError
from seqlm.ops import Linear


class Dilated(nn.Module):
    """A causal convolution over `kernel` characters with a dilation, between all channels."""

    def __init__(self, width: int, kernel: int, dilation: int):
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.taps = Linear(kernel * width, width)  # from the oldest tap to the newest

    def forward(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, T, D), window: (B, (kernel - 1) dilation, D) -> (B, T, D) and the next window."""
        time = x.shape[1]
        x = torch.cat([window.to(x.dtype), x], dim=1)
        taps = [x[:, k * self.dilation :][:, :time] for k in range(self.kernel)]
        return self.taps(torch.cat(taps, dim=-1)), x[:, time:].to(window.dtype, copy=True)


class TCN(Cell):
    """A TCN of D channels, and a projection.

    Convolutions start as nn.Conv1d does: the paper's normal numbers of deviation 0.01 are for
    normalised weights.  The state is the windows of all convolutions, (B, (kernel - 1) dilation, D)
    each.

    levels: number of levels, of two convolutions each; 3 in the paper, for characters.
    kernel: number of characters that a convolution reads; 3 in the paper, for characters.
    """

    over_time = "parallel"
    group = "windows"

    def __init__(self, width: int, *, levels: int = 3, kernel: int = 3):
        super().__init__()
        if not 1 <= levels <= 10:
            raise UsageError(f"cell.levels is {levels}; it must be from 1 to 10.")
        if not 2 <= kernel <= 16:
            raise UsageError(f"cell.kernel is {kernel}; it must be from 2 to 16.")
        self.width = width
        self.pasts = [(kernel - 1) * 2**level for level in range(levels) for _ in range(2)]
        self.convs = nn.ModuleList(
            Dilated(width, kernel, 2**level) for level in range(levels) for _ in range(2)
        )
        self.outputs = Linear(width, width)

    def initial_state(self, batch: int) -> State:
        return tuple(
            self.zeros(batch, past * self.width).view(batch, past, self.width)
            for past in self.pasts
        )

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(len(x)) if state is None else state
        level, inner, windows = x, x, []
        for number, (conv, old) in enumerate(zip(self.convs, state, strict=True)):
            inner, window = conv(inner, old)
            inner = torch.relu(inner)
            windows.append(window)
            if number % 2:
                level = inner = torch.relu(level + inner)
        return self.outputs(level).to(x.dtype), tuple(windows)
