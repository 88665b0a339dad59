"""The ops as loops for the CPU, compiled by numba on first use and kept on disk.

In this order: numbers; the gated and the linear scan; norms; products and the recurrences of LEM
and CfC; the convolution; what runs once a character; and how a kernel is called.  They are
one file because numba compiles anew only what stands in a file that has changed.

Numbers are float32, or bfloat16 as its 16 bits; states and sums are float32.  The inner loops run
over channels, so that they vectorise.  A job is a row of the batch with a block of channels (the
scans), some rows of the batch (LEM, CfC), or a block of rows; jobs go to as many threads as torch
has.
"""

# B batch, T time, H state width

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

F32, I32, U32, U16 = np.float32, np.int32, np.uint32, np.uint16
ONE, HALF = F32(1), F32(0.5)
EPSILON = np.finfo(np.float32).eps  # of a norm, as torch has it
BLOCK, NARROWEST = 512, 16  # channels of a job, at most and at least
# numpy's division does not stop for zeros, which would keep loops from vectorising
INNER = dict(error_model="numpy", fastmath={"contract", "nsz", "arcp"})
REASSOCIATED = {*INNER["fastmath"], "reassoc"}  # for sums over a row


def compiled(**options):
    """Compile, and keep on disk if there is a place that can be written to."""

    def decorate(function):
        try:
            return njit(nogil=True, cache=True, **{**INNER, **options})(function)
        except RuntimeError:  # no such place: compiled again in every process
            return njit(nogil=True, **{**INNER, **options})(function)

    return decorate


def part(**options):
    """Compile into every kernel that calls it.

    As a function of its own, one name would stand in many files on disk, and which of them a
    process runs would depend on what it loaded before: they differ in a number's last bit.
    Neither Python nor C calls it, so it is compiled without what they would call it by.
    """
    unwrapped = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return njit(forceinline=True, **unwrapped, **{**INNER, **options})


def read(x):
    """A number of a tensor as float32."""


@overload(read)
def _read(x):
    if x.bitwidth == 16:
        return lambda x: U32(U32(x) << U32(16)).view(F32)
    return lambda x: x


def write(row, c, x):
    """row[c] = x, rounded to the nearest even bfloat16 where the row is of these."""


@overload(write)
def _write(row, c, x):
    if row.dtype.bitwidth == 32:

        def as_it_is(row, c, x):
            row[c] = x

        return as_it_is

    def rounded(row, c, x):
        bits = F32(x).view(U32)
        up = bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))
        row[c] = U16(up >> U32(16)) if x == x else U16(0x7FC0)

    return rounded


# Rows are copied and filled by these: for out[:] = x numba compiles the message of an error, too,
# which takes it two seconds.


@part()
def load(out, x):
    for c in range(len(out)):
        out[c] = read(x[c])


@part()
def store(out, x):
    for c in range(len(out)):
        write(out, c, x[c])


@part()
def fill(out, x):
    for c in range(len(out)):
        out[c] = x


@part()
def exp(x):
    """e^x to 2 ulp for |x| <= 87, beyond which it stands still: a polynomial that vectorises.

    Coefficients: Cephes, expf (Moshier 1989).
    """
    x = min(max(x, F32(-87)), F32(87))
    n = x * F32(1.44269504) + F32(12582912)  # whole part of x / ln 2, in the last bits
    n = n - F32(12582912)
    r = x - n * F32(0.693359375)
    r = r - n * F32(-2.12194440e-4)
    p = F32(1.9875691500e-4)
    p = p * r + F32(1.3981999507e-3)
    p = p * r + F32(8.3334519073e-3)
    p = p * r + F32(4.1665795894e-2)
    p = p * r + F32(1.6666665459e-1)
    p = p * r + HALF
    p = p * r * r + r + ONE
    return p * I32((I32(n) + I32(127)) << I32(23)).view(F32)


@part()
def candidate(u, positive):
    """g(u) and its derivative."""
    s = ONE / (ONE + exp(-u))
    g = u + HALF if u >= F32(0) else s
    slope = ONE if u >= F32(0) else s * (ONE - s)
    return (g, slope) if positive else (u, ONE)


@part()
def exp_two(k_f, k_i):
    """e^-k_f and e^-k_i, of which only the ratio counts where both are large: neither overflows."""
    shift = max(F32(-40) - max(k_f, k_i), F32(0))
    return exp(-(k_f + shift)), exp(-(k_i + shift))


