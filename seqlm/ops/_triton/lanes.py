"""Lanes: a lane is one channel of one row of the batch, which no other lane has to do with.

It goes through time step by step, as the equations do.  Of UNROLL steps at a time it asks for all
that memory has to send before it uses the first, as what is sent does not depend on the state.
"""

# B batch, T time, H state width

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops._triton.launch import launch

FEW = 32  # channels of a program whose steps take longer than what they read: one a thread
MOST = 64  # channels of a program: two a thread, of which bfloat16 fill a bus' transfer


@triton.jit
def lanes(H, BLOCK: tl.constexpr):
    """The program's row of the batch, its channels, and which of them there are."""
    tiles = tl.cdiv(H, BLOCK)
    program = tl.program_id(0)
    c = program % tiles * BLOCK + tl.arange(0, BLOCK)
    return (program // tiles).to(tl.int64), c, c < H


def run(kernel: Any, state: Tensor, time: int, *arguments: Any, **constants: Any) -> None:
    """A kernel that takes its lanes step by step through all of time; state: (B, ..., H)."""
    width = state.shape[-1]
    constants |= dict(BLOCK=block_of(width, FEW), UNROLL=steps(8, time))
    launch(kernel, (programs_of(state, FEW),), *arguments, time, width, **constants)


def block_of(width: int, most: int = MOST) -> int:
    return min(most, triton.next_power_of_2(width))


def steps(most: int, time: int) -> int:
    """Steps that are asked of memory at once."""
    return min(most, triton.next_power_of_2(time))


def programs_of(state: Tensor, most: int = MOST) -> int:
    """Programs for the lanes of a state (B, ..., H)."""
    width = state.shape[-1]
    return len(state) * triton.cdiv(width, block_of(width, most))
