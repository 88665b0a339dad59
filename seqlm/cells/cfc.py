"""CfC, the closed-form continuous-time cell: heads on a network (backbone) that reads [x, h].

    p = backbone([x_t, h_{t-1}]),  s = sigmoid(t_a(p) tau + t_b(p))
    default   h_t = tanh(f_1(p)) (1 - s) + s tanh(f_2(p))
    no_gate   h_t = tanh(f_1(p)) + s tanh(f_2(p))
    pure      h_t = A - A exp(-tau (|w| + |f_1(p)|)) f_1(p)

With mixed_memory, an LSTM step computes a new h from h_{t-1} first, and the backbone reads that.

A diagonal recurrence has no backbone, a unit depends only on its own state, and the layer trains
in parallel over time: f_1, f_2 and t are V x_t + w h_{t-1} + b, and s = sigmoid(t tau).  One t
replaces t_a tau + t_b, because tau is constant.  Such a unit forgets within a few characters.
The leaky form, which is not published, can keep its state: h_t = h_{t-1} + l (c_t - h_{t-1}), where
c_t is the diagonal form's h_t and l = sigmoid(V_l x_t + b_l).

Source: Hasani et al., Closed-form continuous-time neural networks, Nature Machine Intelligence 4,
2022, and the authors' code for the three modes, the activation and the constants.
"""

# B batch, T time, D model width, which is the state's too, U backbone units

from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from seqlm import ops
from seqlm.cells._contract import Recurrence, State
from seqlm.cells._recurrent import Diagonal, check
from seqlm.errors import UsageError
from seqlm.ops import Linear
from seqlm.ops.cfc_scan import ACTIVATIONS

BOUND = 0.5


