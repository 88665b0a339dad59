"""The scan over a matrix as the state: gated linear attention."""

# B batch, T time, H heads, K key width, V value width

from torch import Tensor

from seqlm.errors import ShapeError
from seqlm.ops.dispatch import Op
from seqlm.ops.states import state_dtype

_op = Op("matrix_scan")


def matrix_scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve S_t = diag(a_t) S_{t-1} + k_t v_t', o_t = S_t' q_t for t = 1 .. T, for each head.

    q, k: (B, T, H, K), v: (B, T, H, V), T >= 1.  log_a: (B, T, H, K), the logarithms of the decays
    a, finite and at most 0; or (B, T, H, 1), one decay a head.  Logarithms, because a decay near 1
    would be rounded to it.  S0: (B, H, K, V), the state before the first step.
    Returns o: (B, T, H, V) in v's dtype, and S_T: (B, H, K, V), a copy, in float32 (float64 where
    an input is), the dtype the state is carried in.  Raises ShapeError when shapes disagree.
    Source: Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236; with decays: Yang et al.,
    Gated Linear Attention Transformers, arXiv 2312.06635, section 4.
    """
    batch, time, heads, keys = q.shape if q.ndim == 4 else (None, 0, None, None)
    right = (batch, time, heads, keys), (batch, time, heads), (batch, heads, keys, v.shape[-1])
    decays = (*right[1], keys), (*right[1], 1)
    if time < 1 or (k.shape, v.shape[:3], S0.shape) != right or log_a.shape not in decays:
        raise ShapeError(
            "A matrix scan takes queries and keys (B, T, H, K), values (B, T, H, V), decays "
            "(B, T, H, K) or (B, T, H, 1) with T >= 1 and a state (B, H, K, V); it was given "
            f"{', '.join(str(tuple(x.shape)) for x in (q, k, v, log_a, S0))}."
        )
    o, last = _op(q, k, v, log_a, S0.to(state_dtype(q, k, v, log_a, S0)))
    return o, last
