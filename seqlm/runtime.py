"""Where and how precisely to compute: device, dtype, threads; each pick with its reason."""

import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from seqlm import __version__
from seqlm.errors import UsageError, unknown

# a figure said to be in float32 is computed in float32, on every GPU: cuDNN takes TF32 unless told
# otherwise, and other products do not
torch.backends.cudnn.allow_tf32 = False

BACKENDS = ("reference", "torch", "cpu", "triton")
OLDEST_FOR_TRITON = (8, 0)  # compute capability, by triton's own README
TENSOR_CORES = (7, 0)  # the first compute capability that has them, for float16
MOST_THREADS = 1024
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc, malloc.h


class Choice(NamedTuple):
    value: str
    reason: str


def pick_device(wanted: str) -> Choice:
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        for name, there in present.items():
            if there:
                return Choice(name, "the fastest device present")
        return Choice("cpu", "no GPU found")
    if wanted not in (*present, "cpu"):
        raise unknown("device", wanted, ("auto", *present, "cpu"))
    if not present.get(wanted, True):
        raise UsageError(f"--device {wanted}: torch finds no such device here. Use --device cpu.")
    return Choice(wanted, "as asked")


def pick_dtype(wanted: str, device: str) -> Choice:
    """The type of the matrix products in training; weights and states stay float32."""
    if wanted != "auto":
        if wanted != "float32" and not torch.amp.is_autocast_available(device):
            raise UsageError(
                f"--dtype {wanted}: torch mixes no dtypes on this {device}. Use --dtype float32."
            )
        return Choice(wanted, "as asked")
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bfloat16", "the GPU computes it natively")
        if torch.cuda.get_device_capability() >= TENSOR_CORES:
            return Choice("float16", "the GPU has no bfloat16; losses are scaled")
        return Choice("float32", "the GPU has no bfloat16, and no tensor cores for float16")
    if device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16"):
        return Choice("bfloat16", "the processor has AMX")
    if device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        return Choice("bfloat16", "the processor has AVX-512 BF16")
    return Choice("float32", f"no fast bfloat16 on this {device}")


def pick_compile(wanted: str, device: str) -> Choice:
    """Whether training runs under torch.compile, "on" or "off".  On is tried first, on next to
    nothing, as it needs a C++ compiler on the CPU; where that fails it is off, with the reason."""
    if wanted != "on":
        fast = device == "cpu" and wanted == "auto"
        return Choice("off", "no faster than the compiled loops" if fast else "unless asked for")
    try:
        torch.compile(lambda x: (x + 1).sum())(torch.ones(8, device=device))
    except Exception as error:  # of any part of a long tool chain
        cause = error.__cause__ or error
        words = str(cause).splitlines() or [type(cause).__name__]
        return Choice("off", f"torch.compile fails here: {words[0]}")
    return Choice("on", "as asked")


_backend: ContextVar[str] = ContextVar("seqlm_backend", default="auto")
# A trial runs a small case of a backend on a device and returns what is wrong, or None.  The ops
# enter theirs here when they are imported, because they stand above this file.
TRIALS: dict[str, Callable[[str], str | None]] = {}


def current_backend() -> str:
    """The backend that was asked for in this context: one of BACKENDS, or "auto"."""
    return _backend.get()


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Run the ops of the block on the backend `name`, or let each choose with "auto"."""
    if name not in ("auto", *BACKENDS):
        raise unknown("backend", name, ("auto", *BACKENDS))
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def pick_backend(wanted: str, device: str) -> Choice:
    """The backend for a device; UsageError for one that cannot run there."""
    if wanted not in ("auto", *BACKENDS):
        raise unknown("backend", wanted, ("auto", *BACKENDS))
    if wanted != "auto":
        if fault := why_not(wanted, device):
            raise UsageError(f"runtime.backend is {wanted}, and {fault}. Choose torch, or auto.")
        return Choice(wanted, "as asked")
    fast = {"cpu": Choice("cpu", "compiled loops"), "cuda": Choice("triton", "fused kernels")}
    if device not in fast:
        return Choice("torch", "works on any device")
    fault = why_not(fast[device].value, device)
    return Choice("torch", fault) if fault else fast[device]


def why_not(backend: str, device: str) -> str | None:
    """The reason why a backend cannot run on a device; None where it can."""
    if backend == "cpu":
        return _numba_fault() if device == "cpu" else f"the device is {device}"
    return _triton_fault(device) if backend == "triton" else None


@cache
def _numba_fault() -> str | None:
    """The reason why numba cannot compile the loops here; None where it can."""
    if find_spec("numba") is None:
        return "numba is not installed"
    try:
        import numba
    except Exception as error:  # numba checks NumPy, LLVM and more on import, each in its own way
        return f"numba cannot be imported: {first_line(error)}"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else None


@cache
def _triton_fault(device: str) -> str | None:
    """The reason why triton's kernels cannot run on a device; None where they can."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if find_spec("triton") else "triton is not installed"
    if device != "cuda":
        return f"the device is {device}"
    if not torch.cuda.is_available():
        return "torch finds no such device here"
    if find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_FOR_TRITON:
        return "its compute capability is {}.{}, below 8.0".format(*capability)
    return TRIALS["triton"](device) if "triton" in TRIALS else None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the error's class where it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """Matrix products in `dtype`; does nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device, getattr(torch, dtype))


def tf32() -> str:
    """Whether products of float32 on a GPU are rounded to TF32: "off", unless somebody asked."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "off" if exact and not torch.backends.cudnn.allow_tf32 else "on"


def gpu(device: str) -> str | None:
    """The name, compute capability and CUDA of a GPU, where the device is one of NVIDIA's."""
    if device != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return f"{name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"


def environment(device: str, dtype: str, backend: str) -> dict[str, str | int]:
    """What decides batches and how sums are rounded: where it is the same, results are, bit for
    bit, as far as the libraries promise."""
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "processor": processor,
        "dtype": dtype,
        "backend": backend,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "seqlm": __version__,
    }


def memory_bytes(device: str) -> int | None:
    """The memory of the device; None where it does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def peak_memory_bytes(device: str) -> int:
    """The most memory this process has held: on the GPU, or in RAM."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.is_file() else "")
    if found:  # getrusage begins with what the process had that started this one
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    """The name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def set_threads(threads: int) -> None:
    """CPU threads of torch; 0 leaves its own choice, one a core."""
    if not 0 <= threads <= MOST_THREADS:
        raise UsageError(f"--threads {threads}: it must be from 0 (all cores) to {MOST_THREADS}.")
    if threads:
        torch.set_num_threads(threads)


def keep_memory() -> None:
    """Large tensors that are freed stay with the process, for the next ones.

    glibc gives each of them back to the system, and takes it anew page by page, which costs a
    training step on the CPU about a sixth of its time.  For a process that trains, as the command
    does: memory once taken is given back at its end.  Does nothing where libc is another.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 1 << 26)
