"""The threads that run a program: the caller, and helpers that wait for the next call for a while.

A generated character takes a fraction of a millisecond, and waking a thread takes about as long.
So a helper looks for the next call without a pause, and sleeps after a millisecond without one.
The caller runs the program with the helpers that are ready, or alone, and never waits for others.
"""

import os
from functools import cache
from threading import Lock, Semaphore, Thread

import numpy as np
import torch

from seqlm.ops.cpu.program import ABSENT, LINE, NONE_READY, WAKING, run

MOST_THREADS = 8
# On a busy machine the system may run another program instead of a helper, and the caller waits for
# milliseconds.  A call may wait FAIR looks, about 0.3 ms, which helpers save.  Longer waits add up,
# and waking helpers in vain counts, too.  Above MOST_OWED, about 20 ms, calls are made alone until
# they have made up for it.
FAIR, IN_VAIN, MOST_OWED = 1 << 18, 3 << 18, 1 << 24


class Team:
    """Runs programs, one at a time; a second caller at the same time works alone."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.board = np.zeros(LINE * (1 + MOST_THREADS), dtype=np.int64)
        self.states = self.board[LINE::LINE]  # what each helper does; the first is the caller
        self.semaphores: list[Semaphore] = []
        self.owed = 0  # looks

    def run(self, program: int, constants: int, length: int) -> bool:
        """Run a program, given by addresses; returns whether all its symbols exist."""
        helpers = 0
        if (wanted := threads()) > 1 and self.lock.acquire(blocking=False):
            try:
                helpers = self._helpers(wanted - 1)
                known, looks = run(self.board.ctypes.data, 0, helpers, program, constants, length)
                lost = IN_VAIN if looks == NONE_READY else looks
                self.owed = max(0, self.owed + lost - FAIR)
                return bool(known)
            finally:
                self.lock.release()
        known, _ = run(self.board.ctypes.data, 0, 0, program, constants, length)
        return bool(known)

    def _helpers(self, wanted: int) -> int:
        """The number of helpers to call; wakes those that sleep, for the next call."""
        if self.owed > MOST_OWED:
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
            run(self.board.ctypes.data, helper, 0, 0, 0, 0)


def threads() -> int:
    """As many as PyTorch has, but no more than there are processors for this process."""
    wanted = torch.get_num_threads()
    return 1 if wanted == 1 else min(wanted, _processors(), MOST_THREADS)


@cache
def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_team = Team()


def team() -> Team:
    return _team


def _forget_team() -> None:
    """Threads do not survive a fork."""
    global _team
    _team = Team()


os.register_at_fork(after_in_child=_forget_team)
