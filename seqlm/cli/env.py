"""seqlm env: versions, hardware and the runtime on this machine, for bug reports."""

import platform
from dataclasses import fields
from importlib.metadata import packages_distributions, version

from seqlm import __version__
from seqlm.cli._app import command
from seqlm.ui import Screen, pairs

PACKAGES = ("torch", "numpy", "numba", "sentencepiece", "safetensors", "typer", "rich", "tqdm")


def installed(name: str) -> str:
    """The version of a package.  The name of its distribution may differ, as with triton."""
    names = packages_distributions().get(name)
    return version(names[0]) if names else "not installed"


@command("env", "seqlm env", "seqlm env --json")
def env(screen: Screen) -> None:
    """Show versions, hardware, and the chosen runtime with its reasons, for bug reports."""
    import torch

    from seqlm.runtime import BACKENDS, Runtime, gpu, tf32, why_not

    runtime = Runtime.pick()
    device = runtime.device.value
    faults = {backend: why_not(backend, device) for backend in BACKENDS}
    found = {
        "seqlm": __version__,
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "triton": installed("triton"),
        "platform": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "gpu": gpu(device),
    }
    for choice in fields(runtime):
        picked = getattr(runtime, choice.name)
        found |= {choice.name: picked.value, f"{choice.name}_reason": picked.reason}
    found["tf32"] = tf32()
    if runtime.backend.value == "triton":
        from seqlm.ops import try_kernels

        found["kernels"] = ", ".join(f"{k}: {v}" for k, v in try_kernels(device).items())
    found["backends"] = ", ".join(f"{b} ({why})" if why else b for b, why in faults.items())
    screen.product(found, "seqlm", pairs(found, list(found)))
