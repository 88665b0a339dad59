"""The scans as compiled loops for the CPU: activations and recurrence in one pass each way.

float32, and bfloat16 as its 16 bits, with a float32 state.  A job is a row of the batch and a block
of channels, which the inner loops run over, so that they vectorise; jobs go to as many threads as
torch has.  Compiled on first use by numba and kept on disk.
"""

# B batch, T time, H state width

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from numba.extending import overload
from torch import Tensor

F32, I32, U32, U16 = np.float32, np.int32, np.uint32, np.uint16
ONE, HALF = F32(1), F32(0.5)
EPSILON = np.finfo(np.float32).eps  # of a norm, as torch has it
BLOCK, NARROWEST = 128, 16  # channels of a job, at most and at least
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


@njit(**INNER)
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


@njit(**INNER)
def candidate(u, positive):
    """g(u) and its derivative."""
    s = ONE / (ONE + exp(-u))
    g = u + HALF if u >= F32(0) else s
    slope = ONE if u >= F32(0) else s * (ONE - s)
    return (g, slope) if positive else (u, ONE)


@njit(**INNER)
def exp_two(k_f, k_i):
    """e^-k_f and e^-k_i, of which only the ratio counts where both are large: neither overflows."""
    shift = max(F32(-40) - max(k_f, k_i), F32(0))
    return exp(-(k_f + shift)), exp(-(k_i + shift))


@compiled()
def gated_forward(drive, h0, h, last, positive, block, first, end):
    width, time = h0.shape[1], drive.shape[1]
    blocks, parts = (width + block - 1) // block, drive.shape[2] // width
    state = np.empty(block, F32)
    for job in range(first, end):
        b, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        state[:n] = h0[b, start : start + n]
        s = state[:n]
        for t in range(time):
            row, out = drive[b, t], h[b, t][start : start + n]
            u = row[(parts - 1) * width + start :][:n]
            if parts == 2:
                k = row[start:][:n]
                for c in range(n):
                    e = exp(-read(k[c]))
                    z = ONE / (ONE + e)
                    g, _ = candidate(read(u[c]), positive)
                    s[c] = e * z * s[c] + z * g
                    write(out, c, s[c])
            else:
                k_f, k_i = row[start:][:n], row[width + start :][:n]
                for c in range(n):
                    e_f, e_i = exp_two(read(k_f[c]), read(k_i[c]))
                    f, i = ONE + e_f, ONE + e_i
                    z = f / (f + i)
                    g, _ = candidate(read(u[c]), positive)
                    s[c] = i / (f + i) * s[c] + z * g
                    write(out, c, s[c])
        last[b, start : start + n] = s


@compiled()
def gated_backward(drive, h0, h, dh, dlast, d_drive, dh0, positive, block, first, end):
    width, time = h0.shape[1], drive.shape[1]
    blocks, parts = (width + block - 1) // block, drive.shape[2] // width
    carry, before = np.empty(block, F32), np.empty(block, F32)
    for job in range(first, end):
        b, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        carry[:n] = dlast[b, start : start + n]
        total, old = carry[:n], before[:n]
        for t in range(time - 1, -1, -1):
            if t:
                past = h[b, t - 1][start : start + n]
                for c in range(n):
                    old[c] = read(past[c])
            else:
                old[:] = h0[b, start : start + n]
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
        dh0[b, start : start + n] = total


@compiled()
def linear_forward(a, b, h0, h, block, first, end):
    width, time = h0.shape[1], a.shape[1]
    blocks = (width + block - 1) // block
    state = np.empty(block, F32)
    for job in range(first, end):
        r, start = job // blocks, job % blocks * block
        n = min(block, width - start)
        state[:n] = h0[r, start : start + n]
        s = state[:n]
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
        total[:] = F32(0)
        for t in range(time - 1, -1, -1):
            old = h[r, t - 1][start : start + n] if t else h0[r][start : start + n]
            keep, d_out = a[r, t][start : start + n], dh[r, t][start : start + n]
            d_keep, d_new = da[r, t][start : start + n], db[r, t][start : start + n]
            for c in range(n):
                d = d_out[c] + total[c]
                d_new[c] = d
                d_keep[c] = d * old[c]
                total[c] = keep[c] * d
        dh0[r, start : start + n] = total


@compiled(fastmath=REASSOCIATED)
def norm_forward(x, weight, y, scale, block, first, end):
    width = x.shape[1]
    for row in range(first * block, min(end * block, x.shape[0])):
        inside, out = x[row], y[row]
        total = F32(0)
        for c in range(width):
            total += inside[c] * inside[c]
        r = ONE / np.sqrt(total / F32(width) + EPSILON)
        scale[row] = r
        for c in range(width):
            write(out, c, inside[c] * r * weight[c])


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