@part()
def gated_new(s, row, width, start, positive):
    """s, the channels from `start` on of a state, after a step whose drive is the row."""
    n, parts = len(s), len(row) // width
    u = row[(parts - 1) * width + start :][:n]
    if parts == 2:
        k = row[start:][:n]
        for c in range(n):
            e = exp(-read(k[c]))
            z = ONE / (ONE + e)
            g, _ = candidate(read(u[c]), positive)
            s[c] = e * z * s[c] + z * g
    else:
        k_f, k_i = row[start:][:n], row[width + start :][:n]
        for c in range(n):
            e_f, e_i = exp_two(read(k_f[c]), read(k_i[c]))
            f, i = ONE + e_f, ONE + e_i
            z = f / (f + i)
            g, _ = candidate(read(u[c]), positive)
            s[c] = i / (f + i) * s[c] + z * g


@compiled()
def gated_forward(drive, h0, h, last, positive, block, first, end):
    width, time = h0.shape[1], drive.shape[1]
    blocks = (width + block - 1) // block
    state = np.empty(block, F32)
    for job in range(first, end):
        b, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        s = state[:n]
        load(s, h0[b][start:])
        for t in range(time):
            gated_new(s, drive[b, t], width, start, positive)
            store(h[b, t][start:][:n], s)
        store(last[b][start:][:n], s)


@compiled()
def gated_backward(drive, h0, h, dh, dlast, d_drive, dh0, positive, block, first, end):
    width, time = h0.shape[1], drive.shape[1]
    blocks, parts = (width + block - 1) // block, drive.shape[2] // width
    carry, before = np.empty(block, F32), np.empty(block, F32)
    for job in range(first, end):
        b, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        total, old = carry[:n], before[:n]
        load(total, dlast[b][start:])
        for t in range(time - 1, -1, -1):
            if t:
                load(old, h[b, t - 1][start:])
            else:
                load(old, h0[b][start:])
            row, d_row, d_out = drive[b, t], d_drive[b, t], dh[b, t][start : start + n]
            u, du = row[(parts - 1) * width + start :][:n], d_row[(parts - 1) * width + start :][:n]
            if parts == 2:
                k, dk = row[start:][:n], d_row[start:][:n]
                for c in range(n):
                    e = exp(-read(k[c]))
                    z = ONE / (ONE + e)
                    keep = e * z
                    g, slope = candidate(read(u[c]), positive)
                    d = read(d_out[c]) + total[c]
                    write(dk, c, d * (g - old[c]) * z * keep)
                    write(du, c, d * z * slope)
                    total[c] = keep * d
            else:
                k_f, dk_f = row[start:][:n], d_row[start:][:n]
                k_i, dk_i = row[width + start :][:n], d_row[width + start :][:n]
                for c in range(n):
                    e_f, e_i = exp_two(read(k_f[c]), read(k_i[c]))
                    f, i = ONE + e_f, ONE + e_i
                    z, keep = f / (f + i), i / (f + i)
                    g, slope = candidate(read(u[c]), positive)
                    d = read(d_out[c]) + total[c]
                    dk = d * (g - old[c]) * z * keep
                    write(dk_f, c, -dk * (e_f / f))
                    write(dk_i, c, dk * (e_i / i))
                    write(du, c, d * z * slope)
                    total[c] = keep * d
        store(dh0[b][start:][:n], total)


@compiled()
def linear_forward(a, b, h0, h, block, first, end):
    width, time = h0.shape[1], a.shape[1]
    blocks = (width + block - 1) // block
    state = np.empty(block, F32)
    for job in range(first, end):
        r, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        s = state[:n]
        load(s, h0[r][start:])
        for t in range(time):
            keep, new = a[r, t][start : start + n], b[r, t][start : start + n]
            out = h[r, t][start : start + n]
            for c in range(n):
                s[c] = keep[c] * s[c] + new[c]
                out[c] = s[c]


@compiled()
def linear_backward(a, h0, h, dh, da, db, dh0, block, first, end):
    width, time = h0.shape[1], a.shape[1]
    blocks = (width + block - 1) // block
    carry = np.empty(block, F32)
    for job in range(first, end):
        r, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        total = carry[:n]
        fill(total, F32(0))
        for t in range(time - 1, -1, -1):
            old = h[r, t - 1][start : start + n] if t else h0[r][start : start + n]
            keep, d_out = a[r, t][start : start + n], dh[r, t][start : start + n]
            d_keep, d_new = da[r, t][start : start + n], db[r, t][start : start + n]
            for c in range(n):
                d = d_out[c] + total[c]
                d_new[c] = d
                d_keep[c] = d * old[c]
                total[c] = keep[c] * d
        store(dh0[r][start:][:n], total)


