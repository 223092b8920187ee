"""Pass@k against brute force, coverage of the intervals by simulation, Holm's correction."""

from itertools import combinations

import numpy as np
import pytest

from hybridrl_lib.report import statistics as stats

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
PROBLEM_SPREAD = 2.0  # of the logit: from about 5 % to about 95 % for two thirds of the problems


def chance(logit):
    """Logistic function."""
    return 1.0 / (1.0 + np.exp(-logit))


def true_mean(center, seed_spread, problem_spread=PROBLEM_SPREAD):
    """Mean score over the whole population of seeds and problems."""
    grid = chance(center + seed_spread * NODES[:, None] + problem_spread * NODES[None, :])
    return float(WEIGHTS @ grid @ WEIGHTS)


def draw(random, seeds, problems, center, seed_spread, hardness=None):
    """A (seeds, problems) table of right and wrong greedy answers."""
    if hardness is None:
        hardness = random.normal(0.0, PROBLEM_SPREAD, (1, problems))
    shift = random.normal(0.0, seed_spread, (seeds, 1))
    return (random.random((seeds, problems)) < chance(center + shift + hardness)).astype(float)


def coverage(seeds, problems, center, seed_spread, interval, repeats=1000):
    """Fraction of simulated intervals (low, high) that contain the true mean."""
    random = np.random.default_rng([seeds, problems, int(10 * abs(center)), int(100 * seed_spread)])
    truth = true_mean(center, seed_spread)
    hits = 0
    for _ in range(repeats):
        low, high = interval(draw(random, seeds, problems, center, seed_spread))
        hits += low <= truth <= high
    return hits / repeats


def crossed(scores):
    """The library's interval as a pair."""
    result = stats.mean_interval(scores)
    return result.low, result.high


def test_pass_at_k_and_signal_equal_brute_force_over_subsets():
    """Both estimators against all subsets, at their ends, for large counts, and impossible ones."""
    wrong = []
    for samples in (1, 2, 4, 5, 7):
        for right in range(samples + 1):
            verdicts = [1] * right + [0] * (samples - right)
            for k in range(1, samples + 1):
                subsets = list(combinations(verdicts, k))
                solved = sum(any(subset) for subset in subsets) / len(subsets)
                mixed = sum(0 < sum(subset) < k for subset in subsets) / len(subsets)
                if stats.pass_at_k(samples, right, k) != pytest.approx(solved, abs=1e-12) or (
                        stats.group_signal(samples, right, k) != pytest.approx(mixed, abs=1e-12)):
                    wrong.append((samples, right, k))
    assert not wrong
    right = np.arange(17)
    assert stats.pass_at_k(16, right, 1) == pytest.approx(right / 16)
    assert stats.pass_at_k(16, 0, 8) == 0.0
    assert np.all(stats.pass_at_k(16, right[9:], 8) == 1.0)
    assert 0.0 < stats.pass_at_k(100_000, 1, 50_000) < 1.0
    assert stats.pass_at_k(16, np.zeros((2, 3), dtype=int), 4).shape == (2, 3)
    for samples, right, k in [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)]:
        with pytest.raises(ValueError):
            stats.pass_at_k(samples, right, k)


def test_the_interval_covers():
    """95% intervals cover 95%; with one seed it is the textbook interval over problems."""
    cases = [(5, problems, 0.5, spread, 0.92, 0.98) for problems in (50, 128, 192, 500)
             for spread in (0.0, 0.1, 0.3)]
    cases += [(5, 192, center, 0.1, 0.92, 0.98) for center in (-4.0, -1.5, 4.0)]
    cases += [(3, 192, 0.5, spread, 0.90, 0.99) for spread in (0.0, 0.1, 0.3)]
    cases += [(5, 500, 0.5, 0.6, 0.92, 0.98)]  # seeds differ much: not all answers are independent
    wrong = [(case, found) for case in cases
             if not case[-2] <= (found := coverage(*case[:-2], crossed)) <= case[-1]]
    assert not wrong
    random = np.random.default_rng(3)
    scores = draw(random, 1, 500, 0.5, 0.0)
    result = stats.mean_interval(scores[0])
    error = scores.std(ddof=1) / np.sqrt(500)
    assert (result.seeds, result.problems) == (1, 500)
    assert result.high - result.low == pytest.approx(2 * 1.965 * error, rel=0.01)
    assert 0.92 <= coverage(1, 192, 0.5, 0.0, crossed) <= 0.98


