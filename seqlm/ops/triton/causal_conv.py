"""The depthwise convolution over time: one forward and one backward kernel, in chunks of time."""

# B batch, T time, D width, K kernel

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.states import Tensors
from seqlm.ops.triton.lanes import lanes, programs_of, run_chunks
from seqlm.ops.triton.numbers import mask_if, read, read_rows, write, write_rows

# Derived for an H100, not measured.  The memory bus is busy while 18 kB are in flight for each
# multiprocessor (3.35 TB/s in 0.7 us).  A program has 8 places of 64 channels in flight, 1 kB of
# bfloat16 or 2 kB of float32, for half of its time: so 16 to 32 programs on each of 132
# multiprocessors.  More programs would read more of the places before each chunk twice, and leave
# more partial sums to add.
PROGRAMS_WANTED = 16 * 132
SHORTEST_CHUNK = 16  # places in time
LONGEST_KERNEL = 16  # whose window, weights and sums fit into registers


def serves(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    width, kernel = len(weight), weight.shape[-1]
    if (weight.shape, x.shape[2:], bias.shape) != ((width, 1, kernel), (width,), (width,)):
        return False
    whole = weight.dtype == bias.dtype == torch.float32
    return whole and kernel <= min(x.shape[1], LONGEST_KERNEL)


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensors, Tensors]:
    """In x's dtype; sums are float32."""
    x, weight = x.contiguous(), weight.contiguous()
    (batch, places, width), kernel = x.shape, weight.shape[2]
    y = x.new_empty(batch, places - kernel + 1, width)
    run_chunks(conv_forward, y, chunks(y), x, weight, bias.contiguous(), y, K=kernel)
    return (y,), (x, weight)


def backward(saved: Tensors, gradients: Tensors) -> Tensors:
    (x, weight), (dy,) = saved, gradients
    (batch, _, width), kernel = x.shape, weight.shape[2]
    dx, cut = torch.empty_like(x), chunks(x)
    partial_sums = weight.new_empty(batch * cut[2], kernel + 1, width)
    run_chunks(conv_backward, x, cut, x, weight, dy.contiguous(), dx, partial_sums, K=kernel)
    *dw, db = partial_sums.sum(0)
    return dx, torch.stack(dw, 1).unsqueeze(1), db


def chunks(over: Tensor) -> tuple[int, int, int]:
    """The chunks of time of a tensor (B, T, D) as `run_chunks` takes them."""
    time, length = over.shape[1], chunk_length(over)
    return time, length, triton.cdiv(time, length)


def chunk_length(over: Tensor) -> int:
    """The places of a chunk of time, so that there are about as many programs as wanted."""
    time = over.shape[1]
    count = triton.cdiv(PROGRAMS_WANTED, max(programs_of(over), 1))
    return min(max(triton.cdiv(time, count), SHORTEST_CHUNK), time)


@triton.jit(do_not_specialize=["T", "length"])
def conv_forward(
    x, weight, bias, y, T, D, length,
    K: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y of a chunk of `length` places.  x: (B, K - 1 + T, D), weight: (D, K).

    Each place of x is read once: the window holds the last K - 1 places and the next UNROLL ones.
    """
    b, channels, inside = lanes(D, BLOCK)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, T)
    shift = read(bias, channels, inside)
    weights = read_rows(weight, channels * K, 1, inside, K)
    first = b * (T + K - 1)
    past = read_rows(x + (first + begin) * D, channels, D, inside, K - 1)
    for start in range(begin, end, UNROLL):
        window = past
        for i in tl.static_range(UNROLL):
            row = first + start + i + K - 1
            window += (read(x + row * D, channels, mask_if(inside, start + i < end)),)
        for i in tl.static_range(UNROLL):
            total = shift
            for k in tl.static_range(K):
                total += weights[k] * window[i + k]
            mask = mask_if(inside, start + i < end)
            write(y + (b * T + start + i) * D, channels, total, mask)
        past = window[UNROLL:]


@triton.jit(do_not_specialize=["places", "length"])
def conv_backward(
    x, weight, dy, dx, partial_sums, places, D, length,
    K: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dL/dx of a chunk of `length` of the places of x, (B, places, D).

    dy: dL/dy, (B, places - K + 1, D).  partial_sums: (B, chunks, K + 1, D), the chunk's summands of
    dL/d(weights) and, last, of dL/d(bias).
    """
    b, channels, inside = lanes(D, BLOCK)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, places)
    T = places - (K - 1)
    weights = read_rows(weight, channels * K, 1, inside, K)
    past, sums = (), ()
    for i in tl.static_range(K - 1):
        t = begin + i - (K - 1)
        past += (read(dy + (b * T + t) * D, channels, mask_if(inside, (t >= 0) & (t < T))),)
    for _ in tl.static_range(K + 1):
        sums += (tl.full((BLOCK,), 0.0, tl.float32),)
    for start in range(begin, end, UNROLL):
        window, xs = past, ()
        for i in tl.static_range(UNROLL):
            t = start + i
            mask = mask_if(inside, t < tl.minimum(end, T))
            window += (read(dy + (b * T + t) * D, channels, mask),)
            xs += (read(x + (b * places + t) * D, channels, mask_if(inside, t < end)),)
        new_sums = ()
        for k in tl.static_range(K):
            total = sums[k]
            for i in tl.static_range(UNROLL):
                total += window[i + K - 1 - k] * xs[i]
            new_sums += (total,)
        total = sums[K]
        for i in tl.static_range(UNROLL):
            total += window[i + K - 1]
        sums = new_sums + (total,)
        for i in tl.static_range(UNROLL):
            dx_t = tl.full((BLOCK,), 0.0, tl.float32)
            for k in tl.static_range(K):
                dx_t += weights[k] * window[i + K - 1 - k]
            mask = mask_if(inside, start + i < end)
            write(dx + (b * places + start + i) * D, channels, dx_t, mask)
        past = window[UNROLL:]
    to = (b * tl.num_programs(1) + tl.program_id(1)) * (K + 1)
    write_rows(partial_sums + to * D, channels, D, sums, inside)
