"""The scan over a matrix as the state that corrects what it holds: the gated delta rule."""

# B batch, T time, H heads, K key width, V value width

from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

_op = Op("delta_scan")


def delta_scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor, S0: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve S_t = a_t (I - beta_t k_t k_t') S_{t-1} + beta_t k_t v_t', o_t = S_t' q_t for
    t = 1 .. T, for each head.

    A step moves S' k_t, which is what the state holds for the key k_t, towards v_t.
    q, k: (B, T, H, K), v: (B, T, H, V), T >= 1.  log_a: (B, T, H, 1), the logarithms of the decays
    a, finite and at most 0.  beta: (B, T, H, 1), from 0 to 1.  S0: (B, H, K, V), the state before
    the first step.  Keys with |k_t| <= 1 never make the state larger by themselves.
    Returns o: (B, T, H, V) in v's dtype, and S_T: (B, H, K, V), a copy, in float32 (float64 where
    an input is), the dtype the state is carried in.  Raises ShapeError when shapes disagree.
    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464, section 3.1, transposed.
    """
    batch, time, heads, keys = q.shape if q.ndim == 4 else (None, 0, None, None)
    right = (batch, time, heads, keys), (batch, time, heads), (batch, heads, keys, v.shape[-1])
    gates = {log_a.shape, beta.shape}
    if time < 1 or (k.shape, v.shape[:3], S0.shape) != right or gates != {(*right[1], 1)}:
        raise ShapeError(
            "A delta scan takes queries and keys (B, T, H, K), values (B, T, H, V), decays and "
            "rates (B, T, H, 1) with T >= 1 and a state (B, H, K, V); it was given "
            f"{', '.join(str(tuple(x.shape)) for x in (q, k, v, log_a, beta, S0))}."
        )
    o, last = _op(q, k, v, log_a, beta, S0.to(state_dtype(q, k, v, log_a, beta, S0)))
    return o, last
