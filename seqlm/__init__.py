"""seqlm: character-level language models with modern recurrent networks.

    run = seqlm.load("checkpoints/NAME")
    run.generate("ROMEO:", chars=200, seed=1)

Names are loaded on first use, so that `import seqlm` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqlm.api import Run, load, train

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load", "train"]


def __getattr__(name: str) -> object:
    if name in ("Run", "load", "train"):
        return getattr(import_module("seqlm.api"), name)
    raise AttributeError(f"module 'seqlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
