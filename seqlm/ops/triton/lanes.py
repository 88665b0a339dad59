"""Lanes: a lane is one channel of one row of the batch, and independent of all other lanes.

A lane computes one time step after the other.  It loads the inputs of UNROLL steps before it
computes the first of them, which is possible because inputs do not depend on the state: the kernel
then waits for memory once every UNROLL steps.
"""

# B batch, T time, H state width

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.triton.launch import launch

# Channels of a program.  A kernel that mostly computes has one channel a thread; one that mostly
# waits for memory has two, because 64 numbers of bfloat16 are a full memory transfer.
COMPUTING, LOADING = 32, 64


@triton.jit
def lanes(H, BLOCK: tl.constexpr):
    """The program's row of the batch, its channels, and the mask of the channels below H."""
    tiles = tl.cdiv(H, BLOCK)
    program = tl.program_id(0)
    channels = program % tiles * BLOCK + tl.arange(0, BLOCK)
    return (program // tiles).to(tl.int64), channels, channels < H


def run_lanes(kernel: Any, state: Tensor, time: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel that computes all T steps of its lanes; state: (B, ..., H)."""
    width = state.shape[-1]
    constants |= dict(BLOCK=block_of(width, COMPUTING), UNROLL=unroll(8, time))
    launch(kernel, (programs_of(state, COMPUTING),), *arguments, time, width, **constants)


def run_chunks(
    kernel: Any, state: Tensor, chunks: tuple[int, int, int], *arguments: Any, steps: int = 8,
    **constants: Any,
) -> None:  # fmt: skip
    """Run a kernel for every lane of a state (B, ..., H), in chunks of time that run side by side.

    chunks: T, the steps of a chunk, and the number of chunks.
    steps: the most steps that a program loads together.
    """
    (time, length, count), width = chunks, state.shape[-1]
    constants |= dict(BLOCK=block_of(width, LOADING), UNROLL=unroll(steps, length))
    launch(kernel, (programs_of(state), count), *arguments, time, width, length, **constants)


def block_of(width: int, channels: int) -> int:
    """BLOCK: the channels of a program, at most `channels`."""
    return min(channels, triton.next_power_of_2(width))


def unroll(steps: int, time: int) -> int:
    """UNROLL: the steps whose inputs are loaded together, at most `steps`."""
    return min(steps, triton.next_power_of_2(time))


def programs_of(state: Tensor, channels: int = LOADING) -> int:
    """The number of programs that together have all lanes of a state (B, ..., H)."""
    width = state.shape[-1]
    return len(state) * triton.cdiv(width, block_of(width, channels))
