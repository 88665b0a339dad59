"""Functions of tensors recorded as CUDA graphs: what they launch, launched at once.

A step of a small model, or of a recurrence that goes step by step, is many short kernels, and a GPU
waits for each of them to be launched.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from seqlm.runtime import recording

MOST = 64  # shapes that one function is recorded for; others run as they come
Function = Callable[..., tuple[Tensor, ...]]
Shapes = tuple[torch.Size, ...]
Recording = tuple[tuple[Tensor, ...], torch.cuda.CUDAGraph, tuple[Tensor, ...]]


def recorded(function: Function, device: torch.device) -> Function:
    """The function, recorded where it runs on a GPU, unless that is off."""
    return Recorded(function) if device.type == "cuda" and recording() else function


class Recorded:
    """A function that takes and gives tensors, recorded for each shape of them and then replayed.

    What it gives is its own memory, which the next call overwrites.  A recording reads tensors from
    where they were when it was made, and all that is not a tensor as it was: what changes from call
    to call is to be given, or to be changed in place.  changed: tensors that the function itself
    changes, which it does once a call, and not while it is recorded.
    A function that waits for the GPU, or does something else that cannot be recorded, runs as it
    is; a RuntimeWarning says why.
    """

    def __init__(self, function: Function, changed: Sequence[Tensor] = ()):
        self.function, self.changed = function, changed
        self.recordings: dict[Shapes, Recording] = {}
        self.pool: Any = None  # the memory of all, as no two run side by side
        self.failed = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recordings and not self.failed and len(self.recordings) < MOST:
            self._try(shapes, inputs)
        if shapes not in self.recordings:  # nor what a failed attempt had in memory
            return self.function(*inputs)
        own, graph, outputs = self.recordings[shapes]
        if own:
            torch._foreach_copy_(own, inputs)
        graph.replay()
        return outputs

    def _try(self, shapes: Shapes, inputs: tuple[Tensor, ...]) -> None:
        try:
            self.recordings[shapes] = self._record(inputs)
        except RuntimeError as error:  # torch's own: what waits, memory, the driver
            self.failed = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            text = f"Not recorded as a CUDA graph, so slower: {reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording:
        """Its inputs, the graph that runs on them, and what it then gives."""
        own = tuple(x.clone() for x in inputs)
        before = [x.clone() for x in self.changed]
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(gpus):  # random numbers are not used up, either
                graph, outputs = record(lambda: self.function(*own), self.pool)
        finally:
            for x, old in zip(self.changed, before, strict=True):
                x.copy_(old)
        self.pool = graph.pool()
        return own, graph, outputs


def record(
    run: Callable[[], tuple[Tensor, ...]], pool: Any
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The graph of a run, in the memory of a pool, or of one of its own; and what it gives.

    It runs twice before: first to compile what it launches, then to find out whether it waits for
    the GPU, which would leave a recording half-made.
    """
    here, stream = torch.cuda.current_stream(), _stream()
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            run()
            with _no_waiting():
                run()
    finally:
        here.wait_stream(stream)  # also for what was begun of a run that failed
    graph = torch.cuda.CUDAGraph()
    try:
        # other threads, as that of NCCL, may ask for what is not recorded
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            outputs = run()
    finally:
        torch.cuda.set_stream(here)  # which torch leaves to another if that fails
    return graph, outputs


@cache
def _stream() -> torch.cuda.Stream:
    """One for all recordings: what is free in a pool's memory is so for its stream alone."""
    return torch.cuda.Stream()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Waiting for the GPU is an error in the block."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")  # is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