class CfC(Recurrence):
    """CfC with D units.

    Matrices start from Xavier's uniform distribution, A from 1 and w from 0.01.

    mode: one of the three published forms.
    backbone_units: width of the backbone of a dense recurrence.
    backbone_layers: number of its layers.
    backbone_activation: its activation function.
    mixed_memory: an LSTM carries the long memory, and the state is (h, c).
    timespan: tau, the time between two characters.
    recurrence: "dense" as published, or "diagonal" or "leaky".
    bound: largest recurrent weight of a diagonal or leaky recurrence.
    solver: how these two are solved over time.
    """

    over_time = "step by step, or diagonal: parallel"
    group = "four"
    from_h: Linear | Diagonal  # what h_{t-1} adds to the first layer

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
        recurrence: Literal["dense", "diagonal", "leaky"] = "dense",
        bound: float = BOUND,
        solver: Literal["auto", "sequential", "newton"] = "auto",
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
        check(recurrence, bound, BOUND, solver)
        self.width, self.mode, self.timespan = width, mode, timespan
        self.recurrence, self.solver = recurrence, solver
        if mode == "pure":
            # published as 0, but |w| has no gradient at 0: w would stay 0 forever
            self.w = nn.Parameter(torch.full((width,), 0.01))
            self.A = nn.Parameter(torch.ones(width))
        if recurrence == "dense":
            self._make_dense(backbone_units, backbone_layers, backbone_activation, mixed_memory)
            return
        # not backbone_units, which a preset may set
        dense = {
            "mixed_memory": mixed_memory,
            "backbone_layers": backbone_layers != 1,
            "backbone_activation": backbone_activation != "lecun_tanh",
        }
        for name in (name for name, given in dense.items() if given):
            raise UsageError(
                f"cell.{name} needs a dense recurrence, but cell.recurrence is {recurrence}. "
                "Remove one of them."
            )
        self._make_diagonal(bound)

    def _make_diagonal(self, bound: float) -> None:
        parts = 1 if self.mode == "pure" else 3  # f_1; or f_1, f_2, t
        self.from_h = Diagonal(self.width, parts, bound)
        inputs = parts + (self.recurrence == "leaky")
        self.inputs = Linear(self.width, inputs * self.width, parts=inputs)
        xavier_uniform(self.inputs.weight, self.width, self.width)

    def _make_dense(self, units: int, layers: int, activation: str, mixed_memory: bool) -> None:
        self.units, self.backbone_activation = units, activation
        self.activation, width = ACTIVATIONS[activation], self.width

        # the backbone's first layer reads [x, h]: its part for x needs no state
        self.from_x = Linear(width, units)
        self.from_h = Linear(width, units, bias=False)
        further_layers = [Linear(units, units) for _ in range(layers - 1)]
        self.backbone = nn.ModuleList(further_layers)
        heads = 1 if self.mode == "pure" else 4  # f_1; or f_1, f_2, t_a, t_b
        self.heads = Linear(units, heads * width, parts=heads)
        self.lstm_x = Linear(width, 4 * width, parts=4) if mixed_memory else None
        self.lstm_h = Linear(width, 4 * width, bias=False, parts=4) if mixed_memory else None

        xavier_uniform(self.from_x.weight, 2 * width, units)
        xavier_uniform(self.from_h.weight, 2 * width, units)
        # the published layer is one Linear over [x, h]: fan-in 2 D bounds its initial bias
        nn.init.uniform_(self.from_x.bias, -((2 * width) ** -0.5), (2 * width) ** -0.5)
        for layer in further_layers:
            xavier_uniform(layer.weight, units, units)
        xavier_uniform(self.heads.weight, units, width)  # each head is a layer of its own
        if self.lstm_x is not None and self.lstm_h is not None:
            xavier_uniform(self.lstm_x.weight, width, 4 * width)
            nn.init.uniform_(self.lstm_x.bias, -0.1, 0.1)
            nn.init.orthogonal_(self.lstm_h.weight)

    def initial_state(self, batch: int) -> State:
        parts = 2 if self._has_lstm else 1
        return tuple(self.zeros(batch, self.width) for _ in range(parts))

    @property
    def _has_lstm(self) -> bool:
        return self.recurrence == "dense" and self.lstm_x is not None

    def project(self, x: Tensor) -> Tensor:
        if self.recurrence != "dense":
            return self.inputs(x)
        drive = self.from_x(x)
        return drive if self.lstm_x is None else torch.cat([drive, self.lstm_x(x)], dim=-1)

    def recur(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        if self.recurrence != "dense":
            h = self._recur_diagonal(drive, *state)
            return h, (h,)
        h, *memory = state
        if self.lstm_h is not None:
            drive, lstm_drive = drive.split((self.units, 4 * self.width), dim=-1)
            h, c = lstm_step(lstm_drive + self.lstm_h(h.to(drive.dtype)), *memory)
            memory = [c]
        p = self.activation(drive + self.from_h(h.to(drive.dtype)))
        for layer in self.backbone:
            p = self.activation(layer(p))
        h = self._heads(self.heads(p).to(h.dtype))
        return h, (h, *memory)

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        if self.recurrence != "dense":
            return self._scan_diagonal(drive, state)
        if self.mode == "pure" or len(self.backbone) or self._has_lstm:
            return super().scan(drive, state)
        (h0,) = state
        # t_a tau + t_b is linear in p, so one head can replace the two
        f_1, f_2, t_a, t_b = self.heads.weight.chunk(4)
        heads = torch.cat([f_1, f_2, t_a * self.timespan + t_b])
        f_1, f_2, t_a, t_b = self.heads.bias.chunk(4)
        bias = torch.cat([f_1, f_2, t_a * self.timespan + t_b])
        h, last = ops.cfc_scan(
            drive,
            h0,
            self.from_h.weight,
            heads,
            bias,
            self.backbone_activation,
            gated=self.mode == "default",
        )
        return h, (last,)

    def _scan_diagonal(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        (h0,) = state
        in_one_pass = self.mode != "pure" and self.solver != "newton"
        if in_one_pass and ops.fused("diagonal_cfc_scan", drive, *state):
            gated = self.mode == "default"
            h, last = ops.diagonal_cfc_scan(drive, h0, self.from_h.weight, gated, self.timespan)
            return h, (last,)
        bound = {"default": 1.0, "no_gate": 2.0, "pure": torch.inf}[self.mode]
        return ops.diagonal_scan(self.recur, drive, state, self.solver, bound)

    def _recur_diagonal(self, drive: Tensor, h: Tensor) -> Tensor:
        from_h = self.from_h(h.to(drive.dtype))
        heads, leak = drive.split((from_h.shape[-1], drive.shape[-1] - from_h.shape[-1]), dim=-1)
        new = self._heads((heads + from_h).to(h.dtype))
        return torch.lerp(h, new, torch.sigmoid(leak.to(h.dtype))) if leak.shape[-1] else new

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        """Only the leaky form and the LSTM keep a share; s mixes two values that are both new."""
        drive, (h, *memory) = self.project(x), state
        if self.recurrence == "leaky":
            return {"h": torch.sigmoid(-drive[..., -self.width :].to(h.dtype))}
        if self.recurrence == "dense" and self.lstm_h is not None:
            gates = drive[..., self.units :] + self.lstm_h(h.to(drive.dtype))
            return {"c": lstm_gates(gates, *memory)[2]}
        return {}

    def _heads(self, f: Tensor) -> Tensor:
        if self.mode == "pure":
            a, w = self.A.to(f.dtype), self.w.to(f.dtype)
            return a - a * torch.exp(-self.timespan * (w.abs() + f.abs())) * f
        f_1, f_2, t_a, *t_b = f.split(self.width, dim=-1)
        s = torch.sigmoid(sum(t_b, t_a * self.timespan))
        first = torch.tanh(f_1) if self.mode == "no_gate" else torch.tanh(f_1) * (1 - s)
        return first + s * torch.tanh(f_2)


def lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """gates: (B, 4 D), c: (B, D) -> the new h and c of the authors' LSTM."""
    new, i, f, o = lstm_gates(gates, c)
    c = f * c + i * torch.tanh(new)
    return o * torch.tanh(c), c


def lstm_gates(gates: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """The argument of the new value's tanh, and the gates i, f and o."""
    new, i, f, o = gates.to(c.dtype).chunk(4, dim=-1)
    return new, torch.sigmoid(i), torch.sigmoid(f + 1), torch.sigmoid(o)


def xavier_uniform(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Xavier's uniform distribution for a block of a larger published matrix."""
    bound = sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)
