"""How far a difference depends on which part of the text was read: a confidence interval.

Blocks of a text that follow each other resemble each other, so resampling them one by one gives an
interval that is too narrow.
"""

from math import cos, floor, pi, sin, sqrt

import numpy as np

CONFIDENCE = 0.95
LEAST = 20  # blocks; of fewer, the interval says nothing


def interval(differences: np.ndarray, compared: int = 2) -> tuple[float, float]:
    """The 95 % interval of the sum of differences, one for each block of a text in its order.

    The variance of the sum is estimated by the equal-weighted cosine estimator: the mean square of
    the first v = 0.41 n^(2/3) cosine transforms of n blocks, which holds for correlated blocks.
    The quantile is that of Student's t with v degrees of freedom.
    compared: how many are compared with each other; all their pairs then have 95 % together
    (Bonferroni), so that the best of them may be chosen by the same figures.
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
    """The t with the share `outside` of Student's distribution beyond -t and t."""
    low, high = 0.0, pi / 2  # atan(t / sqrt(degrees))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(degrees, middle) < 1 - outside else (low, middle)
    return sqrt(degrees) * sin(low) / cos(low)


def _within(degrees: int, angle: float) -> float:
    """The share of Student's distribution from -t to t, where angle is atan(t / sqrt(degrees)).

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, equations 26.7.3 and 26.7.4.
    """
    odd = degrees % 2
    term, total = cos(angle) if odd else 1.0, 0.0
    for i in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cos(angle) ** 2 * (i - 1) / i
    return (angle + sin(angle) * total) * 2 / pi if odd else sin(angle) * total
