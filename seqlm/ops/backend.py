"""Which implementation the ops run on: chosen once for a block of code, never by a caller.

`reference` is a plain loop that autograd differentiates: the truth in tests.  `torch` is vectorised
over chunks of time with a hand-written gradient: any device, always works.  `cpu` is compiled loops
(numba), for float32 and bfloat16 on the CPU, and `triton` kernels for these and float16 on a CUDA
device (or under Triton's interpreter, for tests); what they do not do, `torch` does in their place.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from seqlm import runtime
from seqlm.runtime import BACKENDS, current_backend, why_not
from seqlm.runtime import pick_backend as pick
from seqlm.runtime import using_backend as using

__all__ = ["BACKENDS", "fused", "for_step", "kernels", "loops", "of", "pick", "using"]


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


def _trial(device: str) -> str | None:
    """Run a small scan by triton, which needs a C compiler; what is wrong with it, or None."""
    try:
        x = torch.ones(2, 16, 32, device=device)
        right = kernels().scan(x, x, x[:, 0].contiguous())[1].eq(17).all().item()
    except Exception as error:  # each part of a long tool chain fails in its own way
        return f"triton fails here: {runtime.first_line(error)}"
    return None if right else "triton counts wrong here"


runtime.TRIALS["triton"] = _trial


def of(*tensors: Tensor) -> str:
    """The backend that an op on these tensors runs on."""
    wanted = current_backend()
    if wanted in ("reference", "torch"):
        return wanted
    if (
        wanted in ("auto", "cpu")
        and _all_fit(tensors, "cpu", LOOPS)
        and why_not("cpu", "cpu") is None
    ):
        return "cpu"
    device = tensors[0].device.type
    if wanted == "triton" or (wanted == "auto" and device == "cuda"):
        if _all_fit(tensors, device, KERNELS) and why_not("triton", device) is None:
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
    if current_backend() not in ("auto", "cpu") or why_not("cpu", "cpu"):
        return False
    return all(x.dtype is torch.float32 and x.is_cpu and type(x) in PLAIN for x in tensors)


PLAIN = (Tensor, torch.nn.Parameter)  # whose memory is what they say
LOOPS = (torch.float32, torch.bfloat16)  # the dtypes of the compiled loops,
KERNELS = (*LOOPS, torch.float16)  # and of triton's
