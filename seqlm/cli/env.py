"""seqlm env: what seqlm finds on this machine, for bug reports."""

import platform
from importlib.metadata import packages_distributions, version

from seqlm import __version__
from seqlm.cli._app import command
from seqlm.ui import Screen, pairs

PACKAGES = ("torch", "numpy", "numba", "sentencepiece", "safetensors", "typer", "rich", "tqdm")


def triton() -> str | None:
    """The version of triton, whose distribution has other names for other GPUs."""
    names = packages_distributions().get("triton")
    return version(names[0]) if names else None


@command("env", "seqlm env")
def env(screen: Screen) -> None:
    """Versions, device, dtype and threads: paste it into a bug report."""
    import torch

    from seqlm import ops
    from seqlm.runtime import gpu, pick_device, pick_dtype, tf32

    device = pick_device("auto")
    dtype = pick_dtype("auto", device.value)
    found = {
        "seqlm": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "device": device.value,
        "device_reason": device.reason,
        "gpu": gpu(device.value),
        "dtype": dtype.value,
        "dtype_reason": dtype.reason,
        "tf32": tf32(),
        "triton": triton(),
        "backends": ", ".join(ops.BACKENDS),
        "threads": torch.get_num_threads(),
    }
    screen.product(found, "seqlm", pairs(found, list(found)))
