"""How a loop is called: its jobs are divided among as many threads as PyTorch has.

A job is a block of channels of one row of the batch (the scans), some rows of the batch (dense LEM
and CfC), or a block of rows.  Loops release Python's lock, so that threads run them in parallel.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqlm.ops.cpu.compile import inlined

MAX_CHANNELS, MIN_CHANNELS = 512, 16  # of a job

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """Threads do not survive a fork."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def run_channels(loop: Callable[..., Any], state: Tensor, *arguments: Tensor | float) -> None:
    """Run a loop over every row of the batch and block of channels; state: (B, ..., H)."""
    batch, width = len(state), state.shape[-1]
    block = MAX_CHANNELS
    while block > MIN_CHANNELS and batch * -(-width // block) < torch.get_num_threads():
        block //= 2
    _run_jobs(loop, batch * -(-width // block), block, *arguments)


@inlined()
def channels_of(job, width, block):
    """A job of `run_channels`: its row of the batch, its first channel, and how many it has."""
    blocks = (width + block - 1) // block
    start = job % blocks * block
    return job // blocks, start, min(block, width - start)


def run_batch(loop: Callable[..., Any], batch: int, *arguments: Tensor | float) -> None:
    """Run a loop over the rows of a batch, in one job for each thread."""
    block = max(1, -(-batch // torch.get_num_threads()))
    _run_jobs(loop, -(-batch // block), block, *arguments)


def run_rows(loop: Callable[..., Any], rows: int, block: int, *arguments: Tensor) -> None:
    """Run a loop over rows, in jobs of `block` rows."""
    _run_jobs(loop, -(-rows // block), block, *arguments)


def _run_jobs(loop: Callable[..., Any], jobs: int, block: int, *arguments: Tensor | float) -> None:
    """Run loop(*arguments, block, first, end) for the jobs 0 .. jobs - 1, split between threads."""
    threads = torch.get_num_threads()
    arrays = [_argument(x) for x in arguments]
    borders = [jobs * i // threads for i in range(threads + 1)]
    shares = [(s, e) for s, e in pairwise(borders) if s < e]
    others = [_threads().submit(loop, *arrays, block, *share) for share in shares[1:]]
    for share in shares[:1]:  # this thread's share; there is none where there are no jobs
        loop(*arrays, block, *share)
    for other in others:
        other.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count())
    return _pool


def _argument(x: Tensor | float | int | bool) -> np.ndarray | np.float32 | int | bool:
    """A tensor's memory as an array; bfloat16, which numpy lacks, as 16-bit integers."""
    if not isinstance(x, Tensor):
        return np.float32(x) if isinstance(x, float) else x
    tensor = x.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
