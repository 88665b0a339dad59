"""The confidence interval of a difference between two models on a text.

Neighbouring blocks of a text are correlated.  An interval that takes them as independent, such as
that of a plain bootstrap, is too narrow.
"""

from math import cos, floor, pi, sin, sqrt, tan

import numpy as np

CONFIDENCE = 0.95
LEAST = 20  # blocks; with fewer, the estimate of the variance is too poor


def interval(differences: np.ndarray, compared: int = 2) -> tuple[float, float]:
    """The 95 % interval of the sum of `differences`, one for each block of a text, in order.

    The variance of the sum is estimated by the equal-weighted cosine estimator: the mean square of
    the first v = 0.41 n^(2/3) cosine transforms of the n differences.  It is valid for correlated
    blocks.  The quantile is that of Student's t with v degrees of freedom.
    compared: the number of models in the comparison.  The intervals of all their pairs hold with
    95 % together (Bonferroni), so the best model may be chosen by the same figures.
    Source: Lazarus, Lewis, Stock and Watson, HAR Inference: Recommendations for Practice, Journal
    of Business & Economic Statistics 36, 2018.
    """
    n = len(differences)
    degrees = floor(0.41 * n ** (2 / 3))
    waves = np.cos(pi * np.outer(np.arange(1, degrees + 1), np.arange(n) + 0.5) / n)
    variance = float(np.mean((waves @ differences) ** 2)) * 2  # of the sum
    pairs = compared * (compared - 1) // 2
    total, reach = float(differences.sum()), student_t(degrees, (1 - CONFIDENCE) / pairs)
    return total - reach * sqrt(variance), total + reach * sqrt(variance)


def student_t(degrees: int, outside: float) -> float:
    """The t for which the share `outside` of Student's distribution lies beyond -t and t.

    Found by bisection over the angle atan(t / sqrt(degrees)), which is between 0 and pi / 2.
    """
    low, high = 0.0, pi / 2
    for _ in range(60):  # halvings, more than float64 has bits
        middle = (low + high) / 2
        low, high = (middle, high) if _within(degrees, middle) < 1 - outside else (low, middle)
    return sqrt(degrees) * tan(low)


def _within(degrees: int, angle: float) -> float:
    """The share of Student's distribution between -t and t, for angle = atan(t / sqrt(degrees)).

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, equations 26.7.3 (odd
    degrees) and 26.7.4 (even degrees).
    """
    odd = degrees % 2
    term, total = cos(angle) if odd else 1.0, 0.0
    for i in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cos(angle) ** 2 * (i - 1) / i
    return (angle + sin(angle) * total) * 2 / pi if odd else sin(angle) * total
