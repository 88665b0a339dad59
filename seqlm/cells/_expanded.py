"""The base class of cells with a projection in front of a scan over H units, and one behind it."""

# B batch, D model width, H state width, P parts of the drive

from torch import Tensor

from seqlm.cells._contract import Recurrence, State
from seqlm.errors import UsageError
from seqlm.ops import Linear


class Expanded(Recurrence):
    """A recurrence of H = expansion * D units, rounded, that reads P H numbers for each character.

    Raises UsageError for an expansion out of range.
    """

    over_time = "parallel scan"

    def __init__(self, width: int, expansion: float, parts: int):
        super().__init__()
        if not 0 < expansion <= 64:
            raise UsageError(f"cell.expansion is {expansion}; it must be above 0 and at most 64.")
        self.hidden = max(1, round(width * expansion))
        self.inputs = Linear(width, parts * self.hidden, parts=parts)
        self.outputs = Linear(self.hidden, width)

    def initial_state(self, batch: int) -> State:
        return (self.zeros(batch, self.hidden),)

    def project(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def readout(self, h: Tensor) -> Tensor:
        return self.outputs(h)
