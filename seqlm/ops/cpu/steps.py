"""Calls for one character: they take addresses, because an array for every tensor would cost more
time than the work itself."""

from collections.abc import Callable, Sequence

import torch
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from seqlm.ops.cpu.compile import part

PLAIN = (Tensor, torch.nn.Parameter)  # other classes of tensors may have no memory to read


def for_one_character(*tensors: Tensor | None) -> bool:
    """Whether a loop by addresses may run: float32, no gradient wanted, no autocast."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return all(x is None or (x.dtype is torch.float32 and type(x) in PLAIN) for x in tensors)


def call(loop: Callable, tensors: Sequence[Tensor | None], *sizes: int | bool) -> None:
    """Call a loop with the addresses of contiguous tensors, 0 for None, on this thread.

    The caller keeps the tensors alive.
    """
    loop(*[0 if x is None else x.data_ptr() for x in tensors], *sizes)


@intrinsic
def _pointer(context, address):
    """An address, as a pointer to float32."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), code


@part()
def rows_at(address, rows, width):
    """The array (rows, width) that begins at an address."""
    return carray(_pointer(address), (rows, width))