@part()
def add(out, x):
    for c in range(len(out)):
        out[c] += read(x[c])


@part()
def add_scaled(out, x, y):
    for c in range(len(out)):
        out[c] += x[c] * y[c]


@compiled()
def block_forward(a, b, h0, h, block, first, end):
    """Gates (B, T, 2, 2, H), the rest (B, T, 2, H) and (B, 2, H)."""
    width, time = h0.shape[2], b.shape[1]
    blocks = (width + block - 1) // block
    state, new = np.empty((2, block), F32), np.empty((2, block), F32)
    for job in range(first, end):
        r, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        for i in range(2):
            load(state[i][:n], h0[r, i][start:][:n])
        for t in range(time):
            for i in range(2):
                load(new[i][:n], b[r, t, i][start:][:n])
                for j in range(2):
                    add_scaled(new[i][:n], a[r, t, i, j][start:][:n], state[j])
            for i in range(2):
                load(state[i], new[i])
                store(h[r, t, i][start:][:n], state[i])


@part(fastmath=REASSOCIATED)
def norm_row(x, weight, y):
    """Writes the normed row; its factor."""
    total = F32(0)
    for c in range(len(x)):
        total += x[c] * x[c]
    r = ONE / np.sqrt(total / F32(len(x)) + EPSILON)
    for c in range(len(x)):
        write(y, c, x[c] * r * weight[c])
    return r


@compiled(fastmath=REASSOCIATED)
def norm_forward(x, weight, y, scale, block, first, end):
    for row in range(first * block, min(end * block, x.shape[0])):
        scale[row] = norm_row(x[row], weight, y[row])


@compiled(fastmath=REASSOCIATED)
def norm_backward(x, weight, scale, dy, dx, parts, block, first, end):
    width = x.shape[1]
    for job in range(first, end):
        d_weight = parts[job]
        for row in range(job * block, min((job + 1) * block, x.shape[0])):
            inside, d_in, d_out, r = x[row], dx[row], dy[row], scale[row]
            total = F32(0)
            for c in range(width):
                total += read(d_out[c]) * weight[c] * inside[c]
            share = total * r * r * r / F32(width)
            for c in range(width):
                d = read(d_out[c])
                d_weight[c] += d * inside[c] * r
                d_in[c] = d * weight[c] * r - inside[c] * share


@part()
def sigmoid(x):
    """And 1 minus it, neither of which rounds to 0 before the other is 1."""
    e = exp(-x)
    s = ONE / (ONE + e)
    return s, e * s


@part()
def tanh(x):
    """To 1e-7, absolutely; and its derivative."""
    e = exp(-(x + x))
    r = ONE / (ONE + e)
    return (ONE - e) * r, F32(4) * (e * r) * r


@part()
def four(x, k):
    return x[k], x[k + 1], x[k + 2], x[k + 3]


@part()
def four_from(x, k, start):
    """Rows k to k + 3, from a column on."""
    return x[k][start:], x[k + 1][start:], x[k + 2][start:], x[k + 3][start:]


@part()
def dot(x, y):
    return x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3]


@part()
def add_product(out, to, x, start, w):
    """out += x w, in out's columns from `to` on, by x's from `start` on: four terms of eight rows
    at a time, so that what is loaded is used often."""
    rows, terms, width = out.shape[0], w.shape[0], w.shape[1]
    by_8, by_4 = rows - rows % 8, terms - terms % 4
    for r in range(0, by_8, 8):
        o0, o1, o2, o3 = four_from(out, r, to)
        o4, o5, o6, o7 = four_from(out, r + 4, to)
        for k in range(0, by_4, 4):
            w0, w1, w2, w3 = four(w, k)
            i = start + k
            x0, x1, x2, x3 = four(x[r], i), four(x[r + 1], i), four(x[r + 2], i), four(x[r + 3], i)
            x4, x5, x6, x7 = (
                four(x[r + 4], i),
                four(x[r + 5], i),
                four(x[r + 6], i),
                four(x[r + 7], i),
            )
            for j in range(width):
                column = w0[j], w1[j], w2[j], w3[j]
                o0[j] += dot(x0, column)
                o1[j] += dot(x1, column)
                o2[j] += dot(x2, column)
                o3[j] += dot(x3, column)
                o4[j] += dot(x4, column)
                o5[j] += dot(x5, column)
                o6[j] += dot(x6, column)
                o7[j] += dot(x7, column)
    for r in range(by_8, rows):
        o = out[r][to:]
        for k in range(0, by_4, 4):
            w0, w1, w2, w3 = four(w, k)
            x0 = four(x[r], start + k)
            for j in range(width):
                o[j] += dot(x0, (w0[j], w1[j], w2[j], w3[j]))
    for r in range(rows):
        o = out[r][to:]
        for k in range(by_4, terms):
            x0, w0 = x[r, start + k], w[k]
            for j in range(width):
                o[j] += x0 * w0[j]


