"""CfC, the closed-form continuous-time cell, as published: a backbone over [x, h] and its heads.

    p = backbone([x_t, h_{t-1}]),  s = sigmoid(t_a(p) tau + t_b(p))
    default   h_t = tanh(f_1(p)) (1 - s) + s tanh(f_2(p))
    no_gate   h_t = tanh(f_1(p)) + s tanh(f_2(p))
    pure      h_t = A - A exp(-tau (|w| + |f_1(p)|)) f_1(p)

mixed_memory puts an LSTM in front, whose output takes the place of h_{t-1}.
Source: Hasani et al., Closed-form continuous-time neural networks, Nature Machine Intelligence 4,
2022, and the authors' code for the three modes, the activation and the constants.
"""

# B batch, T time, D model width, which is the state's too, U backbone units

from math import sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import Recurrence, State
from seqlm.errors import UsageError
from seqlm.ops import Linear


def lecun_tanh(x: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(0.666 * x)


ACTIVATIONS = {
    "lecun_tanh": lecun_tanh,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


class CfC(Recurrence):
    """CfC with D units.

    mode: which of the three published forms.  backbone_units, _layers, _activation: the network
    in front of the heads.  mixed_memory: an LSTM carries the long memory; the state is (h, c).
    timespan: tau, the time between two characters.  Matrices start from Xavier's uniform
    distribution, A from 1 and w from 0.01.
    """

    def __init__(
        self,
        width: int,
        *,
        mode: Literal["default", "no_gate", "pure"] = "default",
        backbone_units: int = 128,
        backbone_layers: int = 1,
        backbone_activation: Literal["lecun_tanh", "tanh", "relu", "silu", "gelu"] = "lecun_tanh",
        mixed_memory: bool = False,
        timespan: float = 1.0,
    ):
        super().__init__()
        limits = {
            "backbone_units": (backbone_units, 65536),
            "backbone_layers": (backbone_layers, 64),
        }
        for name, (value, most) in limits.items():
            if not 1 <= value <= most:
                raise UsageError(f"cell.{name} is {value}; it must be from 1 to {most}.")
        if not timespan > 0:
            raise UsageError(f"cell.timespan is {timespan}; it must be above 0.")
        self.width, self.units, self.timespan = width, backbone_units, timespan
        self.mode, self.backbone_activation = mode, backbone_activation
        self.activation = ACTIVATIONS[backbone_activation]

        # the backbone's first layer reads [x, h]: its part for x needs no state
        self.from_x = Linear(width, backbone_units)
        self.from_h = Linear(width, backbone_units, bias=False)
        self.backbone = nn.ModuleList(
            Linear(backbone_units, backbone_units) for _ in range(backbone_layers - 1)
        )
        heads = 1 if mode == "pure" else 4  # f_1; or f_1, f_2, t_a, t_b
        self.heads = Linear(backbone_units, heads * width)
        if mode == "pure":
            # published as 0, where |w| has no gradient: it would stay there for ever
            self.w = nn.Parameter(torch.full((width,), 0.01))
            self.A = nn.Parameter(torch.ones(width))
        self.lstm_x = Linear(width, 4 * width) if mixed_memory else None
        self.lstm_h = Linear(width, 4 * width, bias=False) if mixed_memory else None
        self._initialise()

    def _initialise(self) -> None:
        width, units = self.width, self.units
        xavier_uniform(self.from_x.weight, 2 * width, units)
        xavier_uniform(self.from_h.weight, 2 * width, units)
        # the published layer is one Linear over [x, h], whose bias starts by its fan-in, 2 D
        nn.init.uniform_(self.from_x.bias, -((2 * width) ** -0.5), (2 * width) ** -0.5)
        for layer in self.backbone:
            xavier_uniform(layer.weight, units, units)
        xavier_uniform(self.heads.weight, units, width)  # each head is a layer of its own
        if self.lstm_x is not None:
            xavier_uniform(self.lstm_x.weight, width, 4 * width)
            nn.init.uniform_(self.lstm_x.bias, -0.1, 0.1)
            nn.init.orthogonal_(self.lstm_h.weight)

    def initial_state(self, batch: int) -> State:
        parts = 1 if self.lstm_x is None else 2
        return tuple(self.zeros(batch, self.width) for _ in range(parts))

    def project(self, x: Tensor) -> Tensor:
        drive = self.from_x(x)
        return drive if self.lstm_x is None else torch.cat([drive, self.lstm_x(x)], dim=-1)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        h, *memory = state
        if memory:
            drive, lstm_drive = drive.split((self.units, 4 * self.width), dim=-1)
            h, c = self._lstm(lstm_drive, h, *memory)
            memory = [c]
        p = self.activation(drive + self.from_h(h.to(drive.dtype)))
        for layer in self.backbone:
            p = self.activation(layer(p))
        h = self._heads(self.heads(p).to(h.dtype))
        return h, (h, *memory)

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        usual = self.mode != "pure" and not len(self.backbone) and self.lstm_x is None
        if not usual or ops.backend.of(drive) != "cpu":
            return super().scan(drive, state)
        f_1, f_2, t_a, t_b = self.heads.weight.chunk(4)
        heads = torch.cat([f_1, f_2, t_a * self.timespan + t_b])
        f_1, f_2, t_a, t_b = self.heads.bias.chunk(4)
        bias = torch.cat([f_1, f_2, t_a * self.timespan + t_b])
        form = self.backbone_activation, self.mode == "default"
        h, last = ops.cfc_scan(drive, *state, self.from_h.weight, heads, bias, *form)
        return h, (last,)

    def _heads(self, f: Tensor) -> Tensor:
        if self.mode == "pure":
            a, w = self.A.to(f.dtype), self.w.to(f.dtype)
            return a - a * torch.exp(-self.timespan * (w.abs() + f.abs())) * f
        f_1, f_2, t_a, t_b = f.chunk(4, dim=-1)
        s = torch.sigmoid(t_a * self.timespan + t_b)
        first = torch.tanh(f_1) if self.mode == "no_gate" else torch.tanh(f_1) * (1 - s)
        return first + s * torch.tanh(f_2)

    def _lstm(self, drive: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = (drive + self.lstm_h(h.to(drive.dtype))).to(c.dtype)
        new, i, f, o = gates.chunk(4, dim=-1)
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(new)
        return torch.sigmoid(o) * torch.tanh(c), c


def xavier_uniform(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Xavier's uniform distribution for a block of a larger published matrix."""
    bound = sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)
