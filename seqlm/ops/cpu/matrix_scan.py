"""The matrix scan in float32, step by step.  Keeps the inputs and the state before each chunk; the
backward pass computes the states within a chunk again."""

# B batch, T time, H heads, K key width, V value width, N chunks

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import REASSOCIATED, compiled
from seqlm.ops.cpu.numbers import F32, exp, fill, load
from seqlm.ops.cpu.threads import run_rows
from seqlm.ops.states import Tensors

LENGTH = 16  # steps of a chunk


def serves(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor) -> bool:
    return q.shape[1] > 1  # for one step, PyTorch's operations take half the time of the threads


def forward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor) -> tuple[Tensors, Tensors]:
    inputs = [x.float().contiguous() for x in (q, k, v, log_a)]
    batch, time, heads = v.shape[:3]
    o, last = torch.empty_like(inputs[2]), S0.clone(memory_format=torch.contiguous_format)
    starts = S0.new_empty(batch, -(-time // LENGTH), *S0.shape[1:])
    run_rows(matrix_forward, batch * heads, 1, *inputs, last, starts, o)
    return (o.to(v.dtype), last), (q, k, v, log_a, starts)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    *given, starts = saved
    do, d_last = gradients
    inputs = [x.float().contiguous() for x in given]
    d_inputs = [torch.empty_like(x) for x in inputs]
    dS = d_last.clone(memory_format=torch.contiguous_format)
    rows = len(do) * do.shape[2]
    run_rows(matrix_backward, rows, 1, *inputs, starts, do.float().contiguous(), *d_inputs, dS)
    return *(d.to(x.dtype) for d, x in zip(d_inputs, given, strict=True)), dS


@compiled()
def matrix_forward(q, k, v, log_a, last, starts, o, block, first, end):
    """Writes o: (B, T, H, V), and starts: (B, N, H, K, V), the state before each chunk.

    In place: last, (B, H, K, V), holds the first state, then the last.  A job is one head of one
    row of the batch.
    """
    time, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    each = log_a.shape[3] > 1  # a decay for each key, or one for the head
    for job in range(first, end):
        b, h = job // heads, job % heads
        S = last[b, h]
        for t in range(time):
            if t % LENGTH == 0:
                start = starts[b, t // LENGTH, h]
                for i in range(keys):
                    load(start[i], S[i])
            out, new = o[b, t, h], v[b, t, h]
            fill(out, F32(0))
            a = exp(log_a[b, t, h, 0])
            for i in range(keys):
                if each:
                    a = exp(log_a[b, t, h, i])
                q_i, k_i, s = q[b, t, h, i], k[b, t, h, i], S[i]
                for j in range(values):
                    s[j] = a * s[j] + k_i * new[j]
                    out[j] += q_i * s[j]


@compiled(fastmath=REASSOCIATED)
def matrix_backward(q, k, v, log_a, starts, do, dq, dk, dv, d_log_a, dS0, block, first, end):
    """Writes dq, dk, dv and d_log_a.  In place: dS0, (B, H, K, V), holds dL/d(last state), then
    dL/dS0; between steps, the complete dL/dS_t.  do: dL/do_t."""
    time, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    each = log_a.shape[3] > 1  # a decay for each key, or one for the head
    states = np.empty((LENGTH, keys, values), F32)  # the state before each step of a chunk
    for job in range(first, end):
        b, h = job // heads, job % heads
        dS = dS0[b, h]
        for n in range(starts.shape[1] - 1, -1, -1):
            begin, stop = n * LENGTH, min((n + 1) * LENGTH, time)
            for i in range(keys):
                load(states[0, i], starts[b, n, h, i])
            for t in range(begin, stop - 1):
                new, a = v[b, t, h], exp(log_a[b, t, h, 0])
                for i in range(keys):
                    if each:
                        a = exp(log_a[b, t, h, i])
                    k_i, s, later = k[b, t, h, i], states[t - begin, i], states[t - begin + 1, i]
                    for j in range(values):
                        later[j] = a * s[j] + k_i * new[j]
            for t in range(stop - 1, begin - 1, -1):
                new, d_new, d_out = v[b, t, h], dv[b, t, h], do[b, t, h]
                fill(d_new, F32(0))
                along_v, d_head = F32(0), F32(0)
                for j in range(values):
                    along_v += new[j] * d_out[j]
                a = exp(log_a[b, t, h, 0])
                for i in range(keys):
                    if each:
                        a = exp(log_a[b, t, h, i])
                    q_i, k_i, s, d = q[b, t, h, i], k[b, t, h, i], states[t - begin, i], dS[i]
                    d_q, d_k, d_a = F32(0), F32(0), F32(0)
                    # three loops, because the compiler vectorises a loop over few arrays only
                    for j in range(values):
                        d_q += s[j] * d_out[j]
                    for j in range(values):
                        d[j] += q_i * d_out[j]
                        d_k += d[j] * new[j]
                    for j in range(values):
                        d_a += d[j] * s[j]
                        d_new[j] += k_i * d[j]
                        d[j] *= a
                    dq[b, t, h, i] = a * d_q + k_i * along_v  # from S_t, which is not kept
                    dk[b, t, h, i] = d_k
                    d_head += a * d_a
                    if each:
                        d_log_a[b, t, h, i] = a * d_a
                if not each:
                    d_log_a[b, t, h, 0] = d_head
