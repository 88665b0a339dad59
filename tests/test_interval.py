"""The interval of `compare` has its stated coverage, also for correlated blocks."""

import math

import numpy as np
import pytest

from seqlm.lab.interval import interval, student_t


def correlated(random, correlation: float, *shape: int) -> np.ndarray:
    """Series around 0 in which neighbours have this correlation."""
    series = random.normal(size=shape)
    series[..., 0] /= math.sqrt(1 - correlation**2)
    for t in range(1, shape[-1]):
        series[..., t] += correlation * series[..., t - 1]
    return series


@pytest.mark.parametrize("correlation", [0.0, 0.26, 0.58])
@pytest.mark.parametrize("blocks", [20, 111, 400])
def test_the_interval_covers_the_mean_of_correlated_blocks(blocks, correlation):
    """The correlations are 0, and the lowest and highest measured between cells."""
    series = correlated(np.random.default_rng(0), correlation, 800, blocks)
    covered = [low <= 0 <= high for low, high in map(interval, series)]
    assert 0.91 < np.mean(covered) < 0.98


@pytest.mark.parametrize("correlation", [0.0, 0.58])
def test_eight_equal_cells_rarely_give_an_interval_that_excludes_zero(correlation):
    """Each cell is compared with the best; without a correction, half the comparisons failed."""
    series, wrong = correlated(np.random.default_rng(0), correlation, 300, 8, 111), 0
    for cells in series:
        best = cells[cells.sum(1).argmin()]
        lows = [interval(cell - best, 8)[0] for cell in cells if cell is not best]
        wrong += any(low > 0 for low in lows)
    assert wrong / 300 < 0.08


def test_the_interval_moves_with_a_difference_and_is_as_wide_as_the_normal_distributions():
    noise = np.random.default_rng(1).normal(0, 1, 20_000)
    low, high = interval(noise - noise.mean() + 0.2)
    assert 0 < low < 4000 < high and (low + high) / 2 == pytest.approx(4000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(20_000), rel=0.1)


def test_equal_blocks_have_an_interval_of_no_width():
    assert interval(np.full(50, 0.5)) == pytest.approx((25.0, 25.0))


@pytest.mark.parametrize(
    "degrees, outside, t",
    [
        (1, 0.05, 12.706),
        (2, 0.05, 4.303),
        (3, 0.05, 3.182),
        (8, 0.05, 2.306),
        (9, 0.01, 3.250),
        (30, 0.05, 2.042),
        (120, 0.001, 3.373),
    ],
)
def test_the_quantiles_are_those_of_the_printed_tables(degrees, outside, t):
    assert student_t(degrees, outside) == pytest.approx(t, abs=6e-4)