@njit(**INNER)
def sigmoid(x):
    return ONE / (ONE + exp(-x))


@njit(**INNER)
def tanh(x):
    """To 1e-7, absolutely."""
    e = exp(-(x + x))
    return (ONE - e) / (ONE + e)


@compiled()
def lem_new_z(t, p, steps, gates, phi, zs, dt):
    """p: (B, 3 D), from y before the step; steps: (T, B, 4 D).  Writes both gates, phi and z."""
    width = phi.shape[2]
    for b in range(p.shape[0]):
        drive, old, new, gate, f = steps[t, b], zs[t, b], zs[t + 1, b], gates[t, b], phi[t, b]
        in_z, in_y, in_f = p[b][:width], p[b][width:][:width], p[b][2 * width :][:width]
        of_z, of_y, of_f = drive[:width], drive[width:][:width], drive[2 * width :][:width]
        gate_z, gate_y = gate[:width], gate[width:][:width]
        for c in range(width):
            g = dt * sigmoid(in_z[c] + of_z[c])
            gate_z[c], gate_y[c] = g, dt * sigmoid(in_y[c] + of_y[c])
            f[c] = tanh(in_f[c] + of_f[c])
            new[c] = old[c] + g * (f[c] - old[c])


@compiled()
def lem_new_y(t, q, steps, gates, psi, ys):
    """q: (B, D), from the z of the step.  Writes psi and y."""
    width = psi.shape[2]
    for b in range(q.shape[0]):
        old, new, f, row = ys[t, b], ys[t + 1, b], psi[t, b], q[b]
        of_y, gate = steps[t, b][3 * width :][:width], gates[t, b][width:][:width]
        for c in range(width):
            f[c] = tanh(row[c] + of_y[c])
            new[c] = old[c] + gate[c] * (f[c] - old[c])


@compiled()
def lem_d_y(t, dh, dy, psi, ys, gates, d_steps, dt):
    """Takes dh_t in; writes the d of psi's and of y's gate's input; dy is then what y passes on."""
    width = psi.shape[2]
    for b in range(dy.shape[0]):
        old, f, d_in, d = ys[t, b], psi[t, b], dh[t, b], dy[b]
        gate, of_gate = gates[t, b][width:][:width], d_steps[t, b][width:][:width]
        of_f = d_steps[t, b][3 * width :][:width]
        for c in range(width):
            whole, g = d[c] + d_in[c], gate[c]
            of_f[c] = whole * g * (ONE - f[c] * f[c])
            of_gate[c] = whole * (f[c] - old[c]) * g * (ONE - g / dt)
            d[c] = whole * (ONE - g)


@compiled()
def lem_d_z(t, dz, phi, zs, gates, d_steps, dt):
    """Writes the d of phi's and of z's gate's input; dz is then what z passes on."""
    width = phi.shape[2]
    for b in range(dz.shape[0]):
        old, f, d = zs[t, b], phi[t, b], dz[b]
        gate, of_gate = gates[t, b][:width], d_steps[t, b][:width]
        of_f = d_steps[t, b][2 * width :][:width]
        for c in range(width):
            g = gate[c]
            of_f[c] = d[c] * g * (ONE - f[c] * f[c])
            of_gate[c] = d[c] * (f[c] - old[c]) * g * (ONE - g / dt)
            d[c] = d[c] * (ONE - g)


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """Threads do not survive a fork."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def run(kernel: Callable, batch: int, width: int, *arguments: Tensor | bool) -> None:
    """The kernel over every row of a batch and block of channels."""
    block = BLOCK
    while block > NARROWEST and batch * -(-width // block) < torch.get_num_threads():
        block //= 2
    _share_out(kernel, batch * -(-width // block), block, *arguments)


def run_rows(kernel: Callable, rows: int, block: int, *arguments: Tensor) -> None:
    """The kernel over every block of rows."""
    _share_out(kernel, -(-rows // block), block, *arguments)


def _share_out(kernel: Callable, jobs: int, block: int, *arguments: Tensor | bool) -> None:
    """The jobs 0 .. jobs - 1 of a kernel, on torch's number of threads."""
    global _pool
    threads = torch.get_num_threads()
    arrays = [array(x) if isinstance(x, Tensor) else x for x in arguments]
    borders = [jobs * i // threads for i in range(threads + 1)]
    shares = [(s, e) for s, e in zip(borders, borders[1:], strict=False) if s < e]
    if len(shares) > 1 and _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count())
    others = [_pool.submit(kernel, *arrays, block, *share) for share in shares[1:]]
    for share in shares[:1]:
        kernel(*arrays, block, *share)
    for other in others:
        other.result()


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory; bfloat16, which numpy does not have, as 16 bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
