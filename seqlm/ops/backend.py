"""Which implementation the scans run on: chosen once for a block of code, never by a caller.

`reference` is a plain loop that autograd differentiates: the truth in tests.  `torch` is vectorised
over chunks of time with a hand-written gradient: any device, always works.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from seqlm.errors import unknown
from seqlm.runtime import Choice

BACKENDS = ("reference", "torch")
_current: ContextVar[str] = ContextVar("seqlm_backend", default="torch")


def current() -> str:
    return _current.get()


def pick(wanted: str) -> Choice:
    if wanted == "auto":
        return Choice("torch", "works on any device")
    if wanted not in BACKENDS:
        raise unknown("backend", wanted, ("auto", *BACKENDS))
    return Choice(wanted, "as asked")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the scans of the block on the backend `name`."""
    token = _current.set(pick(name).value)
    try:
        yield
    finally:
        _current.reset(token)
