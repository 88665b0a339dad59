"""A model mixed with an online context model, which learns the text while it is scored.

The probability of a symbol is w p + (1 - w) q, with p of the model and q of the context model
(`ppm`).  The weight w is the mean of 32 fixed weights, each as likely as its mixture made the
symbols before (a Bayesian mixture).  So nothing depends on symbols that were not yet scored, and
the whole text costs at most 5 bits more than with the best of the 32 weights.
"""

# N symbols, W weights

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from seqlm.errors import UsageError
from seqlm.evaluation import ppm
from seqlm.evaluation.evaluate import Score, finite
from seqlm.evaluation.passage import Passage

WEIGHTS = (np.arange(32) + 0.5) / 32  # of the model; neither 0 nor 1, so that logarithms are finite
LONGEST_CONTEXT = 32  # cap on the length of a context; time is proportional to the length
START = 4_000_000  # cap on the symbols of the training text, for about 1 GB of memory


class Mixing(NamedTuple):
    """The context model that is mixed with a model."""

    order: int  # length of its longest context, in symbols
    trained_on: Passage | None = None  # the text that it starts from; None: it starts from nothing

    @property
    def name(self) -> str:
        return f"ppm:{self.order}"

    @property
    def source(self) -> str:
        """The text that was counted before the first symbol is scored."""
        return "none" if self.trained_on is None else "train"


class Mixed(NamedTuple):
    """The scores of a mixture and of the context model alone.  Neither counts correct symbols."""

    score: Score
    alone: Score
    weight: float  # of the model, after the last symbol


def order_of(text: str) -> int:
    """N of 'ppm:N'; UsageError for any other text."""
    found = re.fullmatch(r"ppm:(\d{1,2})", text)
    if found is None or not 1 <= int(found[1]) <= LONGEST_CONTEXT:
        raise UsageError(
            f"--mix {text}: it must be ppm:N, with N the length of the longest context in symbols, "
            f"from 1 to {LONGEST_CONTEXT}. Give ppm:5."
        )
    return int(found[1])


def score(
    judged: Iterable[tuple[np.ndarray, Tensor]], passage: Passage, vocabulary: int, mixing: Mixing
) -> Mixed:
    """Mix what a model computed with the context model.

    judged: the values of `loss_and_hit` with their offsets in the passage, as `each_symbol` yields
    them.  vocabulary: the number of symbols that the model knows.
    """
    counted = costs(passage, vocabulary, mixing)
    alone, totals = 0.0, np.zeros(len(WEIGHTS))
    for places, values in judged:
        model, context = values[0].numpy()[:, None], counted[places][:, None]  # (n, 1)
        totals -= np.logaddexp(np.log(WEIGHTS) - model, np.log1p(-WEIGHTS) - context).sum(0)
        alone += float(context.sum())
    # the probability of a text by a Bayesian mixture is the mean of those by its parts
    least = totals.min()
    parts = np.exp(least - totals)
    nats = float(least - np.log(parts.mean()))
    rest = float("nan"), passage.tokens, passage.chars, passage.bytes
    weight = float(parts @ WEIGHTS / parts.sum())
    return Mixed(finite(Score(nats, *rest)), Score(alone, *rest), weight)


def costs(passage: Passage, vocabulary: int, mixing: Mixing) -> np.ndarray:
    """-ln p of each symbol of a passage by the context model alone, (N,)."""
    texts = [*([mixing.trained_on] if mixing.trained_on else []), passage]
    symbols, begins, done = [], [], 0
    for text in texts:
        part = text.symbols if text is passage else text.symbols[-START:]
        ends = np.array([]) if text.ends is None else text.ends - (len(text.symbols) - len(part))
        starts = np.append(0, ends[(ends > 0) & (ends < len(part))]).astype(np.int64)
        symbols.append(part)
        begins.append(starts + done)
        done += len(part)
    whole = np.concatenate(symbols)
    found = ppm.costs(whole, np.concatenate(begins), vocabulary, mixing.order)
    return found[-len(passage.symbols) :]
