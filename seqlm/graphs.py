"""CUDA graphs: the kernels of a step are recorded once and then launched together.

A step of a small model, or of a recurrence that goes step by step, consists of many short kernels.
Launched one by one, each takes longer to launch than to run, so the GPU waits.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from seqlm.runtime import first_line, recording

MOST_SHAPES = 64  # shapes that one function is recorded for; others run unrecorded
# largest difference between a replay and the function, relative to a tensor's norm; only the order
# of sums should differ
TOLERANCE = 1e-2
Function = Callable[..., tuple[Tensor, ...]]
Shapes = tuple[torch.Size, ...]
Recording = tuple[tuple[Tensor, ...], torch.cuda.CUDAGraph, tuple[Tensor, ...]]


def recorded(function: Function, device: torch.device) -> Function:
    """The function, to be recorded if it runs on a GPU and the runtime records steps."""
    return Recorded(function) if device.type == "cuda" and recording() else function


class Recorded:
    """A function of tensors, recorded at its first call with each shape of inputs, then replayed.

    changed: tensors that the function changes in place, such as gradients.  Recording restores
    them, so each call changes them once.
    The outputs are memory of the recording, which the next call overwrites.  A recording keeps the
    addresses of all tensors and the values of everything else.  So whatever changes from call to
    call must be an input, or must be changed in place.
    Each new recording is tested: it is replayed once and compared with the function itself.  If the
    function cannot be recorded because it waits for the GPU, or if the replay differs, the function
    runs unrecorded from then on, and a RuntimeWarning gives the reason.
    """

    def __init__(self, function: Function, changed: Sequence[Tensor] = ()):
        self.function, self.changed = function, changed
        self.recordings: dict[Shapes, Recording] = {}
        self.pool: Any = None  # memory that all recordings share, since no two run at once
        self.failed = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recordings and not self.failed and len(self.recordings) < MOST_SHAPES:
            self._try(shapes, inputs)
        # outside the except block of _try, so that the memory of a failed attempt is freed
        if shapes not in self.recordings:
            return self.function(*inputs)
        copies, graph, outputs = self.recordings[shapes]
        if copies:
            torch._foreach_copy_(copies, inputs)
        graph.replay()
        return outputs

    def _try(self, shapes: Shapes, inputs: tuple[Tensor, ...]) -> None:
        try:
            self.recordings[shapes] = self._record(inputs)
        except RuntimeError as error:  # from torch, or from refuse_difference
            self.failed = True
            text = f"Not recorded as a CUDA graph, so slower: {first_line(error)}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording:
        """The recording's own inputs, its graph, and its outputs; RuntimeError if it is wrong."""
        copies = tuple(x.clone() for x in inputs)
        before = [x.clone() for x in self.changed]
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(gpus):  # recording must not use up random numbers
                graph, outputs = record(lambda: self.function(*copies), self.pool)
            self._restore(before)
            # with other inputs, because the memory may still hold the right results for these
            others = [_other(x) for x in inputs]
            with torch.random.fork_rng(gpus):
                right = [x.clone() for x in (*self.function(*others), *self.changed)]
            self._restore(before)
            if copies:
                torch._foreach_copy_(copies, others)
            with torch.random.fork_rng(gpus):
                graph.replay()
            refuse_difference([*outputs, *self.changed], right)
        finally:
            self._restore(before)
        self.pool = graph.pool()
        return copies, graph, outputs

    def _restore(self, before: list[Tensor]) -> None:
        for x, old in zip(self.changed, before, strict=True):
            x.copy_(old)


def _other(x: Tensor) -> Tensor:
    """A different legal input like x: a doubled number, or x with its last dimension rotated."""
    return x.roll(1, -1) if x.ndim else 2 * x


def refuse_difference(replayed: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Raises RuntimeError if a replay gave other numbers than the function itself."""
    for x, y in zip(replayed, right, strict=True):
        finite = y.isfinite()
        same = torch.equal(x.isfinite(), finite)
        x, y = (z.double().nan_to_num(0, 0, 0) for z in (x, y))
        if not same or not (x - y).norm() <= TOLERANCE * y.norm() + 1e-30:
            raise RuntimeError("its replay gave other numbers than the step itself")


def record(
    run: Callable[[], tuple[Tensor, ...]], pool: Any
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """Record a run; returns its graph and its outputs.  pool: the memory to use; None: new memory.

    `run` is called twice before it is recorded: first to compile its kernels, then to find out
    whether it waits for the GPU, which would make the recording fail.
    """
    here, stream = torch.cuda.current_stream(), _stream()
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            run()
            with _no_waiting():
                run()
    finally:
        here.wait_stream(stream)  # also after an error: some of the run's kernels may be running
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: other threads, such as NCCL's, may call functions that cannot be recorded
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            outputs = run()
    finally:
        torch.cuda.set_stream(here)  # torch does not do this after an error
    return graph, outputs


@cache
def _stream() -> torch.cuda.Stream:
    """One stream for all recordings, because a memory pool frees memory only for its own stream."""
    return torch.cuda.Stream()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Make waiting for the GPU an error in the block."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            # torch warns that this mode is a prototype
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
