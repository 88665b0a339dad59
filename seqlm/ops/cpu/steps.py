"""Loops for one character take addresses, `x.data_ptr()` of contiguous tensors.

Making an array for every tensor would take more time than the work itself.  The caller keeps the
tensors alive.
"""

import torch
from numba import carray, types  # type: ignore[attr-defined]  # numba's __all__ lacks it
from numba.extending import intrinsic
from torch import Tensor

from seqlm.ops.cpu.compile import inlined

PLAIN_CLASSES = (Tensor, torch.nn.Parameter)  # other classes of tensors may have no memory


def for_one_character(*tensors: Tensor | None) -> bool:
    """Whether a loop by addresses may run: float32, no gradients, no autocast."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    for x in tensors:  # a loop, because all() of a generator takes twice as long
        if x is not None and (x.dtype is not torch.float32 or type(x) not in PLAIN_CLASSES):
            return False
    return True


@intrinsic
def _pointer(context, address):
    """Converts an address to a pointer to float32."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), code


@inlined()
def rows_at(address, rows, width):
    """The array (rows, width) that begins at an address."""
    # numba adds the argument `context`
    return carray(_pointer(address), (rows, width))  # type: ignore[call-arg]
