import math
import random
import statistics

import pytest

from vllm.benchmarks import stats
from vllm.benchmarks.stats import (
    FASTER,
    NO_DIFFERENCE,
    SLOWER,
    bootstrap_interval,
    compare_groups,
    compare_rounds,
    percentile,
    rounds_needed,
)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 400)


def rounds(draw, n, effect=1.0, noise=0.03, drift=0.003, disturbed=0.1):
    """Speeds of two variants on a machine that drifts, with noise, and rounds in which something else ran."""
    a, b, level = [], [], 0.0
    for _ in range(n):
        for values, factor in ((a, 1.0), (b, effect)):
            level += draw.gauss(0, drift)
            slow = draw.uniform(0.4, 0.9) if draw.random() < disturbed else 1.0
            values.append(factor * slow * math.exp(level + draw.gauss(0, noise)))
    return a, b


@pytest.mark.parametrize(("n", "noise"), [(8, 0.03), (10, 0.1), (20, 0.005)])
def test_a_thing_beside_itself_shows_no_difference(n, noise):
    """At a confidence of 0.99, a false verdict in more than 3 of 100 comparisons would be too many."""
    draw = random.Random(n)
    verdicts = [compare_rounds(*rounds(draw, n, noise=noise)).verdict for _ in range(300)]
    assert verdicts.count(NO_DIFFERENCE) >= 0.97 * len(verdicts)


def test_a_real_difference_is_shown():
    draw = random.Random(0)
    assert [compare_rounds(*rounds(draw, 20, effect=1.15)).verdict for _ in range(40)].count(FASTER) >= 35
    assert [compare_rounds(*rounds(draw, 20, effect=0.85)).verdict for _ in range(40)].count(SLOWER) >= 35


def test_the_ratio_is_where_the_effect_is():
    found = compare_rounds(*rounds(random.Random(1), 40, effect=1.25, noise=0.01))
    assert (
        found.value == pytest.approx(1.25, rel=0.02) and found.low < 1.25 < found.high and found.high - found.low < 0.05
    )


def test_less_than_the_least_effect_is_no_difference():
    a, b = rounds(random.Random(2), 20, effect=1.005, noise=1e-5, drift=0, disturbed=0)
    assert compare_rounds(a, b).low > 1 and compare_rounds(a, b).verdict == NO_DIFFERENCE
    assert compare_rounds(a, b, min_effect=0.001).verdict == FASTER
    assert compare_rounds(b, a, min_effect=0.001).verdict == SLOWER


def test_too_few_rounds_have_no_bounds():
    assert (rounds_needed(0.99), rounds_needed(0.95)) == (8, 6)
    a, b = rounds(random.Random(3), 7, effect=2.0, noise=0.001, disturbed=0)
    found = compare_rounds(a, b)
    assert found.value == pytest.approx(2, rel=0.1) and found.verdict == NO_DIFFERENCE and found.high == math.inf
    assert compare_rounds(a, b, confidence=0.95).verdict == FASTER


def test_the_interval_holds_the_median_as_often_as_it_says():
    draw, held = random.Random(4), 0
    for _ in range(200):
        low, high = bootstrap_interval(
            [draw.gauss(5, 1) for _ in range(12)], statistics.median, 0.95, seed=draw.randrange(99)
        )
        held += low <= 5 <= high
    assert 0.90 <= held / 200 <= 1


def test_runs_that_are_not_paired():
    slow, fast = [100, 101, 99, 100.5, 99.5], [110, 111, 109, 110.5, 109.5]
    assert compare_groups(slow, fast).verdict == FASTER and compare_groups(fast, slow).verdict == SLOWER
    assert compare_groups(slow, slow).verdict == NO_DIFFERENCE
    single = compare_groups([100], [120])
    assert single.value == pytest.approx(1.2) and single.verdict == NO_DIFFERENCE


@pytest.mark.parametrize(
    ("degrees", "p", "quantile"),
    [(1, 0.995, 63.657), (2, 0.995, 9.925), (4, 0.975, 2.776), (9, 0.995, 3.250), (30, 0.975, 2.042)],
)
def test_students_quantiles_are_those_of_the_tables(degrees, p, quantile):
    assert stats._student_quantile(p, degrees) == pytest.approx(quantile, abs=1e-3)


def test_percentiles_are_numpys():
    import numpy

    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for p in (0, 10, 50, 75, 99, 100):
        assert percentile(values, p) == pytest.approx(numpy.percentile(values, p))


def test_rounds_must_be_paired():
    with pytest.raises(ValueError, match="paired rounds are needed; got 2 and 1"):
        compare_rounds([1, 2], [1])
