"""How a step is recorded: what sees every operation of PyTorch, and every op of seqlm."""

from collections.abc import Callable
from contextvars import ContextVar

from torch.utils._python_dispatch import TorchDispatchMode

from seqlm.ops.states import Tensors

# what runs the ops of seqlm in a block: it takes an op's name, its tensors and its options
recorder: ContextVar[Callable[..., Tensors] | None] = ContextVar("seqlm_recorder", default=None)


class Observer(TorchDispatchMode):
    """A mode whose `__torch_dispatch__` sees every operation of ATen; nothing is compiled under it.

    TorchDispatchMode by default loads PyTorch's compiler to keep it out of the mode, which takes
    seconds.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
