"""Pass@k, intervals that cross seeds and problems, paired differences, Holm's correction.

Every score is a share in [0, 1]. A setup is trained with S seeds and each seed is scored on the
same P problems, so scores form a table (S, P) with two sources of chance:

    score[s, p] = mean + seed[s] + problem[p] + rest[s, p]
    Var(mean over the table) = Var(seed)/S + Var(problem)/P + Var(rest)/(S P)

The standard error of a benchmark score usually printed keeps the second term alone; over the seeds
alone it would keep the first. Both are estimated here from the mean squares of the two-way
table (methods.md section 10.4; Searle, Casella, McCulloch, "Variance Components", 1992), and the
degrees of freedom by Satterthwaite's rule, because five seeds do not make a normal distribution.
Nothing here imports torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
SIGNIFICANT = 0.05  # Holm's p below which a difference is more than chance
# Below this a variance is rounding: one answer in a million that differs gives more.
_NO_VARIANCE = 1e-20


def pass_at_k(samples: int, right: ArrayLike, k: int) -> np.ndarray:
    """Unbiased Pass@k = 1 - C(m-c, k) / C(m, k) (paper section 1; Chen et al. 2021).

    Written as a product, 1 - prod_{i = m-c+1..m} (1 - k/i), so that no binomial overflows.

    Args:
        samples: m, the samples drawn for each problem.
        right: c, how many of them are right; any shape, values 0..m.
        k: 1..m.

    Returns:
        Pass@k of each problem, the shape of `right`; 1 where fewer than k samples are wrong.

    Raises:
        ValueError: k is not in 1..m, or some c is not in 0..m.
    """
    right = np.asarray(right)
    if not 1 <= k <= samples:
        raise ValueError(f"Pass@{k} needs k >= 1 and {k} samples a problem or more, not {samples}.")
    if right.size and (right.min() < 0 or right.max() > samples):
        raise ValueError(f"The number of right samples has to lie in 0..{samples}.")
    # all_wrong[c] = probability that k samples out of m, c of them right, are all wrong
    all_wrong = np.ones(samples + 1)
    for count in range(1, samples + 1):
        all_wrong[count] = all_wrong[count - 1] * max(0.0, 1.0 - k / (samples - count + 1))
    return 1.0 - all_wrong[right.astype(int)]


def group_signal(samples: int, right: ArrayLike, group: int) -> np.ndarray:
    """Chance that a group of G answers is neither all right nor all wrong, so that RL learns.

    Unbiased, from c right samples out of m as Pass@k is: Pass@G of the right ones, plus Pass@G of
    the wrong ones, minus 1.

    Args:
        samples, right: m and c, as for `pass_at_k`.
        group: G, 1..m.

    Returns:
        The chance of each problem, the shape of `right`.

    Raises:
        ValueError: as `pass_at_k`.
    """
    right = np.asarray(right)
    return pass_at_k(samples, right, group) + pass_at_k(samples, samples - right, group) - 1.0


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and problems with its confidence interval, as shares.

    `seeds` or `problems` of 1 means that this source of chance could not be seen: with one seed the
    interval is over problems alone and says nothing about another training run.
    """

    mean: float
    low: float
    high: float
    seeds: int
    problems: int


@dataclass(frozen=True)
class Difference:
    """The mean of one setup minus another's, with its interval and two-sided p-value, as shares.

    `seeds` holds the seeds of the first and of the second setup.
    """

    mean: float
    low: float
    high: float
    p_value: float
    seeds: tuple[int, int]
    problems: int


@dataclass(frozen=True)
class _Term:
    """One mean square's share in the variance of a mean, and its degrees of freedom."""

    variance: float
    freedom: float


