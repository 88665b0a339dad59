"""A kill at every file operation of a writer, in this process.

At its k-th operation the writer meets Killed, and every later operation meets it again.  So the
clean-up that an exception starts changes nothing on the disk, as after a real kill, and locks are
free, as after a real kill.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from seqlm import temporary

OPERATIONS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killed(BaseException):
    """The process is gone."""


class _Kill:
    """Lets so many operations through, and none after them."""

    def __init__(self, after: int):
        self.left = after

    def count(self) -> None:
        if self.left <= 0:
            raise Killed
        self.left -= 1

    def at(self, operation: Callable) -> Callable:
        def counted(*arguments, **options):
            self.count()
            return operation(*arguments, **options)

        return counted

    def at_open(self, operation: Callable) -> Callable:
        def counted(path, flags, *arguments, **options):
            if flags & WRITES:
                self.count()
            return operation(path, flags, *arguments, **options)

        return counted

    def at_open_file(self, operation: Callable) -> Callable:
        def counted(path, mode="r", *arguments, **options):
            if set(mode) & set("wax+"):
                self.count()
            return operation(path, mode, *arguments, **options)

        return counted


def killed_after(count: int, writer: Callable[[], object]) -> bool:
    """Run the writer, and kill it after so many file operations; False where it had no more."""
    kill = _Kill(count)
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, kill.at(getattr(os, name)))
        patch.setattr(os, "fsync", lambda handle: kill.count())  # slow, and no power fails here
        patch.setattr(os, "open", kill.at_open(os.open))
        patch.setattr(Path, "open", kill.at_open_file(Path.open))
        patch.setattr(temporary, "_exchange", kill.at(temporary._exchange))
        try:
            writer()
        except Killed:
            return True
    return False


def kills(prepare: Callable[[], object], writer: Callable[[], object]) -> Iterator[int]:
    """For every k: prepare the place anew, kill the writer after k operations, and yield k."""
    count = 0
    while True:
        prepare()
        if not killed_after(count, writer):
            return
        yield count
        count += 1
