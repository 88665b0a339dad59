"""Diagonal state space models with complex states, which s4d and h3 share."""

# B batch, T time, D channels, N complex states of a channel, L length of a chunk, C chunks

from math import log, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlm.cells._contract import Cell, State
from seqlm.errors import UsageError

CHUNK = 64  # characters whose outputs are one matrix product


def log_step_sizes(number: int) -> Tensor:
    """(N,) logarithms of random step sizes from 0.001 to 0.1: the start of dt in S4D and Mamba."""
    return torch.empty(number).uniform_(log(1e-3), log(1e-1))


def before_softplus(y: Tensor) -> Tensor:
    """The inverse of softplus."""
    return y + torch.log(-torch.expm1(-y))


class DiagonalSSM(Cell):
    """Each of D channels u has N complex states h of its own:

        h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A u_t,   y_t = 2 Re(sum of C h_t) + E u_t

    states: N, from 1 to 1024.  frequencies: Im(A) at the start, pi n ("lin") or
    (2 N / pi) (2 N / (2 n + 1) - 1) ("inv") for n = 0 .. N - 1; Re(A) starts from -1/2 and stays
    below 0.  dt, one for each channel, starts log-uniform in [0.001, 0.1], C and E from normal
    numbers; all of them are learned.
    The state is the real and the imaginary parts of h: (B, D N) each.
    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models,
    arXiv 2206.11893, sections 3 and 4; the start of dt, C and E: the authors' code.
    """

    def __init__(self, width: int, states: int, frequencies: str):
        super().__init__()
        if not 1 <= states <= 1024:
            raise UsageError(f"cell.states is {states}; it must be from 1 to 1024.")
        self.width, self.states = width, states
        n = torch.arange(states, dtype=torch.float32)
        inverse = 2 * states / pi * (2 * states / (2 * n + 1) - 1)
        frequency = pi * n if frequencies == "lin" else inverse
        # one number for each state, and therefore vectors: weight decay is for matrices
        self.log_rate = nn.Parameter(torch.full((width * states,), log(0.5)))  # log(-Re(A))
        self.frequency = nn.Parameter(frequency.repeat(width))  # Im(A)
        self.log_dt = nn.Parameter(log_step_sizes(width))
        self.C = nn.Parameter(torch.randn(width, 2 * states) * 0.5**0.5)  # real, imaginary parts
        self.skip = nn.Parameter(torch.randn(width))

    def initial_state(self, batch: int) -> State:
        real, imaginary = (self.zeros(batch, self.width * self.states) for _ in range(2))
        return real, imaginary

    def _exponent(self, exact: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-Re(A), Im(A), -Re(dt A), Im(dt A): (D, N) each."""
        shape = self.width, self.states
        rate, frequency = self.log_rate.to(exact).exp().view(shape), self.frequency.to(exact)
        dt = self.log_dt.to(exact).exp().unsqueeze(-1)
        frequency = frequency.view(shape)
        return rate, frequency, rate * dt, frequency * dt

    def _system(self, exact: torch.dtype) -> tuple[Tensor, ...]:
        """The real and imaginary parts of exp(dt A), (exp(dt A) - 1) / A and C: (D, N) each."""
        rate, frequency, damping, angle = self._exponent(exact)
        keep = torch.exp(-damping)
        a, a_i = keep * angle.cos(), keep * angle.sin()
        # a - 1, without the digits that 1 - 1 would lose where dt A is small
        less = torch.expm1(-damping) * angle.cos() - 2 * (angle / 2).sin() ** 2
        size = rate**2 + frequency**2
        b, b_i = (a_i * frequency - less * rate) / size, -(less * frequency + a_i * rate) / size
        return a, a_i, b, b_i, *self.C.to(exact).chunk(2, dim=-1)

    def kept(self, x: Tensor, state: State) -> dict[str, Tensor]:
        """|exp(dt A)|, which does not depend on the input."""
        keep = torch.exp(-self._exponent(state[0].dtype)[2])
        return {"h": keep.flatten().expand_as(state[0])}

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """u: (B, D) -> (B, D)"""
        h, h_i = (part.unflatten(-1, (self.width, self.states)) for part in state)
        a, a_i, b, b_i, c, c_i = self._system(h.dtype)
        u = u.to(h.dtype)
        new = u.unsqueeze(-1)
        h, h_i = a * h - a_i * h_i + b * new, a * h_i + a_i * h + b_i * new
        y = 2 * (c * h - c_i * h_i).sum(-1) + self.skip.to(h.dtype) * u
        return y, (h.flatten(-2), h_i.flatten(-2))

    def forward(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """u: (B, T, D) -> (B, T, D) in the state's dtype, by matrix products over chunks of time.

        A Fourier transform would do, too, but rounding would let the future into the past.
        """
        real, imaginary = self.initial_state(len(u)) if state is None else state
        time = u.shape[1]
        length = min(CHUNK, time)
        # autocast would round the products
        with torch.autocast(u.device.type, enabled=False):
            a, a_i, b, b_i, c, c_i = self._system(real.dtype)
            b, c = torch.complex(b, b_i), torch.complex(c, c_i)
            powers = _powers(torch.complex(a, a_i), length + 1)
            h = torch.complex(real, imaginary).unflatten(1, (self.width, -1)).transpose(0, 1)
            u = u.to(real.dtype).permute(2, 0, 1)  # (D, B, T)
            whole = time - time % length
            y, h = self._chunks(u[..., :whole], h, powers, b, c)
            if whole < time:
                rest, h = self._chunks(u[..., whole:], h, powers[: time - whole + 1], b, c)
                y = torch.cat([y, rest], dim=-1)
        h = h.transpose(0, 1).flatten(1)
        owned = torch.contiguous_format
        end = h.real.clone(memory_format=owned), h.imag.clone(memory_format=owned)
        return y.permute(1, 2, 0), end

    def _chunks(
        self, u: Tensor, h: Tensor, powers: Tensor, b: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """u: (D, B, C L), h: (D, B, N) complex -> y: (D, B, C L) and the last h.

        powers: exp(dt A) to the powers 0 .. L, (L + 1, D, N).  b, c: (D, N).
        """
        length = len(powers) - 1
        batch, chunks = u.shape[1], u.shape[2] // length
        u = u.reshape(self.width, -1, length)  # (D, B C, L)
        # what the inputs of a chunk add to its outputs: y_t = sum of kernel_{t - j} u_j
        kernel = 2 * (powers[:-1] * (b * c)).real.sum(-1).t()  # (D, L)
        kernel = kernel + F.pad(self.skip.to(kernel.dtype).unsqueeze(1), (0, length - 1))
        y = u @ shifted(kernel, length)[..., :length]
        # and to the state after it
        into = torch.view_as_real(powers[:-1].flip(0) * b).permute(1, 0, 2, 3).flatten(2)
        new = torch.view_as_complex((u @ into).unflatten(-1, (-1, 2)))  # (D, B C, N)
        starts = []
        for added in new.unflatten(1, (batch, chunks)).unbind(2):
            starts.append(h)
            h = powers[-1].unsqueeze(1) * h + added
        # the outputs that follow from the state before the chunk; Re(p q) = Re p Re q - Im p Im q
        out = torch.view_as_real((2 * powers[1:] * c).conj().resolve_conj())
        before = torch.view_as_real(torch.stack(starts, dim=2)).flatten(3).flatten(1, 2)
        y = y + before @ out.permute(1, 2, 3, 0).flatten(1, 2)
        return y.view(self.width, batch, -1), h


def _powers(a: Tensor, count: int) -> Tensor:
    """a to the powers 0 .. count - 1, (count, ...), each from products of log2(count) factors."""
    found = torch.ones_like(a).unsqueeze(0)
    while len(found) < count:
        found = torch.cat([found, found * a])
        a = a * a
    return found[:count]


def shifted(k: Tensor, rows: int) -> Tensor:
    """(..., K) -> (..., rows, K + rows - 1): row r holds k from place r on, and zeros elsewhere."""
    width = k.shape[-1] + rows - 1
    # rows of width + 1 that are read as rows of width: each begins one place later
    flat = F.pad(k, (0, rows)).unsqueeze(-2).expand(*k.shape[:-1], rows, width + 1).flatten(-2)
    return flat[..., : rows * width].unflatten(-1, (rows, width))
