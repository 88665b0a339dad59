"""Several models as one: the mean of their probabilities."""

# B batch, T time, V vocabulary

from collections.abc import Iterable, Sequence
from itertools import chain
from math import log
from typing import cast

import torch
from torch import Tensor, nn

from seqlm.cells import State
from seqlm.model import LanguageModel


class Ensemble(LanguageModel):
    """A model whose probabilities are the mean of those of several models.

    The models read the same symbols, and may differ in everything else.  The models of an ensemble
    among them count as models of their own, so that all weigh the same.  The logits are logarithms
    of probabilities.  The state is that of the first model, then that of the second, and so on.
    """

    def __init__(self, models: Sequence[LanguageModel]):
        nn.Module.__init__(self)
        self.models = nn.ModuleList(
            alone
            for model in models
            for alone in (model._models() if isinstance(model, Ensemble) else [model])
        )
        self.vocab_size, self.embedding = models[0].vocab_size, models[0].embedding
        self.parts = [len(model.initial_state(1)) for model in self._models()]

    def initial_state(self, batch: int) -> State:
        return tuple(chain.from_iterable(model.initial_state(batch) for model in self._models()))

    def temper(self, temperature: float) -> None:
        """Each model's logits are divided, before the mean of the probabilities is taken."""
        for model in {*self._models()}:  # one of them may be there several times
            model.temper(temperature)

    def _models(self) -> Iterable[LanguageModel]:
        return cast(Iterable[LanguageModel], self.models)

    def _run(self, form: str, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
        rest = self.initial_state(len(tokens)) if state is None else state
        logs, end = [], ()
        for model, parts in zip(self.models, self.parts, strict=True):
            logits, new = getattr(model, form)(tokens, rest[:parts])
            logs.append(torch.log_softmax(logits.float(), dim=-1))
            rest, end = rest[parts:], end + new
        return torch.logsumexp(torch.stack(logs), dim=0) - log(len(logs)), end
