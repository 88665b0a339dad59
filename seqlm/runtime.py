"""Where and how to compute: one `Runtime`, picked once, with a reason for each choice.

No other file sets a backend, a dtype or a number of threads.
"""

import ctypes
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from seqlm import __version__
from seqlm.config import RuntimeConfig
from seqlm.errors import UsageError, unknown

BACKENDS = ("reference", "torch", "cpu", "triton")
OLDEST_FOR_TRITON = (8, 0)  # compute capability; from Triton's README
TENSOR_CORES = (7, 0)  # the first compute capability that has them, for float16
MOST_THREADS = 1024
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc, malloc.h


T = TypeVar("T")


class Choice(NamedTuple, Generic[T]):
    value: T
    reason: str


@dataclass(frozen=True)
class Runtime:
    """Where and how to compute.  It applies to the thread inside `with runtime.active():`."""

    device: Choice[str]
    dtype: Choice[str]  # dtype of matrix products in training; weights and states stay float32
    backend: Choice[str]
    threads: Choice[int]
    graphs: Choice[str]  # "on": steps are recorded as CUDA graphs

    @classmethod
    def pick(cls, wanted: RuntimeConfig | None = None) -> "Runtime":
        """The fastest runtime of this machine that `wanted` allows.

        Raises UsageError for a choice that does not exist, or cannot run on this machine.
        """
        wanted = wanted or RuntimeConfig()
        device = pick_device(wanted.device)
        return cls(
            device,
            pick_dtype(wanted.dtype, device.value),
            pick_backend(wanted.backend, device.value),
            pick_threads(wanted.threads),
            pick_graphs(wanted.graphs, device.value),
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the block under this runtime, and restore the earlier settings afterwards."""
        threads = torch.get_num_threads()
        backend = _backend.set(self.backend.value)
        graphs = _graphs.set(self.graphs.value == "on")
        # skip the call when nothing changes, because this runs for every generated character
        if threads != self.threads.value:
            torch.set_num_threads(self.threads.value)
        try:
            with _exact_cudnn:
                yield
        finally:
            if threads != self.threads.value:
                torch.set_num_threads(threads)
            _graphs.reset(graphs)
            _backend.reset(backend)

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """The items, each computed under this runtime.

        The runtime is not active between two items.  It would be active in the caller if a
        generator yielded inside `active()`.
        """
        while True:
            with self.active():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which matrix products are computed in this runtime's dtype."""
        return autocast(self.device.value, self.dtype.value)

    def busy(self) -> str | None:
        """A warning if other programs leave cores for fewer threads only; else None.

        The load average covers the last minute and includes this process, so this process' own
        time is subtracted.  A program that has just ended must not count, so another program must
        also be running now.
        """
        if self.device.value != "cpu" or not hasattr(os, "getloadavg"):
            return None
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        threads = self.threads.value
        others = load - min(threads, time.process_time() / 60)
        left = cores - others
        fewer = max(1, round(left))
        if left > threads - 0.5 or fewer == threads or not _others_run():
            return None
        return (
            f"This machine is busy (load {load:.1f} on {cores} cores): everything will be "
            f"slower. Try --threads {fewer}."
        )

    def config(self) -> dict[str, str | int]:
        """The configuration keys and values that select this runtime again."""
        return {
            "runtime.device": self.device.value,
            "runtime.dtype": self.dtype.value,
            "runtime.backend": self.backend.value,
            "runtime.threads": self.threads.value,
            "runtime.graphs": "auto" if self.graphs.value == "on" else "off",
        }

    def environment(self) -> dict[str, str | int]:
        """Everything that affects batches and rounding.

        If it is equal, results are equal bit for bit, as far as the libraries guarantee that.
        """
        if self.device.value == "cuda":
            processor = torch.cuda.get_device_name()
        else:
            processor = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}"
        return {
            "device": self.device.value,
            "processor": processor,
            "dtype": self.dtype.value,
            "backend": self.backend.value,
            "threads": self.threads.value,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "seqlm": __version__,
        }

    def __str__(self) -> str:
        picks = {"device": self.device, "dtype": self.dtype, "backend": self.backend}
        if self.device.value == "cuda":
            picks["graphs"] = self.graphs
        return ", ".join(f"{name} {pick.value} ({pick.reason})" for name, pick in picks.items())


class _ExactCudnn:
    """Keeps cuDNN from rounding float32 products to TF32, which is its default.

    All threads share one flag: the first thread that enters clears the flag, and the last thread
    that leaves restores it.
    """

    def __init__(self) -> None:
        self.lock, self.users, self.before = Lock(), 0, False

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.before = torch.backends.cudnn.allow_tf32
                torch.backends.cudnn.allow_tf32 = False
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                torch.backends.cudnn.allow_tf32 = self.before


_exact_cudnn = _ExactCudnn()
_backend: ContextVar[str] = ContextVar("seqlm_backend", default="auto")
_graphs: ContextVar[bool] = ContextVar("seqlm_graphs", default=True)


