"""Calls that torch.compile does not trace, because Dynamo cannot trace compiled loops.

Imported only under torch.compile, because `torch.compiler.disable` imports all of Dynamo.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
def call(function: Callable[..., Result], *arguments: object) -> Result:
    """function(*arguments), run as plain Python."""
    return function(*arguments)
