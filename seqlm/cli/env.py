"""seqlm env: versions, hardware and the runtime on this machine, for bug reports."""

import platform
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import packages_distributions, version

from seqlm import __version__
from seqlm.cli._app import command
from seqlm.ui import Screen, pairs

PACKAGES = ("torch", "numpy", "numba", "sentencepiece", "safetensors", "typer", "rich", "tqdm")


def installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of packages.  The name of a distribution may differ, as with triton."""
    found = packages_distributions()  # reads the files of every distribution
    return {name: version(found[name][0]) if name in found else "not installed" for name in names}


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
        **installed([*PACKAGES, "triton"]),
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
