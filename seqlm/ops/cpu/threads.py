"""How a loop is called: its jobs are shared out to as many threads as PyTorch has.

A job is a block of channels of one row of the batch (the scans), some rows of the batch (dense LEM
and CfC), or a block of rows.  Loops do not hold Python's lock, so that they run side by side.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import part

WIDEST, NARROWEST = 512, 16  # channels of a job, at most and at least

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """Threads do not survive a fork."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def run_channels(loop: Callable[..., Any], state: Tensor, *arguments: Tensor | float) -> None:
    """The loop over every row of the batch and block of channels; state: (B, ..., H)."""
    batch, width = len(state), state.shape[-1]
    block = WIDEST
    while block > NARROWEST and batch * -(-width // block) < torch.get_num_threads():
        block //= 2
    _share_out(loop, batch * -(-width // block), block, *arguments)


@part()
def channels_of(job, width, block):
    """A job of `run_channels`: its row of the batch, its first channel, and how many it has."""
    blocks = (width + block - 1) // block
    start = job % blocks * block
    return job // blocks, start, min(block, width - start)


def run_batch(loop: Callable[..., Any], batch: int, *arguments: Tensor | float) -> None:
    """The loop over the rows of a batch, as many at once as give every thread its share."""
    block = max(1, -(-batch // torch.get_num_threads()))
    _share_out(loop, -(-batch // block), block, *arguments)


def run_rows(loop: Callable[..., Any], rows: int, block: int, *arguments: Tensor) -> None:
    """The loop over every block of rows."""
    _share_out(loop, -(-rows // block), block, *arguments)


def _share_out(loop: Callable[..., Any], jobs: int, block: int, *arguments: Tensor | float) -> None:
    """Run loop(*arguments, block, first, end) for the jobs 0 .. jobs - 1, split between threads."""
    threads = torch.get_num_threads()
    arrays = [_argument(x) for x in arguments]
    borders = [jobs * i // threads for i in range(threads + 1)]
    shares = [(s, e) for s, e in pairwise(borders) if s < e]
    others = [_threads().submit(loop, *arrays, block, *share) for share in shares[1:]]
    for share in shares[:1]:  # by this thread; there is none where there are no jobs
        loop(*arrays, block, *share)
    for other in others:
        other.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count())
    return _pool


def _argument(x: Tensor | float | int | bool) -> np.ndarray | np.float32 | int | bool:
    """A tensor's memory as an array; bfloat16, which numpy does not have, as its 16 bits."""
    if not isinstance(x, Tensor):
        return np.float32(x) if isinstance(x, float) else x
    tensor = x.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
