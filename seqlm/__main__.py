"""Start of `seqlm` and `python -m seqlm`: Ctrl-C ends the command from its first moment."""

import os
import signal
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    # nothing is written yet; an exception during an import might be turned into another one
    os._exit(128 + number)


def main() -> None:
    """Load the command line and run it."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # otherwise the shell has Ctrl-C ignored
        signal.signal(signal.SIGINT, _end)
    from seqlm import cli

    signal.signal(signal.SIGINT, usual)
    cli.main()


if __name__ == "__main__":
    main()