def test_degenerate_tables():
    """0 of 50 does not prove 0% (Wilson), constants have a width, copies of a seed add nothing."""
    quantile = 2.0096  # Student's, 49 degrees of freedom
    for share in (0.0, 1.0):
        for seeds in (1, 5):
            result = stats.mean_interval(np.full((seeds, 50), share))
            assert result.mean == share
            assert 0.0 <= result.low <= share <= result.high <= 1.0
            assert result.high - result.low == pytest.approx(
                quantile**2 / (50 + quantile**2), rel=1e-3)
    for scores in ([[0.3] * 40] * 3, [[1.0]], [[0.5], [0.5]]):
        result = stats.mean_interval(scores)
        assert result.high - result.low > 0.05
    scores = draw(np.random.default_rng(1), 1, 200, 0.0, 0.0)
    once, copies = stats.mean_interval(scores), stats.mean_interval(np.repeat(scores, 5, axis=0))
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high))


def test_paired_difference_covers_and_rejects_at_its_level():
    """Intervals and p-values between setups (same problems), and of the gap (other problems)."""
    spread, repeats, wrong = 0.2, 600, []
    for one, other in ((5, 5), (5, 1), (3, 5)):
        random = np.random.default_rng([one, other])
        other_spread = 0.0 if other == 1 else spread  # a single row is the untrained base model
        truth = true_mean(1.0, spread) - true_mean(0.5, other_spread)
        hits = rejected = 0
        for _ in range(repeats):
            hardness = random.normal(0.0, PROBLEM_SPREAD, (1, 192))
            first = draw(random, one, 192, 1.0, spread, hardness)
            second = draw(random, other, 192, 0.5, other_spread, hardness)
            result = stats.paired_difference(first, second)
            hits += result.low <= truth <= result.high
            assert (result.p_value < 0.05) == (not result.low <= 0.0 <= result.high)
            same = draw(random, other, 192, 1.0, other_spread, hardness)
            rejected += stats.paired_difference(first, same).p_value < 0.05 if other > 1 else 0
        if not 0.92 <= hits / repeats <= 0.98 or rejected / repeats > 0.08:
            wrong.append((one, other, hits / repeats, rejected / repeats))
    assert not wrong
    for seeds in (1, 5):
        random = np.random.default_rng(seeds)
        common, own = (0.3, 0.2) if seeds > 1 else (0.0, 0.0)
        both = float(np.hypot(common, own))
        truth = true_mean(1.5, both) - true_mean(0.5, both)
        hits = 0
        for _ in range(600):
            shift = random.normal(0.0, common, (seeds, 1))
            train, test = (draw(random, seeds, problems, center, own,
                                shift + random.normal(0.0, PROBLEM_SPREAD, (1, problems)))
                           for center, problems in ((1.5, 250), (0.5, 150)))
            result = stats.gap_interval(train, test)
            hits += result.low <= truth <= result.high
        assert 0.92 <= hits / 600 <= 0.98, seeds


def test_pairing_narrows_and_swapping_flips():
    """Shared difficulty cancels, order flips the sign, twins are narrow, equality is no proof."""
    random = np.random.default_rng(8)
    hardness = random.normal(0.0, 3.0, (1, 300))
    first, second = (draw(random, 5, 300, center, 0.05, hardness) for center in (0.6, 0.2))
    result, flipped = stats.paired_difference(first, second), stats.paired_difference(second, first)
    shuffled = stats.paired_difference(first, random.permuted(second, axis=1))
    assert result.high - result.low < 0.7 * (shuffled.high - shuffled.low)
    assert (flipped.mean, flipped.low) == pytest.approx((-result.mean, -result.high))
    assert flipped.p_value == pytest.approx(result.p_value)
    random = np.random.default_rng(5)
    for _ in range(300):
        hardness = random.uniform(0.05, 0.95, (1, 128))
        first = random.binomial(16, np.repeat(hardness, 5, axis=0)) / 16
        moved = first + random.choice([-1, 0, 1], first.shape, p=[0.02, 0.96, 0.02]) / 16
        found = stats.paired_difference(first, np.clip(moved, 0.0, 1.0))
        assert -0.06 < found.low < found.high < 0.06
    ones, zeros = np.ones((5, 60)), np.zeros((5, 60))
    equal, opposite = stats.paired_difference(ones, ones), stats.paired_difference(ones, zeros)
    assert equal.p_value == 1.0 and equal.low < 0.0 < equal.high
    assert opposite.p_value < 1e-6 and opposite.low > 0.9 and opposite.high == 1.0


def test_holm_on_a_worked_example():
    """Holm's step-down rule, and tables that are refused: percent, NaN, empty, other problems."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.6]) == [1.0, 1.0]
    assert stats.holm([0.02]) == [0.02]
    assert stats.holm([]) == []
    for scores in ([[50.0, 60.0]], [[0.5, float("nan")]], [[]]):
        with pytest.raises(ValueError):
            stats.mean_interval(scores)
    with pytest.raises(ValueError):
        stats.paired_difference([[0.0, 1.0]], [[0.0, 1.0, 1.0]])
    with pytest.raises(ValueError):
        stats.gap_interval(np.ones((2, 3)), np.ones((3, 3)))
