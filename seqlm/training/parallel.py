"""Several processes that train one model, as torchrun starts them: which one this is, what it reads
of a batch, and what they tell each other.

N processes take the steps of one, to rounding: the N x train.accumulate micro-batches of a step are
dealt among them, and gradients are summed before they are used.  They are summed here, in one
message, and not by DistributedDataParallel, which takes a mean and wants as many micro-batches in
every process; documents make more of them in one than in another.  One process alone is the case in
which nothing is to be told: torch.distributed is left as it is.
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

# for one that hangs; one that ends is noticed at once.  The others wait while the writer validates
TIMEOUT = timedelta(minutes=30)
GRACE = 5  # seconds
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by torchrun
_rank, _world = 0, 1


@contextmanager
def joined() -> Iterator[None]:
    """Connect the processes that torchrun started for the time of the block; one process that was
    started alone runs the block as it is.

    Each process takes the GPU of its number on its machine, if there are as many.  All share the
    folders.  The processes leave the block together: torchrun stops the others when one of them
    fails at its end, and the writer may still be evaluating then.  An error ends the connection at
    once, and the other processes raise PeerLost.
    """
    global _rank, _world
    world = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in TOLD) else 1
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
            time.sleep(GRACE)  # torchrun ends this process meanwhile if the writer fails likewise
        raise
    finally:
        if together:
            dist.destroy_process_group()
        else:  # destroying could wait for the others while they wait for this process
            dist.distributed_c10d._abort_process_group()
        _rank, _world = 0, 1


def _connect() -> None:
    """Create the process group.

    Its threads have to end before Python does: a thread that drops its last tensors while Python
    shuts down needs Python's lock, is ended by Python in the middle of a C++ destructor, and takes
    the process with it (SIGABRT).  The threads end when the last reference to the group is gone.
    torch.distributed.nn.functional keeps the group of the moment at which it is imported, as the
    default of its arguments, and torch imports it on its own in the first step of training.  It is
    therefore imported here, before there is a group.
    """
    import torch.distributed.nn.functional

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _answered():
        dist.init_process_group(backend, timeout=TIMEOUT)
        # a barrier: a process that fails at once would be gone while others still connect to it
        dist.all_reduce(torch.zeros(1))


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def rank() -> int:
    return _rank


def world() -> int:
    """The number of processes N."""
    return _world


def is_writer() -> bool:
    """Whether this is the one process that writes files and speaks."""
    return _rank == 0


def refuse_unequal(batch: int, accumulate: int, device: str) -> None:
    """Raises UsageError where the processes cannot share the batch, or the GPUs, evenly."""
    if batch % (_world * accumulate):
        raise UsageError(
            f"train.batch is {batch}; {_world} processes with train.accumulate {accumulate} take "
            f"equal shares of it. Give --batch a multiple of {_world * accumulate}, or start "
            "another number of processes."
        )
    gpus = torch.cuda.device_count()
    if _world > 1 and (device == "mps" or (device == "cuda" and _local_rank() >= gpus)):
        raise UsageError(
            f"Every process needs a GPU of its own, and there are {max(1, gpus)} of {device} here. "
            f"Start with --nproc-per-node {max(1, gpus)}, or train with --device cpu."
        )


def dealt(batch: int, accumulate: int) -> np.ndarray:
    """(B / N,) the streams of a batch that this process reads: in every turn of the N processes
    each takes one of the N x accumulate micro-batches."""
    return np.arange(batch).reshape(accumulate, _world, -1)[:, _rank].reshape(-1)


def gathered(rows: Tensor, accumulate: int) -> Tensor:
    """(B / N, ...) of the streams that were `dealt` -> (B, ...) of all, in order."""
    if _world == 1:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(_world)]
    with _answered():
        dist.all_gather(parts, rows)
    return torch.stack([part.unflatten(0, (accumulate, -1)) for part in parts], 1).flatten(0, 2)


def sum_(tensors: Sequence[Tensor]) -> None:
    """Every tensor becomes its sum over the processes, equal in all of them."""
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
    """The largest of each number over the processes: 1 for a flag that any process raises.

    Also a barrier.
    """
    return _reduced(numbers, dist.ReduceOp.MAX)


def of_writer(number: float) -> float:
    """The writer's number, in every process."""
    return total(number if is_writer() else 0)[0]


@contextmanager
def writer_first() -> Iterator[None]:
    """The block in the writer, then in the others, who find what it made."""
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
    """Raises PeerLost for a message that nobody answers."""
    try:
        yield
    except RuntimeError as error:  # of gloo, nccl and the store alike
        # the variables of torch's functions refer to the group: see _connect
        traceback.clear_frames(error.__traceback__)
        raise PeerLost(
            "Another process of this training ended, or does not answer. See what it said; the "
            "last saved step is intact: start all processes again, with --resume."
        ) from error
