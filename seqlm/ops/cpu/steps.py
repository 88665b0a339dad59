"""Loops for one character take addresses, `x.data_ptr()` of contiguous tensors: an array for every
tensor would cost more time than the work itself.  The caller keeps the tensors alive."""

import torch
from numba import carray, types  # type: ignore[attr-defined]  # numba's __all__ lacks it
from numba.extending import intrinsic
from torch import Tensor

from seqlm.ops.cpu.compile import part

PLAIN = (Tensor, torch.nn.Parameter)  # other classes of tensors may have no memory to read


def for_one_character(*tensors: Tensor | None) -> bool:
    """Whether a loop by addresses may run: float32, no gradient wanted, no autocast."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    for x in tensors:  # a loop, because all() of a generator takes twice as long
        if x is not None and (x.dtype is not torch.float32 or type(x) not in PLAIN):
            return False
    return True


@intrinsic
def _pointer(context, address):
    """An address, as a pointer to float32."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), code


@part()
def rows_at(address, rows, width):
    """The array (rows, width) that begins at an address."""
    # numba passes `context` by itself
    return carray(_pointer(address), (rows, width))  # type: ignore[call-arg]
