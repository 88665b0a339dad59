"""none: no cell, as a baseline: nothing but the convolution looks at earlier characters.

    y_t = x_t

A model of it is the convolution and the MLP of each block.  What another cell gains over it is what
the recurrence is worth.

Source: seqlm, as the control in a comparison of cells.
"""

# B batch, T time, D model width

from torch import Tensor

from seqlm.cells._contract import Cell, State


class Identity(Cell):
    """Returns its input; it has no state and no parameters."""

    over_time = "parallel"
    group = "windows"

    def __init__(self, width: int):
        super().__init__()

    def initial_state(self, batch: int) -> State:
        return ()

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return x, ()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return x, ()
