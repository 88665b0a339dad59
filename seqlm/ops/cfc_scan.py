"""CfC's recurrence over a whole sequence, with its gradient by hand, for the backends cpu and
triton alone."""

# B batch, T time, D width, U backbone units

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqlm.errors import ShapeError
from seqlm.ops import backend
from seqlm.ops.linear_scan import before

ACTIVATIONS = ("lecun_tanh", "tanh", "relu", "silu", "gelu")  # in the order of the loops' numbers


def cfc_scan(
    drive: Tensor, h0: Tensor, from_h: Tensor, heads: Tensor, bias: Tensor, act: str, gated: bool
) -> tuple[Tensor, Tensor]:
    """h_t for t = 1 .. T in the drive's dtype, and the last in float32.

        p = act(drive_t + from_h h_{t-1}),   [f_1, f_2, k] = heads p + bias,   s = sigmoid(k)
        h_t = tanh(f_1) (1 - s) + s tanh(f_2)      without `gated`, tanh(f_1) + s tanh(f_2)

    drive: (B, T, U).  h0: (B, D).  from_h: (U, D).  heads: (3 D, U), bias: (3 D,): those of the two
    time heads are one, as both are linear in p.  Raises ShapeError when they disagree.
    Source: Hasani et al., Closed-form continuous-time neural networks, 2022, equation 10.
    """
    shapes = [tuple(x.shape) for x in (drive, h0, from_h, heads, bias)]
    (batch, time, units), width = drive.shape, h0.shape[-1]
    weights = (units, width), (3 * width, units), (3 * width,)
    if time < 1 or shapes != [(batch, time, units), (batch, width), *weights]:
        raise ShapeError(
            "CfC's scan takes a drive (B, T, U) with T >= 1, a state (B, D), weights (U, D) and "
            f"(3 D, U), a bias (3 D,); it was given {', '.join(map(str, shapes))}."
        )
    return _CfCScan.apply(drive, h0, from_h, heads, bias, ACTIVATIONS.index(act), gated)


class _CfCScan(torch.autograd.Function):
    """Keeps what goes into every activation, and what comes out of the backbone's."""

    @staticmethod
    def forward(ctx, drive, h0, from_h, heads, bias, act, gated):
        ctx.backend = backend.of(drive, h0)
        (batch, time, units), width = drive.shape, h0.shape[1]
        h = drive.new_empty(batch, time, width)
        kept = drive.new_empty(batch, time, 2 * units + 3 * width)
        state = h0.float().clone(memory_format=torch.contiguous_format)
        weights = [from_h.float(), heads.float()]
        if ctx.backend == "cpu":
            weights = [w.t() for w in weights]
        weights = [w.contiguous() for w in (*weights, bias.float())]
        given = drive.contiguous(), state, *weights, h, kept, act, gated
        if ctx.backend == "triton":
            backend.kernels().dense_cfc_forward(*given)
        else:
            _cpu = backend.loops()
            _cpu.run_batch(_cpu.cfc_forward, batch, *given)
        ctx.save_for_backward(h0, from_h, heads, bias, h, kept)
        ctx.form = act, gated
        return h, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dlast):
        h0, from_h, heads, bias, h, kept = ctx.saved_tensors
        units, width = from_h.shape
        d_drive, d_heads = (h.new_empty(*h.shape[:2], size) for size in (units, 3 * width))
        dh0 = dlast.clone(memory_format=torch.contiguous_format)
        weights = (w.float().contiguous() for w in (from_h, heads))
        given = dh.contiguous(), kept, *weights, d_drive, d_heads, dh0, *ctx.form
        if ctx.backend == "triton":
            backend.kernels().dense_cfc_backward(*given)
        else:
            _cpu = backend.loops()
            _cpu.run_batch(_cpu.cfc_backward, len(h0), *given)
        of_p, of_f = d_drive.flatten(0, 1).t(), d_heads.flatten(0, 1)
        d_from_h = of_p @ before(h, h0.to(h.dtype)).flatten(0, 1)
        d_of_heads = of_f.t() @ kept[..., units : 2 * units].flatten(0, 1)
        d_bias = of_f.sum(0, dtype=torch.float32).to(bias.dtype)
        weights = d_from_h.to(from_h.dtype), d_of_heads.to(heads.dtype), d_bias
        return d_drive, dh0, *weights, None, None
