"""The optimizers of a training: Muon for the layers' matrices, AdamW for all other weights."""

# N matrices, O outputs, I inputs

from collections import defaultdict
from collections.abc import Mapping, Sequence
from inspect import unwrap

import torch
from torch import Tensor, nn

from seqlm.config import Config
from seqlm.model import LanguageModel
from seqlm.training import parallel

# Each row (a, b, c) maps a singular value s to a s + b s^3 + c s^5, and is the best such polynomial
# for the interval that the row before it leaves.  Together they bring every s from SMALLEST to 1
# within 12 % of 1 (the method of Amsel et al., The Polar Express, arXiv 2505.16932).
SMALLEST = 0.0175
POLYNOMIALS = (
    (7.8032, -22.4770, 16.5373),
    (3.3068, -2.4798, 0.5091),
    (2.2907, -1.6599, 0.4178),
)
TINY = 1e-20  # so that a matrix of zeros stays one
KEYS = {"muon": ("momentum",), "adamw": ("step", "exp_avg", "exp_avg_sq")}  # state of a weight


class Optimizer(torch.optim.Optimizer):
    """PyTorch's, without what hides its methods from torch.compile: that loads the compiler, which
    takes longer than PyTorch itself."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        unwrap(torch.optim.AdamW.step)(self)


class Muon(Optimizer):
    """Momentum, with the singular values of each matrix set to about 1.

    A change of rate lr has singular values of about lr sqrt(max(1, O / I)).  So directions in which
    gradients are small are learned as fast as those in which they are large.
    matrices: {weight: how many matrices of equal size it has, one above the other}.
    dtype: of the products.
    With several processes, each computes its share of the matrices.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    """

    def __init__(
        self,
        matrices: Mapping[Tensor, int],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum)
        super().__init__([*matrices], defaults)
        self.matrices, self.dtype = matrices, dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        (group,) = self.param_groups
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                parts = self.matrices[weight]
                ahead = self._ahead(weight, group["momentum"])
                for matrix, direction in zip(weight.chunk(parts), ahead.chunk(parts), strict=True):
                    by_shape[matrix.shape].append((matrix, direction))
        changes = [self._change([d for _, d in pairs]) for pairs in by_shape.values()]
        parallel.sum_(changes)
        lr, decay = group["lr"], group["weight_decay"]
        for (outputs, inputs), alike, change in zip(
            by_shape, by_shape.values(), changes, strict=True
        ):
            size = max(1, outputs / inputs) ** 0.5
            for (matrix, _), direction in zip(alike, change, strict=True):
                matrix.mul_(1 - lr * decay).add_(direction, alpha=-lr * size)

    def _ahead(self, weight: Tensor, decay: float) -> Tensor:
        """The momentum after this step's gradient, and a step further along it (Nesterov's)."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"].lerp_(weight.grad, 1 - decay)
        return weight.grad.lerp(momentum, decay)

    def _change(self, directions: Sequence[Tensor]) -> Tensor:
        """(N, O, I): this process' share of the changes; 0 for the others."""
        stacked = torch.stack(list(directions))
        mine = slice(parallel.rank(), None, parallel.world())
        change = torch.zeros_like(stacked)
        change[mine] = orthogonal(stacked[mine].to(self.dtype)).to(stacked.dtype)
        return change


def orthogonal(x: Tensor) -> Tensor:
    """x: (N, O, I) -> (N, O, I), with the same singular vectors and singular values of about 1.

    Those below SMALLEST times the largest may stay smaller.
    """
    if x.shape[1] < x.shape[2]:
        return orthogonal(x.mT).mT
    # The powers below would be infinite for a large x, and 0 for a small one.  So x is first scaled
    # to a norm between 1/2 and 1, by a power of 2, which rounds nothing.
    _, exponents = torch.frexp(torch.linalg.vector_norm(x.float(), dim=(1, 2), keepdim=True))
    x = torch.ldexp(x, -exponents).to(x.dtype)
    for n, (a, b, c) in enumerate(POLYNOMIALS):
        gram = x.mT @ x
        square = gram @ gram
        if n == 0:
            # the sum of s^8, to the power of 1/4: at least the largest s^2, and little more
            bound = square.float().flatten(1).norm(dim=1).sqrt()[:, None, None].to(x.dtype) + TINY
            x, gram, square = x / bound.sqrt(), gram / bound, square / bound.square()
        x = a * x + x @ (b * gram + c * square)
    return x


def _for_muon(model: LanguageModel, config: Config) -> dict[Tensor, int]:
    """`hidden_matrices` where Muon is chosen, else nothing."""
    return hidden_matrices(model) if config.optim.name == "muon" else {}


def hidden_matrices(model: LanguageModel) -> dict[Tensor, int]:
    """The weights of all linear layers in the blocks: {weight: matrices in it}."""
    linear = (layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear))
    return {layer.weight: getattr(layer, "parts", 1) for layer in linear}


def make_optimizers(
    model: LanguageModel, config: Config, dtype: torch.dtype = torch.float32
) -> list[Optimizer]:
    """The optimizers of all weights; dtype: of Muon's products.

    Weight decay applies to matrices, not to vectors (norms, biases).
    """
    optim, train = config.optim, config.train
    matrices = _for_muon(model, config)
    others = [weight for weight in model.parameters() if weight not in matrices]
    groups = [
        {"params": [w for w in others if w.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [w for w in others if w.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = optim.adam_lr or optim.lr / 10 if matrices else optim.lr
    beta2 = 0.5 ** (train.batch * train.length / optim.half_life)
    adamw = AdamW(groups, lr=lr, betas=(optim.beta1, beta2), fused=True)
    if not matrices:
        return [adamw]
    return [Muon(matrices, optim.lr, optim.weight_decay, optim.momentum, dtype), adamw]


def state_keys(model: LanguageModel, config: Config) -> dict[str, tuple[str, ...]]:
    """{weight: the names of its optimizer's state}"""
    matrices = _for_muon(model, config)
    weights = model.named_parameters()
    return {name: KEYS["muon" if weight in matrices else "adamw"] for name, weight in weights}
