"""The Mogrifier LSTM's recurrence as a loop over time, with its gradient written by hand.

Keeps the gate of every round, i, f, g and o, and all c.  Time comes first, so that what the loop
reads and writes in a step has no gaps.
"""

# B batch, T time, D width, R rounds

import torch
from torch import Tensor

from seqlm.ops.states import Tensors


def forward(
    x: Tensor, h0: Tensor, c0: Tensor, rounds: Tensor, gates: Tensor, bias: Tensor
) -> tuple[Tensors, Tensors]:
    (batch, time, width), exact = x.shape, h0.dtype
    by_round, by_gate = rounds.to(exact).transpose(1, 2), gates.to(exact).t()
    steps, add = x.to(exact).transpose(0, 1), bias.to(exact)
    mixing = h0.new_empty(time, len(rounds), batch, width)
    kept = h0.new_empty(time, batch, 4 * width)
    hs, cs = (h0.new_empty(time, batch, width) for _ in range(2))
    both = h0.new_empty(batch, 2 * width)  # x and h, side by side
    sides, h, c = both.split(width, dim=-1), h0, c0
    with torch.autocast(x.device.type, enabled=False):
        for t in range(time):
            sides[0].copy_(steps[t])
            sides[1].copy_(h)
            for number, weight in enumerate(by_round, 1):
                gate = torch.mm(sides[number % 2], weight, out=mixing[t, number - 1])
                sides[1 - number % 2].mul_(gate.sigmoid_().mul_(2))
            torch.addmm(add, both, by_gate, out=kept[t])
            i_f, g, o = kept[t].split((2 * width, width, width), dim=-1)
            i, f = i_f.sigmoid_().chunk(2, dim=-1)
            c = torch.mul(f, c, out=cs[t]).addcmul_(i, g.tanh_())
            h = torch.mul(o.sigmoid_(), c.tanh(), out=hs[t])
    saved = x, h0, c0, rounds, gates, bias, mixing, kept, hs, cs
    return (hs.transpose(0, 1).to(x.dtype), h.clone(), c.clone()), saved


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    x, h0, c0, rounds, gates, bias, mixing, kept, hs, cs = saved
    d_out, dh, dc = gradients
    width, exact = h0.shape[1], h0.dtype
    by_round, by_gate = rounds.to(exact), gates.to(exact)
    old_h, old_c = (torch.cat([first.unsqueeze(0), s[:-1]]) for first, s in ((h0, hs), (c0, cs)))
    # the value that each round changes, and the one that its gate is computed from
    values, old, read = [x.to(exact).transpose(0, 1), old_h], [], []
    for number, gate in enumerate(mixing.unbind(1), 1):
        changed = 1 - number % 2
        old.append(values[changed])
        read.append(values[1 - changed])
        values[changed] = gate * values[changed]
    # a gate g = 2 sigmoid(k) has the slope g (1 - g / 2), a sigmoid s the slope s (1 - s)
    slopes = [v * g * (1 - g / 2) for v, g in zip(old, mixing.unbind(1), strict=True)]
    i, f, g, o = kept.chunk(4, dim=-1)
    new_c = cs.tanh()
    slope_i, slope_f, slope_g = g * i * (1 - i), old_c * f * (1 - f), i * (1 - g**2)
    slope_o, slope_c = new_c * o * (1 - o), o * (1 - new_c**2)
    d_kept, d_x = torch.empty_like(kept), torch.empty_like(hs)
    d_rounds = torch.empty_like(mixing)
    dh, dc = dh.clone(), dc.clone()
    for t in range(len(hs) - 1, -1, -1):
        dh += d_out[:, t]
        dc.addcmul_(dh, slope_c[t])
        d_i, d_f, d_g, d_o = d_kept[t].chunk(4, dim=-1)
        for d, slope in ((d_i, slope_i), (d_f, slope_f), (d_g, slope_g)):
            torch.mul(dc, slope[t], out=d)
        torch.mul(dh, slope_o[t], out=d_o)
        dc *= f[t]
        sides = torch.mm(d_kept[t], by_gate).split(width, dim=-1)
        for number in range(len(rounds), 0, -1):
            d, changed = d_rounds[t, number - 1], sides[1 - number % 2]
            torch.mul(changed, slopes[number - 1][t], out=d)
            changed.mul_(mixing[t, number - 1])
            sides[number % 2].addmm_(d, by_round[number - 1])
        d_x[t], dh = sides
    weights = [
        d.flatten(0, 1).t() @ v.flatten(0, 1) for d, v in zip(d_rounds.unbind(1), read, strict=True)
    ]
    by_step = d_kept.flatten(0, 1)
    return (
        d_x.transpose(0, 1).to(x.dtype),
        dh.contiguous(),
        dc,
        torch.stack(weights).to(rounds.dtype) if weights else torch.zeros_like(rounds),
        (by_step.t() @ torch.cat(values, dim=-1).flatten(0, 1)).to(gates.dtype),
        by_step.sum(0).to(bias.dtype),
    )