@part()
def add_forward(out, h, w):
    """out += what h adds to it, by blocks w: (P, G, S, S), input and output; out: (rows, P D)."""
    parts, heads, size = w.shape[:3]
    for p in range(parts):
        for g in range(heads):
            add_product(out, (p * heads + g) * size, h, g * size, w[p, g])


@part()
def add_backward(dh, d_out, w):
    """dh += its gradient by d_out, with blocks w: (P, G, S, S), output and input."""
    parts, heads, size = w.shape[:3]
    for p in range(parts):
        for g in range(heads):
            add_product(dh, g * size, d_out, (p * heads + g) * size, w[p, g])


# The loops of LEM and CfC are made of these: with more arrays than two or three in a loop, it is
# not known any more that they lie apart, and it does not vectorise.


@part()
def normal(x):
    """P(X < x) of the normal distribution, and its density, by erf to 2e-7 (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 7.1.26)."""
    distance = abs(x) * F32(0.70710678)
    t = ONE / (ONE + F32(0.3275911) * distance)
    p = F32(1.061405429) * t - F32(1.453152027)
    p = p * t + F32(1.421413741)
    p = p * t - F32(0.284496736)
    p = p * t + F32(0.254829592)
    e = exp(-distance * distance)
    beyond = HALF * p * t * e  # the share of the smaller side
    return ONE - beyond if x > F32(0) else beyond, F32(0.39894228) * e


@part()
def sigmoids(x, scale):
    for c in range(len(x)):
        x[c] = scale * sigmoid(x[c])[0]


@part()
def tanhs(x):
    for c in range(len(x)):
        x[c] = tanh(x[c])[0]


@part()
def mix(state, new, gate):
    for c in range(len(state)):
        state[c] += gate[c] * (new[c] - state[c])


@compiled()
def lem_forward(drive, ys, zs, in_y, in_z, h, kept, dt, block, first, end):
    """ys, zs: the first state when it begins, the last when it ends.  kept: (B, T, 5 D), what goes
    into the gates of z and y and into the tanh of z; z; what goes into the tanh of y."""
    width, time = ys.shape[1], drive.shape[1]
    for job in range(first, end):
        begin, stop = job * block, min((job + 1) * block, drive.shape[0])
        y, z, n = ys[begin:stop], zs[begin:stop], stop - begin
        p, q = np.empty((n, 3 * width), F32), np.empty((n, width), F32)
        for t in range(time):
            for r in range(n):
                load(p[r], drive[begin + r, t])
                load(q[r], drive[begin + r, t][3 * width :])
            add_forward(p, y, in_y)
            for r in range(n):
                row, keep = p[r], kept[begin + r, t]
                store(keep[: 3 * width], row)
                sigmoids(row[: 2 * width], dt)
                tanhs(row[2 * width :])
                mix(z[r], row[2 * width :], row[:width])
                store(keep[3 * width :][:width], z[r])
            add_forward(q, z, in_z)
            for r in range(n):
                store(kept[begin + r, t][4 * width :], q[r])
                tanhs(q[r])
                mix(y[r], q[r], p[r][width:][:width])
                store(h[begin + r, t], y[r])


@part()
def d_mix(d, old, new, gate, dt):
    """d: of the state, and then what it passes on.  new, gate: what went into the tanh and into the
    sigmoid, and then the d of both."""
    for c in range(len(d)):
        (g, rest), (f, slope) = sigmoid(gate[c]), tanh(new[c])
        new[c] = d[c] * dt * g * slope
        gate[c] = d[c] * (f - read(old[c])) * dt * g * rest
        d[c] *= ONE - dt + dt * rest


