"""What kernels read, write and compute: each function takes a block of numbers and a mask."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def read(pointer, offsets, mask):
    """Numbers in float32; 0 where the mask is False."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(pointer, offsets, x, mask):
    """Numbers in the dtype of the memory."""
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def only(mask, condition):
    """The mask where the condition, one number, holds, else False.

    `mask & condition` would be no mask in Triton's interpreter.
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
    """The gradients of old, new and gate in `mix`; d: the gradient of its result."""
    g, rest = sigmoid(gate)
    f, slope = tanh(new)
    return d * (1.0 - dt + dt * rest), d * dt * g * slope, d * (f - old) * dt * g * rest


@triton.jit
def two_at(pointer, offsets, H, mask):
    """Two rows of H numbers, the second right behind the first: numbers of each at `offsets`."""
    return read(pointer, offsets, mask), read(pointer + H, offsets, mask)


@triton.jit
def write_two(pointer, offsets, H, x, y, mask):
    """Write x and y where `two_at` reads."""
    write(pointer, offsets, x, mask)
    write(pointer + H, offsets, y, mask)


@triton.jit
def parts_at(pointer, offsets, H, mask, PARTS: tl.constexpr):
    """Three or four rows of H numbers, one behind the other; the third of three comes twice."""
    x, y = read(pointer, offsets, mask), read(pointer + H, offsets, mask)
    z = read(pointer + 2 * H, offsets, mask)
    last = z
    if PARTS == 4:
        last = read(pointer + 3 * H, offsets, mask)
    return x, y, z, last


@triton.jit
def write_parts(pointer, offsets, H, x, y, z, last, mask, PARTS: tl.constexpr):
    """Write x, y, z and, where there are four rows, `last` where `parts_at` reads."""
    write(pointer, offsets, x, mask)
    write(pointer + H, offsets, y, mask)
    write(pointer + 2 * H, offsets, z, mask)
    if PARTS == 4:
        write(pointer + 3 * H, offsets, last, mask)


@triton.jit
def new_state(f_1, f_2, k, GATED: tl.constexpr):
    """tanh(f_1) (1 - s) + s tanh(f_2) with s = sigmoid(k); without GATED, tanh(f_1) is whole."""
    u, _ = tanh(f_1)
    v, _ = tanh(f_2)
    s, rest = sigmoid(k)
    if GATED:
        u = u * rest
    return u + s * v


@triton.jit
def new_state_gradients(d, f_1, f_2, k, GATED: tl.constexpr):
    """The gradients of f_1, f_2 and k in `new_state`; d: the gradient of its result."""
    u, u_slope = tanh(f_1)
    v, v_slope = tanh(f_2)
    s, rest = sigmoid(k)
    d_1, apart = d * u_slope, v
    if GATED:
        d_1, apart = d_1 * rest, v - u
    return d_1, d * s * v_slope, d * apart * s * rest


@triton.jit
def product(x, w, total):
    """total + x w, with x in w's dtype.

    tf32x3 adds three products of TF32 numbers, which together are about as exact as float32.
    """
    x = x.to(w.dtype)
    if INTERPRETED:  # Triton's interpreter would multiply the bits of bfloat16 as whole numbers
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, total, input_precision="tf32x3")
