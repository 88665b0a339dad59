"""seqlm: character-level language models with modern recurrent networks.

    run = seqlm.load("checkpoints/NAME")
    run.generate("ROMEO:", chars=200, seed=1)

Names are loaded on first use, so that `import seqlm` does not import torch.
"""

import os
from importlib import import_module

# torch's OpenMP threads wait for their next work turning, by default for milliseconds, on the cores
# that the compiled loops' threads want.  It is read when torch is loaded: too late where that has
# happened before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load", "train"]


def __getattr__(name: str):
    if name in ("Run", "load", "train"):
        return getattr(import_module("seqlm.api"), name)
    raise AttributeError(f"module 'seqlm' has no attribute {name!r}")
