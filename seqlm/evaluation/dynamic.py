"""Dynamic evaluation: a copy of the model learns from the text while it is scored.

Each segment of the text is scored first, and then learned from (Krause et al. 2018, arXiv
1709.07432).  So no symbol is learned before it is predicted, and the model adapts to the text.
"""

# N symbols, S symbols of a segment, T time, V vocabulary

from collections.abc import Iterator
from copy import deepcopy
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqlm.cells import State
from seqlm.errors import SeqlmError, UsageError
from seqlm.evaluation import evaluate
from seqlm.evaluation.evaluate import Judge, report, watching
from seqlm.evaluation.passage import Passage
from seqlm.model import LanguageModel
from seqlm.progress import OnProgress, silent

LR = 2e-4
SEGMENT = 64  # symbols
SAMPLED = 100  # segments of the training text that give the size of the gradients
RMS_EPSILON = 1e-5  # added to the root mean square (RMS) of a gradient, which may be 0
MOST_RMS = 10.0  # cap on a gradient, in RMS: the sampled segments lack those of rare symbols


class Learning(NamedTuple):
    """How a model learns from the text that it scores."""

    lr: float = LR  # how far a weight moves in a segment whose gradient is as large as its RMS
    # the text that the model was trained on, for the RMS of its gradients; None: that of the
    # gradients so far
    trained_on: Passage | None = None

    @property
    def source(self) -> str:
        """The text from whose gradients the RMS is taken."""
        return "text" if self.trained_on is None else "train"


def read(
    model: LanguageModel,
    passage: Passage,
    judge: Judge,
    learning: Learning | None,
    tick: OnProgress = silent,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """The values of `judge` for every symbol that counts, by protocol dynamic; by protocol stream
    if `learning` is None."""
    if learning is None:
        return evaluate.each_symbol(model, passage, judge, tick)
    return each_symbol(model, passage, judge, learning, tick)


@torch.inference_mode(False)
def each_symbol(
    model: LanguageModel,
    passage: Passage,
    judge: Judge,
    learning: Learning,
    tick: OnProgress = silent,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """`evaluate.each_symbol` by the protocol dynamic; the model itself does not change.

    Each document is read from a fresh state, and what was learned stays.  Only symbols that count
    are learned.  Raises UsageError for a learning rate that is negative or not finite, SeqlmError
    if a loss is not finite.
    """
    if not (isfinite(learning.lr) and learning.lr >= 0):
        raise UsageError(f"--dynamic-lr {learning.lr:g}: it must be a finite number, at least 0.")
    tick = watching(passage, tick)
    learner = _Learner(model, learning.lr)
    if learning.trained_on is not None:
        learner.measure(learning.trained_on)
    state: State = ()
    for begin, end, fresh in _segments(passage).T:
        state = model.initial_state(1) if fresh else tuple(part.detach() for part in state)
        places, logits, targets, state = learner.read(passage, begin, end, fresh, state)
        with torch.inference_mode():
            values = judge(logits, targets)[:, 0].cpu().double()
        yield places, values
        learner.learn(logits, targets)
        report(tick, int(end), len(passage.symbols))


class _Learner:
    """A copy of a model that takes a step of gradient descent for each segment."""

    def __init__(self, model: LanguageModel, lr: float):
        self.model, self.lr = deepcopy(model), lr
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.squares = [torch.zeros_like(weight) for weight in self.weights]
        self.count, self.measured = 0, False  # the number of gradients whose squares were added

    def read(
        self, passage: Passage, begin: int, end: int, fresh: bool, state: State
    ) -> tuple[np.ndarray, Tensor, Tensor, State]:
        """A segment: the offsets of its symbols that count, (n,), their logits (1, n, V) and
        targets (1, n), and the state after it."""
        places = np.arange(begin, end)
        first = self.model.beginning if fresh else passage.symbols[begin - 1]
        device = self.weights[0].device
        targets = torch.from_numpy(passage.symbols[places].astype(np.int64)).to(device)
        inputs = torch.cat([targets.new_tensor([int(first)]), targets[:-1]])
        logits, state = self.model(inputs[None], state)
        counted = np.flatnonzero(passage.counts(places))
        return places[counted], logits[:, counted], targets[None, counted], state

    def measure(self, passage: Passage) -> None:
        """Take the RMS of the gradients from segments spread over a passage."""
        segments = _segments(passage)
        chosen = np.linspace(0, segments.shape[1] - 1, min(SAMPLED, segments.shape[1]), dtype=int)
        for begin, end, fresh in segments[:, chosen].T.tolist():
            _, *read, _ = self.read(passage, begin, end, fresh, self.model.initial_state(1))
            self._add(self._gradients(*read))
        self.measured = True

    def learn(self, logits: Tensor, targets: Tensor) -> None:
        gradients = self._gradients(logits, targets)
        if not self.measured:
            self._add(gradients)
        with torch.no_grad():
            for weight, square, gradient in zip(self.weights, self.squares, gradients, strict=True):
                size = (square / self.count).sqrt_().add_(RMS_EPSILON)
                weight.sub_((gradient / size).clamp_(-MOST_RMS, MOST_RMS), alpha=self.lr)
        self.model.after_step()

    def _gradients(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        # divided by the size of a whole segment, so that a short document moves the weights less
        loss = F.cross_entropy(logits[0].float(), targets[0], reduction="sum") / SEGMENT
        if not loss.isfinite():
            raise SeqlmError(
                "The model's score is not a finite number. Give a smaller --dynamic-lr, or choose "
                "another step with --step."
            )
        return torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)

    def _add(self, gradients: tuple[Tensor, ...]) -> None:
        for square, gradient in zip(self.squares, gradients, strict=True):
            square.addcmul_(gradient, gradient)
        self.count += 1


def _segments(passage: Passage) -> np.ndarray:
    """Where each segment begins and ends, and whether a document begins with it: (3, segments)."""
    ends = np.array([len(passage.symbols)]) if passage.ends is None else np.asarray(passage.ends)
    sizes = np.diff(ends, prepend=0)
    counts = -(-sizes // SEGMENT)
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    begins = np.repeat(ends - sizes, counts) + within * SEGMENT
    return np.stack([begins, np.minimum(begins + SEGMENT, np.repeat(ends, counts)), within == 0])
