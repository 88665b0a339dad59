"""A piece of work in a process of its own, that none meets the memory or settings another left."""

import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


def spawned(
    work: Callable[..., None], *arguments: Any, daemon: bool
) -> tuple[BaseProcess, Connection]:
    """A process that runs work(connection, *arguments), and the other end of its connection.

    Ctrl-C is for the process that asked: this one ends by the closed connection.  daemon: it is
    killed where the process that asked ends without waiting for it.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=daemon)
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, interrupted)
    theirs.close()
    return process, ours