@compiled()
def lem_backward(dh, y0, z0, h, kept, by_y, by_z, d_drive, dy0, dz0, dt, block, first, end):
    """dy0, dz0: (B, D), of the last state when it begins, of the first when it ends."""
    width, time = dy0.shape[1], dh.shape[1]
    for job in range(first, end):
        begin, stop = job * block, min((job + 1) * block, dh.shape[0])
        dy, dz, n = dy0[begin:stop], dz0[begin:stop], stop - begin
        of_y, of_z = np.empty((n, 3 * width), F32), np.empty((n, width), F32)
        for t in range(time - 1, -1, -1):
            for r in range(n):
                b, d, d_in = begin + r, dy[r], dh[begin + r, t]
                for c in range(width):
                    d[c] += read(d_in[c])
                load(of_y[r], kept[b, t])
                load(of_z[r], kept[b, t][4 * width :])
                old = h[b, t - 1] if t else y0[b]
                d_mix(d, old, of_z[r], of_y[r][width:][:width], dt)
            add_backward(dz, of_z, by_z)
            for r in range(n):
                b, row = begin + r, of_y[r]
                old = kept[b, t - 1][3 * width :][:width] if t else z0[b][:]
                d_mix(dz[r], old, row[2 * width :], row[:width], dt)
            add_backward(dy, of_y, by_y)
            for r in range(n):
                store(d_drive[begin + r, t][: 3 * width], of_y[r])
                store(d_drive[begin + r, t][3 * width :], of_z[r])


@compiled()
def diagonal_lem_forward(drive, y0, z0, weights, h, zs, ys, z_last, dt, block, first, end):
    """weights: (4, D), of both gates, the new z and the new y."""
    width, time = y0.shape[1], drive.shape[1]
    blocks = (width + block - 1) // block
    state, inside = np.empty((2, block), F32), np.empty((4, block), F32)
    for job in range(first, end):
        b, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        y, z = state[0][:n], state[1][:n]
        load(y, y0[b][start:])
        load(z, z0[b][start:])
        gate_z, gate_y, new_z, new_y = four(inside, 0)
        for t in range(time):
            for i in range(4):
                load(inside[i][:n], drive[b, t][i * width + start :])
            for i in range(3):
                add_scaled(inside[i][:n], weights[i][start:], y)
            sigmoids(gate_z[:n], dt)
            sigmoids(gate_y[:n], dt)
            tanhs(new_z[:n])
            mix(z, new_z, gate_z)
            add_scaled(new_y[:n], weights[3][start:], z)
            tanhs(new_y[:n])
            mix(y, new_y, gate_y)
            store(h[b, t][start:][:n], y)
            store(zs[b, t][start:][:n], z)
        store(ys[b][start:][:n], y)
        store(z_last[b][start:][:n], z)


@compiled()
def diagonal_lem_backward(
    drive, y0, z0, weights, h, zs, dh, d_drive, dy0, dz0, parts, dt, block, first, end
):
    """dy0, dz0: of the last state when it begins, of the first when it ends.  parts: (B, 4, D), a
    row's part in the gradient of the weights."""
    width, time = y0.shape[1], drive.shape[1]
    blocks = (width + block - 1) // block
    inside, old, out = np.empty((4, block), F32), np.empty((2, block), F32), np.empty(block, F32)
    for job in range(first, end):
        b, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        dy, dz = dy0[b][start:][:n], dz0[b][start:][:n]
        gate_z, gate_y, new_z, new_y = four(inside, 0)
        old_y, old_z, z = old[0][:n], old[1][:n], out[:n]
        for t in range(time - 1, -1, -1):
            load(z, zs[b, t][start:])
            if t:
                load(old_y, h[b, t - 1][start:])
                load(old_z, zs[b, t - 1][start:])
            else:
                load(old_y, y0[b][start:])
                load(old_z, z0[b][start:])
            for i in range(4):
                load(inside[i][:n], drive[b, t][i * width + start :])
                add_scaled(inside[i][:n], weights[i][start:], old_y if i < 3 else z)
            add(dy, dh[b, t][start:])
            d_mix(dy, old_y, new_y, gate_y, dt)
            add_scaled(dz, weights[3][start:], new_y)
            d_mix(dz, old_z, new_z, gate_z, dt)
            for i in range(4):
                if i < 3:
                    add_scaled(dy, weights[i][start:], inside[i])
                add_scaled(parts[b, i][start:][:n], inside[i], old_y if i < 3 else z)
                store(d_drive[b, t][i * width + start :][:n], inside[i])


