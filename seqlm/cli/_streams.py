"""Standard streams that are closed, full or limited to ASCII do not make a command fail."""

import io
import os
import sys
from typing import Any


class _Unfailing(io.FileIO):
    """Standard error.  A message that cannot be written is lost, and the command continues."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:  # the disk is full, or the reader of the pipe has gone
            written = None
        return len(data) if written is None else written


def guard() -> None:
    """Prepare the standard streams of this process."""
    # a closed descriptor 0, 1 or 2 would be given to the next file that is opened, and a library
    # that prints would write into that file
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # --help draws lines that ASCII lacks
    encoding = sys.stderr.encoding if sys.stderr is not None else "utf-8"
    file = io.BufferedWriter(_Unfailing(2, "wb", closefd=False))
    sys.stderr = io.TextIOWrapper(file, encoding, errors="backslashreplace", line_buffering=True)
