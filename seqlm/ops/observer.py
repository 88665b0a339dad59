"""The base class of modes that see every operation of PyTorch in a block."""

from torch.utils._python_dispatch import TorchDispatchMode


class Observer(TorchDispatchMode):
    """A mode whose `__torch_dispatch__` sees every operation of ATen; nothing is compiled under it.

    TorchDispatchMode by default loads PyTorch's compiler to keep it out of the mode, which takes
    seconds.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