LECUN_TANH, TANH, RELU, SILU, GELU = range(5)


@part()
def activate(x, kind):
    for c in range(len(x)):
        x[c] = activation(x[c], kind)[0]


@part()
def activation(x, kind):
    """And its derivative."""
    if kind == RELU:
        return max(x, F32(0)), ONE if x > F32(0) else F32(0)
    if kind == SILU:
        s, rest = sigmoid(x)
        return x * s, s + x * s * rest
    if kind == GELU:
        below, density = normal(x)
        return x * below, below + x * density
    if kind == TANH:
        return tanh(x)
    f, slope = tanh(F32(0.666) * x)
    return F32(1.7159) * f, F32(1.7159 * 0.666) * slope


@part()
def add_head(first, second, gate, gated):
    """first: tanh(f_1), and then the new h."""
    if gated:
        mix(first, second, gate)
    else:
        add_scaled(first, gate, second)


@part()
def d_heads_of(d, f_1, f_2, gate, gated):
    """f_1, f_2, gate: what went into both tanh and the sigmoid, and then their d."""
    for c in range(len(d)):
        g, rest = sigmoid(gate[c])
        (u, u_slope), (v, v_slope) = tanh(f_1[c]), tanh(f_2[c])
        f_1[c] = (d[c] * rest if gated else d[c]) * u_slope
        f_2[c] = d[c] * g * v_slope
        gate[c] = d[c] * (v - u if gated else v) * g * rest


@compiled()
def cfc_forward(drive, states, in_h, in_heads, bias, h, kept, kind, gated, block, first, end):
    """states: the first when it begins, the last when it ends.  kept: (B, T, 2 U + 3 D), what goes
    into the backbone's activation and what comes out, what goes into both tanh and the gate."""
    width, units, time = states.shape[1], drive.shape[2], drive.shape[1]
    for job in range(first, end):
        begin, stop = job * block, min((job + 1) * block, drive.shape[0])
        state, n = states[begin:stop], stop - begin
        p, f = np.empty((n, units), F32), np.empty((n, 3 * width), F32)
        for t in range(time):
            for r in range(n):
                load(p[r], drive[begin + r, t])
                load(f[r], bias)
            add_product(p, 0, state, 0, in_h)
            for r in range(n):
                keep = kept[begin + r, t]
                store(keep[:units], p[r])
                activate(p[r], kind)
                store(keep[units:][:units], p[r])
            add_product(f, 0, p, 0, in_heads)
            for r in range(n):
                row, s = f[r], state[r]
                store(kept[begin + r, t][2 * units :], row)
                tanhs(row[: 2 * width])
                sigmoids(row[2 * width :], ONE)
                load(s, row)
                add_head(s, row[width:][:width], row[2 * width :], gated)
                store(h[begin + r, t], s)


@compiled()
def cfc_backward(dh, kept, by_h, by_heads, d_drive, d_heads, dh0, kind, gated, block, first, end):
    """dh0: (B, D), of the last state when it begins, of the first when it ends."""
    width, units, time = dh0.shape[1], d_drive.shape[2], dh.shape[1]
    for job in range(first, end):
        begin, stop = job * block, min((job + 1) * block, dh.shape[0])
        carry, n = dh0[begin:stop], stop - begin
        p, f = np.empty((n, units), F32), np.empty((n, 3 * width), F32)
        for t in range(time - 1, -1, -1):
            for r in range(n):
                total, d_in, row = carry[r], dh[begin + r, t], f[r]
                for c in range(width):
                    total[c] += read(d_in[c])
                load(row, kept[begin + r, t][2 * units :])
                d_heads_of(total, row[:width], row[width:][:width], row[2 * width :], gated)
                store(d_heads[begin + r, t], row)
                fill(total, F32(0))
                fill(p[r], F32(0))
            add_product(p, 0, f, 0, by_heads)
            for r in range(n):
                row, inside = p[r], kept[begin + r, t]
                for c in range(units):
                    row[c] *= activation(read(inside[c]), kind)[1]
                store(d_drive[begin + r, t], row)
            add_product(carry, 0, p, 0, by_h)


