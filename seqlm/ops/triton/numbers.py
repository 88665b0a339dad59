"""What kernels read, write and compute: functions of blocks of numbers, in float32."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def read(pointer, offsets, mask):
    """The numbers at pointer + offsets, in float32; 0 where the mask is False."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(pointer, offsets, x, mask):
    """Store x at pointer + offsets, rounded to the memory's dtype, where the mask is True."""
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def read_rows(pointer, offsets, stride, mask, N: tl.constexpr):
    """A tuple of the numbers at `offsets` in N rows, whose beginnings are `stride` apart."""
    rows = ()
    for i in tl.static_range(N):
        rows += (read(pointer + i * stride, offsets, mask),)
    return rows


@triton.jit
def write_rows(pointer, offsets, stride, rows, mask):
    """Write a tuple of rows where `read_rows` reads them."""
    for i in tl.static_range(len(rows)):
        write(pointer + i * stride, offsets, rows[i], mask)


@triton.jit
def mask_if(mask, condition):
    """The mask where `condition`, a single boolean, is True; all False if it is False.

    Triton's interpreter does not accept `mask & condition` as a mask.
    """
    return tl.where(condition, mask, False)


@triton.jit
def sigmoid(x):
    """Returns sigmoid(x) and 1 - sigmoid(x), both accurate where they are near 0."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    return tl.where(x >= 0, large, e * large), tl.where(x >= 0, e * large, large)


@triton.jit
def tanh(x):
    """Returns tanh(x), with an absolute error of 1e-7, and its slope 1 - tanh(x)^2."""
    e = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x >= 0, 1.0 - e, e - 1.0) * r, 4.0 * (e * r) * r


@triton.jit
def mix(old, new, gate, dt):
    """(1 - D) old + D tanh(new) with D = dt sigmoid(gate)."""
    g, _ = sigmoid(gate)
    f, _ = tanh(new)
    return old + dt * g * (f - old)


@triton.jit
def mix_gradients(d, old, new, gate, dt):
    """dL/d(old, new, gate) for `mix`; d: dL/d(its result)."""
    g, rest = sigmoid(gate)
    f, slope = tanh(new)
    return d * (1.0 - dt + dt * rest), d * dt * g * slope, d * (f - old) * dt * g * rest


@triton.jit
def new_state(f_1, f_2, k, GATED: tl.constexpr):
    """CfC's state: tanh(f_1) (1 - s) + s tanh(f_2) with s = sigmoid(k); without GATED, the first
    term is tanh(f_1)."""
    u, _ = tanh(f_1)
    v, _ = tanh(f_2)
    s, rest = sigmoid(k)
    if GATED:
        u = u * rest
    return u + s * v


@triton.jit
def new_state_gradients(d, f_1, f_2, k, GATED: tl.constexpr):
    """dL/d(f_1, f_2, k) for `new_state`; d: dL/d(its result)."""
    u, u_slope = tanh(f_1)
    v, v_slope = tanh(f_2)
    s, rest = sigmoid(k)
    d_1, by_s = d * u_slope, v  # by_s: the derivative of the state by s
    if GATED:
        d_1, by_s = d_1 * rest, v - u
    return d_1, d * s * v_slope, d * by_s * s * rest


@triton.jit
def product(x, w, total):
    """total + x w, with x rounded to w's dtype.

    tf32x3 sums three products of TF32 numbers, which gives about the precision of float32.
    """
    x = x.to(w.dtype)
    if INTERPRETED:  # Triton's interpreter would multiply bfloat16's bits as integers
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, total, input_precision="tf32x3")
