"""Lanes: a lane is one channel of one row of the batch, and independent of all other lanes.

A lane goes through time step by step, as the equations do.  It loads the inputs of UNROLL steps
before it computes the first of them, which is possible because inputs do not depend on the state:
waiting for memory then happens once for UNROLL steps.
"""

# B batch, T time, H state width

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from seqlm.ops.triton.launch import launch

FEW = 32  # channels of a program that mostly computes: one a thread
MOST = 64  # channels of a program that mostly waits for memory: a full transfer of bfloat16


@triton.jit
def lanes(H, BLOCK: tl.constexpr):
    """The program's row of the batch, its channels, and which of them exist."""
    tiles = tl.cdiv(H, BLOCK)
    program = tl.program_id(0)
    c = program % tiles * BLOCK + tl.arange(0, BLOCK)
    return (program // tiles).to(tl.int64), c, c < H


def run_lanes(kernel: Any, state: Tensor, time: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel that takes its lanes through all T steps; state: (B, ..., H)."""
    width = state.shape[-1]
    constants |= dict(BLOCK=block_of(width, FEW), UNROLL=steps(8, time))
    launch(kernel, (programs_of(state, FEW),), *arguments, time, width, **constants)


def block_of(width: int, most: int = MOST) -> int:
    """BLOCK: the channels of a program."""
    return min(most, triton.next_power_of_2(width))


def steps(most: int, time: int) -> int:
    """UNROLL: the steps whose inputs are loaded together."""
    return min(most, triton.next_power_of_2(time))


def programs_of(state: Tensor, most: int = MOST) -> int:
    """Programs for the lanes of a state (B, ..., H)."""
    width = state.shape[-1]
    return len(state) * triton.cdiv(width, block_of(width, most))
