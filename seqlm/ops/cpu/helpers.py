"""The threads that run a program: the caller, and helpers that wait for the next call for a while.

A generated character takes a fraction of a millisecond, and waking a thread takes about as long.
So a helper polls for the next call without a pause, and sleeps after a millisecond without one.
The caller runs the program with the helpers that are ready, or alone, and never waits for others.
"""

import os
from functools import cache
from threading import Lock, Semaphore, Thread

import numpy as np
import torch

from seqlm.ops.cpu.program import ABSENT, LINE, NONE_READY, WAKING, run

MOST_THREADS = 8
# On a busy machine the system may run another program instead of a helper, and the caller polls for
# milliseconds until the helper is done.  FAIR polls in a call, about 0.3 ms, are what helpers save.
# More are added to `excess`, fewer are subtracted, and waking helpers that are not ready in time
# counts as IN_VAIN.  Above MOST_EXCESS, about 20 ms, the caller works alone until `excess` is below
# it again; each such call subtracts FAIR.
FAIR, IN_VAIN, MOST_EXCESS = 1 << 18, 3 << 18, 1 << 24


class Helpers:
    """Runs programs, one at a time; a second caller at the same time works alone."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.shared = np.zeros(LINE * (1 + MOST_THREADS), dtype=np.int64)
        self.states = self.shared[LINE::LINE]  # what each helper does; the first is the caller
        self.semaphores: list[Semaphore] = []
        self.excess = 0  # polls

    def run(self, program: int, constants: int, length: int) -> bool:
        """Run a program, given by addresses; returns whether all its symbols exist."""
        helpers = 0
        if (wanted := threads()) > 1 and self.lock.acquire(blocking=False):
            try:
                helpers = self._helpers(wanted - 1)
                known, polls = run(self.shared.ctypes.data, 0, helpers, program, constants, length)
                lost = IN_VAIN if polls == NONE_READY else polls
                self.excess = max(0, self.excess + lost - FAIR)
                return bool(known)
            finally:
                self.lock.release()
        known, _ = run(self.shared.ctypes.data, 0, 0, program, constants, length)
        return bool(known)

    def _helpers(self, wanted: int) -> int:
        """The number of helpers to call; wakes those that sleep, for the next call."""
        if self.excess > MOST_EXCESS:
            return 0
        for helper in range(1, wanted + 1):
            if len(self.semaphores) < helper:
                self.semaphores.append(Semaphore(0))
                Thread(target=self._help, args=(helper,), daemon=True).start()
            if self.states[helper] == ABSENT:
                self.states[helper] = WAKING
                self.semaphores[helper - 1].release()
        return wanted

    def _help(self, helper: int) -> None:
        while True:
            self.semaphores[helper - 1].acquire()
            run(self.shared.ctypes.data, helper, 0, 0, 0, 0)


def threads() -> int:
    """As many as PyTorch has, but no more than there are processors for this process."""
    wanted = torch.get_num_threads()
    return 1 if wanted == 1 else min(wanted, _processors(), MOST_THREADS)


@cache
def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_helpers = Helpers()


def helpers() -> Helpers:
    return _helpers


def _forget_helpers() -> None:
    """Threads do not survive a fork."""
    global _helpers
    _helpers = Helpers()


os.register_at_fork(after_in_child=_forget_helpers)