def pick_device(wanted: str) -> Choice[str]:
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


def pick_dtype(wanted: str, device: str) -> Choice[str]:
    if wanted != "auto":
        if wanted != "float32" and not torch.amp.is_autocast_available(device):
            raise UsageError(
                f"--dtype {wanted}: torch has no autocast on {device}. Use --dtype float32."
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


def pick_threads(wanted: int) -> Choice[int]:
    if not 0 <= wanted <= MOST_THREADS:
        raise UsageError(
            f"--threads {wanted}: it must be from 0 (PyTorch's choice) to {MOST_THREADS}."
        )
    if wanted:
        return Choice(wanted, "as asked")
    return Choice(torch.get_num_threads(), "PyTorch's own choice")


def pick_graphs(wanted: str, device: str) -> Choice[str]:
    """Whether steps are recorded as CUDA graphs, "on" or "off"."""
    if wanted not in ("auto", "off"):
        raise unknown("value of runtime.graphs", wanted, ("auto", "off"))
    if device != "cuda":
        return Choice("off", f"the device is {device}")
    return (
        Choice("off", "as asked")
        if wanted == "off"
        else Choice("on", "all kernels of a step launch together")
    )


# A trial runs a small case of a backend on a device, and returns the fault found, or None.
# The ops register their trials here on import, because this file cannot import the ops.
TRIALS: dict[str, Callable[[str], str | None]] = {}


def current_backend() -> str:
    """The backend selected in this context: one of BACKENDS, or "auto"."""
    return _backend.get()


def recording() -> bool:
    """Whether steps on a GPU are recorded as CUDA graphs in this context."""
    return _graphs.get()


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


def pick_backend(wanted: str, device: str) -> Choice[str]:
    """The backend for a device; UsageError for one that cannot run there."""
    if wanted not in ("auto", *BACKENDS):
        raise unknown("backend", wanted, ("auto", *BACKENDS))
    if wanted != "auto":
        if fault := why_not(wanted, device):
            raise UsageError(f"runtime.backend is {wanted}, but {fault}. Choose torch or auto.")
        return Choice(wanted, "as asked")
    fast = {"cpu": Choice("cpu", "compiled loops"), "cuda": Choice("triton", "fused kernels")}
    if device not in fast:
        return Choice("torch", "works on any device")
    fault = why_not(fast[device].value, device)
    return Choice("torch", fault) if fault else fast[device]


def why_not(backend: str, device: str) -> str | None:
    """The reason why a backend cannot run on a device; None if it can."""
    if backend == "cpu":
        return _numba_fault() if device == "cpu" else f"the device is {device}"
    return _triton_fault(device) if backend == "triton" else None


@cache
def _numba_fault() -> str | None:
    """The reason why numba cannot compile the loops here; None if it can."""
    if find_spec("numba") is None:
        return "numba is not installed"
    try:
        import numba
    except Exception as error:  # numba checks NumPy, LLVM and more on import, each in its own way
        return f"numba cannot be imported: {first_line(error)}"
    # numba sets the names of its settings at run time, so a type checker does not know them
    return "NUMBA_DISABLE_JIT is set" if vars(numba.config)["DISABLE_JIT"] else None


@cache
def _triton_fault(device: str) -> str | None:
    """The reason why triton's kernels cannot run on a device; None if they can."""
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
    """The first line of an error's text, or the error's class if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def autocast(device: str, dtype: str) -> AbstractContextManager[object]:
    """A context in which matrix products are computed in `dtype`; without effect for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device, getattr(torch, dtype))


def tf32() -> str:
    """ "on" if a GPU rounds float32 products to TF32, which only the user of torch can set."""
    return "off" if torch.get_float32_matmul_precision() == "highest" else "on"


def gpu(device: str) -> str | None:
    """Name, compute capability and CUDA version of an NVIDIA GPU; None for other devices."""
    if device != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return f"{name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"


def _others_run() -> bool:
    """Whether another thread runs or waits for a core now; True if the system does not say."""
    try:
        running = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
    except OSError:
        return True
    return int(running) > 1


def memory_bytes(device: str) -> int | None:
    """The size of the device's memory; None if it is not known."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error means that the memory is full: for NumPy and Python, for tensors on the
    CPU, or on the GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def peak_memory_bytes(device: str) -> int:
    """The peak memory of this process, on the GPU or in RAM."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.is_file() else "")
    if found:  # better than getrusage, which includes the peak of the parent process
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    """The name of the processor; it may be empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def keep_memory() -> None:
    """Make glibc keep the memory of freed large tensors, for the next ones.

    By default glibc returns it to the system and requests it again page by page, which takes about
    a sixth of a training step on the CPU.  Only for a process that trains, because memory is then
    returned when the process ends.  Without effect on other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 1 << 26)
