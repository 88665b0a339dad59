"""Work in a process of its own, so that pieces of work cannot affect each other's memory."""

import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


def spawn(
    work: Callable[..., None], *arguments: Any, daemon: bool
) -> tuple[BaseProcess, Connection]:
    """Start a process that runs work(connection, *arguments).

    Returns the process and this end of its connection.  The new process ignores Ctrl-C: it ends
    when this process closes the connection.  daemon: the process is killed when this one exits.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=daemon)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, handler)
    theirs.close()
    return process, ours
