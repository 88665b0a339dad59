"""Which implementation the ops run on: chosen once for a block of code, never by a caller.

`reference` is a plain loop that autograd differentiates: the truth in tests.  `torch` is vectorised
over chunks of time with a hand-written gradient: any device, always works.  `cpu` is compiled loops
(numba), for float32 and bfloat16 on the CPU, and `triton` kernels for these and float16 on a CUDA
device (or under Triton's interpreter, for tests); what they do not do, `torch` does in their place.
"""

import os
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

BACKENDS = ("reference", "torch", "cpu", "triton")
_current: ContextVar[str] = ContextVar("seqlm_backend", default="auto")


@cache
def _compiled() -> bool:
    return find_spec("numba") is not None


@cache
def loops() -> ModuleType:
    """The compiled loops, loaded where they are first wanted, as that takes a while."""
    from seqlm.ops import _cpu

    return _cpu


@cache
def kernels() -> ModuleType:
    """The kernels of triton, loaded where they are first wanted."""
    from seqlm.ops import _triton

    return _triton


@cache
def _no_triton(device: str) -> str | None:
    """Why the kernels of triton cannot run on a device; None where they can."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if find_spec("triton") else "triton is not installed"
    if device != "cuda":
        return f"the device is {device}"
    if not torch.cuda.is_available():
        return "torch finds no such device here"
    if find_spec("triton") is None:
        return "triton is not installed"
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return "its compute capability is {}.{}, below 8.0".format(*found)
    try:  # triton wants a C compiler and a place for what it compiles
        x = torch.ones(2, 16, 32, device=device)
        right = kernels().scan(x, x, x[:, 0].contiguous())[1].eq(17).all().item()
    except Exception as error:  # of any part of a long tool chain
        return f"triton fails here: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None if right else "triton counts wrong here"


def of(*tensors: Tensor) -> str:
    """The backend that an op on these tensors runs on."""
    wanted = _current.get()
    if wanted in ("reference", "torch"):
        return wanted
    if wanted in ("auto", "cpu") and _all_fit(tensors, "cpu", LOOPS) and _compiled():
        return "cpu"
    device = tensors[0].device.type
    if wanted == "triton" or (wanted == "auto" and device == "cuda"):
        if _all_fit(tensors, device, KERNELS) and _no_triton(device) is None:
            return "triton"
    return "torch"


def _all_fit(tensors: tuple[Tensor, ...], device: str, dtypes: tuple[torch.dtype, ...]) -> bool:
    return all(x.device.type == device and x.dtype in dtypes for x in tensors)


def fused(*tensors: Tensor) -> bool:
    """Whether a backend with whole recurrences in one pass runs an op on these tensors."""
    return of(*tensors) in ("cpu", "triton")


def for_step(*tensors: Tensor) -> bool:
    """Whether an op on the few numbers of one character is a compiled loop: in float32 on the CPU,
    where no gradient is wanted and no other dtype."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if _current.get() not in ("auto", "cpu") or not _compiled():
        return False
    return all(x.dtype is torch.float32 and x.is_cpu and type(x) in PLAIN for x in tensors)


PLAIN = (Tensor, torch.nn.Parameter)  # whose memory is what they say
LOOPS = (torch.float32, torch.bfloat16)  # the dtypes of the compiled loops,
KERNELS = (*LOOPS, torch.float16)  # and of triton's
OLDEST = (8, 0)  # compute capability that triton supports, by its own README


def pick(wanted: str, device: str) -> Choice:
    """The backend for a device; UsageError for one that cannot run there."""
    if wanted not in ("auto", *BACKENDS):
        raise unknown("backend", wanted, ("auto", *BACKENDS))
    why_not = {"cpu": _no_loops, "triton": _no_triton}  # asked where it matters: a trial takes time
    if wanted in why_not and (missing := why_not[wanted](device)):
        raise UsageError(f"runtime.backend is {wanted}, and {missing}. Choose torch, or auto.")
    if wanted != "auto":
        return Choice(wanted, "as asked")
    fast = {"cpu": Choice("cpu", "compiled loops"), "cuda": Choice("triton", "fused kernels")}
    if device not in fast:
        return Choice("torch", "works on any device")
    missing = why_not[fast[device].value](device)
    return Choice("torch", missing) if missing else fast[device]


def _no_loops(device: str) -> str | None:
    """Why the compiled loops cannot run on a device; None where they can."""
    if device != "cpu":
        return f"the device is {device}"
    return None if _compiled() else "numba is not installed"


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
