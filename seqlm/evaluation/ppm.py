"""An online context model (PPM): each symbol is predicted from the counts of what came before it.

The counts of a context are those of the symbols that followed it.  A symbol that is new in a
context counts in the next shorter one, too; any other does not (update exclusion, Moffat 1990,
doi 10.1109/26.61469).  The prediction from a context is interpolated with that from the next
shorter one (Kneser-Ney, Chen and Goodman 1999, doi 10.1006/csla.1999.0128).
"""

# N symbols, V vocabulary

from collections.abc import Iterator

import numpy as np

DISCOUNT = 0.75  # taken from each count, for what a context has not yet seen


def costs(symbols: np.ndarray, begins: np.ndarray, vocabulary: int, order: int) -> np.ndarray:
    """-ln p of each symbol given those before it, (N,) float64.

    symbols: (N,) of 0 .. V - 1.  begins: the offsets at which documents begin; no context reaches
    over them, but the counts stay.  order: length of the longest context, in symbols.
    With n(s) the count of symbol s in a context of length k, n their sum over s, and d the number
    of symbols that have a count,

        p_k(s) = (max(n(s) - DISCOUNT, 0) + DISCOUNT d p_{k-1}(s)) / n,    p_{-1}(s) = 1 / V,

    and p_k = p_{k-1} in a context without counts.  So the probabilities of all V symbols have the
    sum 1, whatever the counts are.
    """
    p = np.full(len(symbols), 1 / vocabulary)
    for context, pair, counted in _lengths(symbols, begins, vocabulary, order):
        own, total = pair.before(counted), context.before(counted)
        discounts = DISCOUNT * context.before(pair.first())
        interpolated = np.maximum(own - DISCOUNT, 0) + discounts * p
        np.divide(interpolated, total, out=p, where=total > 0)
    return -np.log(p)


class _Groups:
    """The places of a text that have equal keys, in the text's order."""

    def __init__(self, keys: np.ndarray):
        self.places = np.argsort(keys, kind="stable")
        ordered = keys[self.places]
        new = np.append(True, ordered[1:] != ordered[:-1])
        self.starts, self.numbers = np.flatnonzero(new), np.cumsum(new) - 1

    def number(self) -> np.ndarray:
        """The number of each place's group, (N,)."""
        return self._in_text(self.numbers)

    def first(self) -> np.ndarray:
        """1 for the first place of each group, and else 0: (N,)."""
        found = np.zeros(len(self.places))
        found[self.places[self.starts]] = 1
        return found

    def before(self, values: np.ndarray) -> np.ndarray:
        """The sum of the values at the earlier places of the same group, (N,).

        Exact for integers.
        """
        ordered = values[self.places]
        sums = np.cumsum(ordered) - ordered
        return self._in_text(sums - sums[self.starts][self.numbers])

    def _in_text(self, ordered: np.ndarray) -> np.ndarray:
        found = np.empty_like(ordered)
        found[self.places] = ordered
        return found


def _lengths(
    symbols: np.ndarray, begins: np.ndarray, vocabulary: int, order: int
) -> Iterator[tuple[_Groups, _Groups, np.ndarray]]:
    """For each length of a context, from 0 to `order`: the places grouped by their contexts, and by
    their contexts and symbols, and 1 for each place that counts, else 0: (N,)."""
    keys = np.zeros(len(symbols), dtype=np.int64)
    contexts, pairs = _Groups(keys), _Groups(keys + symbols)
    for _ in range(order):
        keys = np.roll(pairs.number() + 1, 1)
        keys[begins] = 0  # the context at the beginning of a document, of any length
        longer = _Groups(keys), _Groups(keys * vocabulary + symbols)
        yield contexts, pairs, longer[1].first()
        contexts, pairs = longer
    yield contexts, pairs, np.ones(len(symbols))
