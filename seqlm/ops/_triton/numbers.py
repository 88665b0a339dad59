"""What kernels read, write and compute, number by number."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def read(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(pointer, offsets, x, mask):
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def only(mask, condition):
    """The mask where the condition, one number, holds; `&` would make no mask of it in Triton's
    interpreter."""
    return tl.where(condition, mask, False)


@triton.jit
def sigmoid(x):
    """And 1 minus it, neither of which rounds to 0 before the other is 1."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    return tl.where(x >= 0, large, e * large), tl.where(x >= 0, e * large, large)


@triton.jit
def tanh(x):
    """To 1e-7, absolutely; and its derivative."""
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
def d_mix(d, old, new, gate, dt):
    """The gradients of old, new and gate in `mix`, where d is that of what it gives."""
    g, rest = sigmoid(gate)
    f, slope = tanh(new)
    return d * (1.0 - dt + dt * rest), d * dt * g * slope, d * (f - old) * dt * g * rest


@triton.jit
def two_at(pointer, offsets, H, mask):
    """Two of H numbers one behind the other."""
    return read(pointer, offsets, mask), read(pointer + H, offsets, mask)


@triton.jit
def write_two(pointer, offsets, H, x, y, mask):
    """Where `two_at` reads."""
    write(pointer, offsets, x, mask)
    write(pointer + H, offsets, y, mask)


@triton.jit
def parts_at(pointer, offsets, H, mask, PARTS: tl.constexpr):
    """Three or four of H numbers one behind the other; where they are three, the fourth is none."""
    x, y = read(pointer, offsets, mask), read(pointer + H, offsets, mask)
    z = read(pointer + 2 * H, offsets, mask)
    last = z
    if PARTS == 4:
        last = read(pointer + 3 * H, offsets, mask)
    return x, y, z, last


@triton.jit
def write_parts(pointer, offsets, H, x, y, z, last, mask, PARTS: tl.constexpr):
    """Where `parts_at` reads."""
    write(pointer, offsets, x, mask)
    write(pointer + H, offsets, y, mask)
    write(pointer + 2 * H, offsets, z, mask)
    if PARTS == 4:
        write(pointer + 3 * H, offsets, last, mask)


@triton.jit
def new_of(f_1, f_2, k, GATED: tl.constexpr):
    """tanh(f_1) (1 - s) + s tanh(f_2) with s = sigmoid(k); without GATED, tanh(f_1) is whole."""
    u, _ = tanh(f_1)
    v, _ = tanh(f_2)
    s, rest = sigmoid(k)
    if GATED:
        u = u * rest
    return u + s * v


@triton.jit
def d_new_of(d, f_1, f_2, k, GATED: tl.constexpr):
    """The gradients of f_1, f_2 and k in `new_of`, where d is that of what it gives."""
    u, u_slope = tanh(f_1)
    v, v_slope = tanh(f_2)
    s, rest = sigmoid(k)
    d_1, apart = d * u_slope, v
    if GATED:
        d_1, apart = d_1 * rest, v - u
    return d_1, d * s * v_slope, d * apart * s * rest


@triton.jit
def product(x, w, total):
    """total + x w, x in w's dtype; of float32 to about its own precision."""
    x = x.to(w.dtype)
    if INTERPRETED:  # where a product of bfloat16 is one of their bits
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, total, input_precision="tf32x3")
