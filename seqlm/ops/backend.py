"""Which implementation the ops run on: chosen once for a block of code, never by a caller.

`reference` is a plain loop that autograd differentiates: the truth in tests.  `torch` is vectorised
over chunks of time with a hand-written gradient: any device, always works.  `cpu` is compiled loops
(numba), for float32 and bfloat16 on the CPU; what it does not do, `torch` does in its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from seqlm.errors import UsageError, unknown
from seqlm.runtime import Choice

BACKENDS = ("reference", "torch", "cpu")
_current: ContextVar[str] = ContextVar("seqlm_backend", default="auto")


@cache
def _compiled() -> bool:
    return find_spec("numba") is not None


@cache
def loops() -> ModuleType:
    """The compiled loops, loaded where they are first wanted, as that takes a while."""
    from seqlm.ops import _cpu

    return _cpu


def of(*tensors: Tensor) -> str:
    """The backend that an op on these tensors runs on."""
    wanted = _current.get()
    if wanted in ("auto", "cpu"):
        fits = all(x.device.type == "cpu" and x.dtype in COMPILED for x in tensors)
        return "cpu" if fits and _compiled() else "torch"
    return wanted


def for_step(*tensors: Tensor) -> bool:
    """Whether an op on the few numbers of one character is a compiled loop: in float32 on the CPU,
    where no gradient is wanted and no other dtype."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if _current.get() not in ("auto", "cpu") or not _compiled():
        return False
    return all(x.dtype is torch.float32 and x.is_cpu and type(x) in PLAIN for x in tensors)


PLAIN = (Tensor, torch.nn.Parameter)  # whose memory is what they say
COMPILED = (torch.float32, torch.bfloat16)  # the dtypes of the compiled loops


def pick(wanted: str, device: str) -> Choice:
    """The backend for a device; UsageError for one that cannot run there."""
    if wanted not in ("auto", *BACKENDS):
        raise unknown("backend", wanted, ("auto", *BACKENDS))
    missing = "numba is not installed" if not _compiled() else None
    missing = missing if device == "cpu" else f"the device is {device}"
    if wanted == "cpu" and missing:
        raise UsageError(f"runtime.backend is cpu, and {missing}. Choose torch, or auto.")
    if wanted != "auto":
        return Choice(wanted, "as asked")
    if missing is None:
        return Choice("cpu", "compiled loops")
    return Choice("torch", "works on any device" if device != "cpu" else missing)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the scans of the block on the backend `name`, or on `auto`."""
    if name not in ("auto", *BACKENDS):
        raise unknown("backend", name, ("auto", *BACKENDS))
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)
