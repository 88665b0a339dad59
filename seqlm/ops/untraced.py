"""Calls that torch.compile leaves as they are: Dynamo must not trace into compiled loops.

Loaded only under torch.compile, because `torch.compiler.disable` loads all of its machinery.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
def call(function: Callable[..., Result], *arguments: object) -> Result:
    """function(*arguments), run as plain Python."""
    return function(*arguments)