def mean_interval(scores: ArrayLike, level: float = LEVEL) -> Interval:
    """Mean of a (seeds, problems) table with an interval that crosses both.

    The interval has Wilson's form, so that it stays within [0, 1] and never has zero width: the
    number of problems is replaced by the number of independent ones that would give the same
    variance, and the normal quantile by Student's. Where no variance can be seen (all right, all
    wrong, one problem) that number is P, as if all seeds repeated one another.

    Args:
        scores: (S, P), or (P,) for one seed; shares in [0, 1].
        level: coverage aimed at.

    Raises:
        ValueError: the table is empty, holds a gap, or leaves [0, 1].
    """
    scores = _table(scores)
    seeds, problems = scores.shape
    mean = float(scores.mean())
    terms = [_problem_term(scores.mean(axis=0)), *_seed_terms(scores)]
    variance, freedom = _combine(terms)
    spread = mean * (1.0 - mean)
    if variance > _NO_VARIANCE and spread > 0.0:
        independent = spread / variance
    else:
        independent, freedom = float(problems), max(problems - 1.0, 1.0)
    low, high = _wilson(mean, independent, _quantile(freedom, level))
    return Interval(mean, low, high, seeds, problems)


def paired_difference(first: ArrayLike, second: ArrayLike, level: float = LEVEL) -> Difference:
    """First minus second setup, scored on the same problems, with interval and p-value.

    Problems are paired: what makes a problem hard for both setups cancels. Seeds are not: seed 3 of
    one setup shares little with seed 3 of another, and where it shares something (the order of the
    SFT batches) counting it as independent makes the interval too wide, not too narrow.

    Args:
        first: (S1, P) shares in [0, 1]; a single row adds no variance between seeds.
        second: (S2, P), the same problems in the same order.
        level: coverage aimed at.

    Raises:
        ValueError: the numbers of problems differ, or a table is empty or holds a gap.
    """
    first, second = _table(first), _table(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError("A paired difference needs the same problems in both setups.")
    by_problem = first.mean(axis=0) - second.mean(axis=0)
    terms = [_problem_term(by_problem), *_seed_terms(first), *_seed_terms(second)]
    return _difference(float(by_problem.mean()), terms, (len(first), len(second)),
                       first.shape[1], level)


def gap_interval(train: ArrayLike, test: ArrayLike, level: float = LEVEL) -> Difference:
    """Mean on the training problems minus mean on the test problems, of the same seeds.

    The problems are different ones, so there are two problem terms. The seeds are the same: the
    seed term is that of each seed's own gap, and a seed that is better on both parts adds nothing.

    Args:
        train: (S, P1) shares in [0, 1].
        test: (S, P2), the same seeds in the same order.
        level: coverage aimed at.

    Raises:
        ValueError: the numbers of seeds differ, or a table is empty or holds a gap.
    """
    train, test = _table(train), _table(test)
    if len(train) != len(test):
        raise ValueError("The gap needs the same seeds on the training and on the test problems.")
    seeds = len(train)
    terms = [_problem_term(train.mean(axis=0)), _problem_term(test.mean(axis=0))]
    if seeds > 1:
        gaps = train.mean(axis=1) - test.mean(axis=1)
        rest = [_Term(-_rest_mean_square(part) / part.size, (seeds - 1.0) * (part.shape[1] - 1.0))
                for part in (train, test) if part.shape[1] > 1]
        terms += _not_negative([_Term(float(gaps.var(ddof=1)) / seeds, seeds - 1.0), *rest])
    return _difference(float(train.mean() - test.mean()), terms, (seeds, seeds),
                       min(train.shape[1], test.shape[1]), level)


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of one false claim in the family is at most level.

    Args:
        p_values: of the whole family, in any order.

    Returns:
        Adjusted p-values in the same order, never above 1.
    """
    values = list(p_values)
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def _table(scores: ArrayLike) -> np.ndarray:
    """The scores as floats (S, P), checked."""
    scores = np.atleast_2d(np.asarray(scores, dtype=float))
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError("Scores have to be a table of seeds x problems with at least one of each.")
    if not np.all((scores >= 0.0) & (scores <= 1.0)):
        raise ValueError("Scores have to be shares between 0 and 1, without gaps.")
    return scores


def _problem_term(by_problem: np.ndarray) -> _Term:
    """Variance of the mean that comes from the choice of problems: Var(seed mean of each)/P."""
    problems = len(by_problem)
    if problems < 2:
        return _Term(0.0, 1.0)
    return _Term(float(by_problem.var(ddof=1)) / problems, problems - 1.0)


def _seed_terms(scores: np.ndarray) -> list[_Term]:
    """What the choice of seeds adds: Var(seed means)/S, less the rest in it.

    The problem term holds that rest already; counting it twice would widen every interval.
    """
    seeds, problems = scores.shape
    if seeds < 2:
        return []
    terms = [_Term(float(scores.mean(axis=1).var(ddof=1)) / seeds, seeds - 1.0)]
    if problems > 1:
        terms.append(_Term(-_rest_mean_square(scores) / scores.size,
                           (seeds - 1.0) * (problems - 1.0)))
    return _not_negative(terms)


def _rest_mean_square(scores: np.ndarray) -> float:
    """Mean square of what neither the seed nor the problem explains."""
    rest = (scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean())
    return float((rest**2).sum()) / ((scores.shape[0] - 1) * (scores.shape[1] - 1))


def _not_negative(terms: list[_Term]) -> list[_Term]:
    """The terms of one variance component, or none where its estimate falls below zero."""
    return terms if sum(term.variance for term in terms) > 0.0 else []


def _combine(terms: Sequence[_Term]) -> tuple[float, float]:
    """Sum of the terms and Satterthwaite's degrees of freedom (1 where the sum is zero).

    A sum of mean squares has at least the fewest degrees of freedom among them. Fewer come out
    where what is subtracted nearly cancels what is added, as for two setups that hardly differ: the
    rule does not hold there, and Student's quantile grows without end. Then nothing is subtracted,
    which counts the rest twice and makes the interval too wide, not too narrow.
    """
    variance = math.fsum(term.variance for term in terms)
    if variance <= 0.0:
        return 0.0, 1.0
    freedom = _satterthwaite(terms)
    added = [term for term in terms if term.variance > 0.0]
    if freedom >= min(term.freedom for term in added):
        return variance, freedom
    return math.fsum(term.variance for term in added), _satterthwaite(added)


def _satterthwaite(terms: Sequence[_Term]) -> float:
    return math.fsum(term.variance for term in terms) ** 2 / math.fsum(
        term.variance**2 / term.freedom for term in terms)


def _quantile(freedom: float, level: float) -> float:
    """Student's two-sided quantile."""
    return float(stdtrit(freedom, 0.5 + level / 2.0))


def _wilson(mean: float, independent: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval for a share seen in `independent` trials."""
    weight = quantile**2 / independent
    centre = (mean + weight / 2.0) / (1.0 + weight)
    half = quantile / (1.0 + weight) * math.sqrt(
        mean * (1.0 - mean) / independent + (quantile / (2.0 * independent)) ** 2)
    # At a mean of exactly 0 or 1 the bound is exact; rounding must not push the mean outside.
    return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def _difference(mean: float, terms: Sequence[_Term], seeds: tuple[int, int], problems: int,
                level: float) -> Difference:
    variance, freedom = _combine(terms)
    if variance > _NO_VARIANCE:
        error = math.sqrt(variance)
        half = _quantile(freedom, level) * error
        p_value = 2.0 * float(stdtr(freedom, -abs(mean) / error))
    else:
        # All problems differ by the same amount, mostly by nothing. Wilson's bound for "none of P
        # problems deviates" is the width then, and the sign test gives the p-value.
        half = _wilson(0.0, float(problems), _quantile(max(problems - 1.0, 1.0), level))[1]
        p_value = min(1.0, 2.0 ** (1 - problems)) if mean else 1.0
    return Difference(mean, max(-1.0, mean - half), min(1.0, mean + half), p_value, seeds, problems)
