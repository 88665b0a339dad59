"""Several processes, started by torchrun, that train one model: their shares, sums and barriers.

N processes take the same steps as one process, up to rounding.  A step has N x train.accumulate
micro-batches; each process computes its share of them, and the gradients are summed over all
processes before they are used.  They are summed here, in one message.  DistributedDataParallel
would take a mean, and needs the same number of micro-batches in every process; over documents the
numbers differ.  A single process never uses torch.distributed.
"""

# N processes, B batch

import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from seqlm.errors import PeerLost, SeqlmError, UsageError

# only for a process that hangs, since one that ends is noticed at once; longer than a validation,
# because the others wait while the writer validates
TIMEOUT = timedelta(minutes=30)
GRACE = 5  # seconds that the writer has to report an error before another process reports it
# the environment variables that torchrun sets
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_rank, _world = 0, 1


@contextmanager
def joined() -> Iterator[None]:
    """Connect the processes that torchrun started, during the block.

    Each process uses the GPU with its local rank, if there is one.  All processes see the same
    folders.  They leave the block together.  Otherwise a process that ends with an error code could
    make torchrun stop the writer while it evaluates.  An error closes the connection at once, and
    the other processes raise PeerLost.  Without torchrun the block just runs.
    """
    global _rank, _world
    world = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in TORCHRUN) else 1
    if world == 1:
        yield
        return
    if _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())
    _connect()
    _rank, _world = dist.get_rank(), world
    together = False
    try:
        yield
        largest(0)  # a barrier
        together = True
    except SeqlmError as error:
        if not is_writer() and not isinstance(error, PeerLost):
            # if the writer has the same error, torchrun ends this process before it reports it too
            time.sleep(GRACE)
        raise
    finally:
        if together:
            dist.destroy_process_group()
        else:  # destroying could wait for the others while they wait for this process
            dist.distributed_c10d._abort_process_group()
        _rank, _world = 0, 1


def _connect() -> None:
    """Create the process group.

    The group's threads must end before Python does.  A thread that frees tensors while Python shuts
    down is killed inside a C++ destructor, and that aborts the process (SIGABRT).  The threads end
    when the last reference to the group is dropped.  torch.distributed.nn.functional would keep
    one, because the group that exists when it is imported becomes the default of its arguments, and
    torch imports it in the first training step.  So it is imported here, before a group exists.
    """
    import torch.distributed.nn.functional

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _answered():
        dist.init_process_group(backend, timeout=TIMEOUT)
        # a barrier: a process that fails early would otherwise end while others connect to it
        dist.all_reduce(torch.zeros(1))


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def rank() -> int:
    return _rank


def world() -> int:
    """The number of processes N."""
    return _world


def is_writer() -> bool:
    """Whether this is the process that writes files and prints."""
    return _rank == 0


def refuse_unequal(batch: int, accumulate: int, device: str) -> None:
    """Raises UsageError if the batch or the GPUs cannot be shared evenly by the processes."""
    if batch % (_world * accumulate):
        raise UsageError(
            f"train.batch is {batch}, but {_world} processes with train.accumulate {accumulate} "
            f"need a multiple of {_world * accumulate}. Change --batch, or the number of processes."
        )
    gpus = torch.cuda.device_count()
    if _world > 1 and (device == "mps" or (device == "cuda" and _local_rank() >= gpus)):
        raise UsageError(
            f"Every process needs its own GPU, but this machine has {max(1, gpus)} ({device}). "
            f"Start with --nproc-per-node {max(1, gpus)}, or train with --device cpu."
        )


def local_streams(batch: int, accumulate: int) -> np.ndarray:
    """The streams of a batch that this process reads: (B / N,).

    The N x accumulate micro-batches are consecutive groups of streams.  The processes take turns,
    so process n has the groups n, n + N, n + 2N, ...
    """
    return np.arange(batch).reshape(accumulate, _world, -1)[:, _rank].reshape(-1)


def all_streams(rows: Tensor, accumulate: int) -> Tensor:
    """Rows for `local_streams`, (B / N, ...) -> the rows of all processes, in order, (B, ...)."""
    if _world == 1:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(_world)]
    with _answered():
        dist.all_gather(parts, rows)
    return torch.stack([part.unflatten(0, (accumulate, -1)) for part in parts], 1).flatten(0, 2)


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over the processes.  All processes get the same bits."""
    if _world == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _answered():
        dist.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def total(*numbers: float) -> list[float]:
    """The sum of each number over the processes."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def largest(*numbers: float) -> list[float]:
    """The largest of each number over the processes; for a flag, 1 if any process sets it.

    Also a barrier.
    """
    return _reduced(numbers, dist.ReduceOp.MAX)


def from_writer(number: float) -> float:
    """The number that the writer passes, in every process."""
    return total(number if is_writer() else 0)[0]


@contextmanager
def writer_first() -> Iterator[None]:
    """Run the block in the writer first, then in the other processes."""
    if not is_writer():
        largest(0)
    yield
    if is_writer():
        largest(0)


def _reduced(numbers: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    if _world == 1:
        return [*numbers]
    tensor = torch.tensor(numbers, dtype=torch.float64)
    with _answered():
        dist.all_reduce(tensor, how)
    return tensor.tolist()


@contextmanager
def _answered() -> Iterator[None]:
    """Raises PeerLost if a message fails, because another process ended or hangs."""
    try:
        yield
    except RuntimeError as error:  # gloo, nccl and the store all raise this
        # local variables in the traceback refer to the group, and would keep it alive: see _connect
        traceback.clear_frames(error.__traceback__)
        raise PeerLost(
            "Another process of this training ended, or does not answer. Read its error; the last "
            "saved step is intact, so start all processes again with --resume."
        ) from error