@part()
def diagonal_heads(inside, drive, weights, h, width, start, tau):
    """inside: (P, n), what goes into both tanh, the gate, and the leak where there is one."""
    n = len(h)
    for i in range(len(inside)):
        load(inside[i][:n], drive[i * width + start :])
    for i in range(3):
        add_scaled(inside[i][:n], weights[i][start:], h)
    gate = inside[2]
    for c in range(n):
        gate[c] *= tau


@part()
def d_leak(d, old, new, leak):
    """d: of the state, and then what leaks past the new one.  new: and then its d.  leak: what went
    into its sigmoid, and then the d of that."""
    for c in range(len(d)):
        g, rest = sigmoid(leak[c])
        leak[c] = d[c] * (new[c] - old[c]) * g * rest
        new[c] = d[c] * g
        d[c] *= rest


@compiled()
def diagonal_cfc_forward(drive, h0, weights, h, last, gated, tau, block, first, end):
    """drive: (B, T, 3 D), or (B, T, 4 D) with a leak.  weights: (3, D)."""
    width, time = h0.shape[1], drive.shape[1]
    blocks, leaky = (width + block - 1) // block, drive.shape[2] == 4 * width
    state, inside = np.empty(block, F32), np.empty((drive.shape[2] // width, block), F32)
    for job in range(first, end):
        b, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        s, new, second, gate = state[:n], inside[0][:n], inside[1][:n], inside[2][:n]
        load(s, h0[b][start:])
        for t in range(time):
            diagonal_heads(inside, drive[b, t], weights, s, width, start, tau)
            tanhs(new)
            tanhs(second)
            sigmoids(gate, ONE)
            add_head(new, second, gate, gated)
            if leaky:
                leak = inside[3][:n]
                sigmoids(leak, ONE)
                mix(s, new, leak)
            else:
                load(s, new)
            store(h[b, t][start:][:n], s)
        store(last[b][start:][:n], s)


@compiled()
def diagonal_cfc_backward(
    drive, h0, weights, h, dh, d_drive, dh0, parts, gated, tau, block, first, end
):
    """dh0: of the last state when it begins, of the first when it ends.  parts: (B, 3, D), a row's
    part in the gradient of the weights."""
    width, time = h0.shape[1], drive.shape[1]
    blocks, leaky = (width + block - 1) // block, drive.shape[2] == 4 * width
    inside = np.empty((drive.shape[2] // width, block), F32)
    rows = np.empty((4, block), F32)
    for job in range(first, end):
        b, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        d, old, share = dh0[b][start:][:n], rows[0][:n], rows[3][:n]
        new, second = rows[1][:n], rows[2][:n]
        f_1, f_2, gate = inside[0][:n], inside[1][:n], inside[2][:n]
        for t in range(time - 1, -1, -1):
            if t:
                load(old, h[b, t - 1][start:])
            else:
                load(old, h0[b][start:])
            diagonal_heads(inside, drive[b, t], weights, old, width, start, tau)
            add(d, dh[b, t][start:])
            if leaky:
                load(new, f_1)
                load(second, f_2)
                tanhs(new)
                tanhs(second)
                load(share, gate)
                sigmoids(share, ONE)
                add_head(new, second, share, gated)
                d_leak(d, old, new, inside[3][:n])
            else:
                load(new, d)
                fill(d, F32(0))
            d_heads_of(new, f_1, f_2, gate, gated)
            for c in range(n):
                gate[c] *= tau
            for i in range(3):
                add_scaled(d, weights[i][start:], inside[i])
                add_scaled(parts[b, i][start:][:n], inside[i], old)
            for i in range(len(inside)):
                store(d_drive[b, t][i * width + start :][:n], inside[i])


@compiled()
def conv_forward(x, weight, bias, y, block, first, end):
    """x: (B, K - 1 + T, D), weight: (K, D) -> y: (B, T, D)."""
    for b in range(first * block, min(end * block, x.shape[0])):
        for t in range(y.shape[1]):
            out = y[b, t]
            load(out, bias)
            for k in range(weight.shape[0]):
                row, w = x[b, t + k], weight[k]
                for c in range(len(out)):
                    out[c] += w[c] * row[c]


@compiled()
def conv_backward(x, weight, dy, dx, parts, block, first, end):
    """parts: (B, K + 1, D), the d of the weight and, last, of the bias, of every row."""
    for b in range(first * block, min(end * block, x.shape[0])):
        d_bias = parts[b, weight.shape[0]]
        for t in range(dy.shape[1]):
            d = dy[b, t]
            for c in range(len(d)):
                d_bias[c] += d[c]
            for k in range(weight.shape[0]):
                row, d_row, w, dw = x[b, t + k], dx[b, t + k], weight[k], parts[b, k]
                for c in range(len(d)):
                    dw[c] += d[c] * row[c]
                for c in range(len(d)):
                    d_row[c] += d[c] * w[c]


# What runs once a character takes addresses, as an array for every tensor would cost more than the
# work: float32, contiguous.


@intrinsic
def _pointer(context, address):
    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), code


@part()
def rows_at(address, rows, width):
    return carray(_pointer(address), (rows, width))


@compiled(fastmath=REASSOCIATED)
def step_linear(x_at, w_at, bias_at, y_at, rows, inputs, outputs):
    """y = x w^T + bias, each row of w read once; no bias at the address 0."""
    x, w = rows_at(x_at, rows, inputs), rows_at(w_at, outputs, inputs)
    y, bias = rows_at(y_at, rows, outputs), rows_at(bias_at, 1, outputs)[0]
    for o in range(outputs):
        row = w[o]
        for r in range(rows):
            inside = x[r]
            total = F32(0)
            for c in range(inputs):
                total += inside[c] * row[c]
            y[r, o] = total + bias[o] if bias_at else total


@compiled(fastmath=REASSOCIATED)
def step_norm(x_at, weight_at, y_at, rows, width):
    x, y, weight = (
        rows_at(x_at, rows, width),
        rows_at(y_at, rows, width),
        rows_at(weight_at, 1, width)[0],
    )
    for row in range(rows):
        norm_row(x[row], weight, y[row])


@compiled()
def step_gated(drive_at, h_at, new_at, rows, parts, width, positive):
    drive, h = rows_at(drive_at, rows, parts * width), rows_at(h_at, rows, width)
    new = rows_at(new_at, rows, width)
    for r in range(rows):
        load(new[r], h[r])
        gated_new(new[r], drive[r], width, 0, positive)


@compiled()
def step_gelu(x_at, y_at, size):
    x, y = rows_at(x_at, 1, size)[0], rows_at(y_at, 1, size)[0]
    for c in range(size):
        y[c] = x[c] * normal(x[c])[0]


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """Threads do not survive a fork."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def step(kernel: Callable, tensors: Sequence[Tensor | None], *sizes: int | bool) -> None:
    """A kernel that takes addresses, on this thread.  The caller keeps the tensors alive."""
    kernel(*[0 if x is None else x.data_ptr() for x in tensors], *sizes)


def run(kernel: Callable, batch: int, width: int, *arguments: Tensor | bool) -> None:
    """The kernel over every row of a batch and block of channels."""
    block = BLOCK
    while block > NARROWEST and batch * -(-width // block) < torch.get_num_threads():
        block //= 2
    _share_out(kernel, batch * -(-width // block), block, *arguments)


def run_batch(kernel: Callable, batch: int, *arguments: Tensor | float) -> None:
    """The kernel over the rows of a batch, as many at once as give every thread its share."""
    block = max(1, -(-batch // torch.get_num_threads()))
    _share_out(kernel, -(-batch // block), block, *arguments)


def run_rows(kernel: Callable, rows: int, block: int, *arguments: Tensor) -> None:
    """The kernel over every block of rows."""
    _share_out(kernel, -(-rows // block), block, *arguments)


def _share_out(kernel: Callable, jobs: int, block: int, *arguments: Tensor | bool) -> None:
    """The jobs 0 .. jobs - 1 of a kernel, on torch's number of threads."""
    global _pool
    threads = torch.get_num_threads()
    arrays = [_argument(x) for x in arguments]
    borders = [jobs * i // threads for i in range(threads + 1)]
    shares = [(s, e) for s, e in zip(borders, borders[1:], strict=False) if s < e]
    if len(shares) > 1 and _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count())
    others = [_pool.submit(kernel, *arrays, block, *share) for share in shares[1:]]
    for share in shares[:1]:
        kernel(*arrays, block, *share)
    for other in others:
        other.result()


def _argument(x: Tensor | float | int | bool) -> np.ndarray | np.float32 | int | bool:
    """The tensor's memory; bfloat16, which numpy does not have, as 16 bits."""
    if not isinstance(x, Tensor):
        return F32(x) if isinstance(x, float) else x
    tensor = x.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
