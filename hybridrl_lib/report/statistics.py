"""Pass@k, intervals over seeds and problems, paired differences, and Holm's correction.

Every score is a share in [0, 1]. A setup is trained with S seeds, and each is scored on the same P
problems. The scores form a table (S, P) with two sources of variance:

    score[s, p] = mean + seed[s] + problem[p] + rest[s, p]
    Var(mean over the table) = Var(seed)/S + Var(problem)/P + Var(rest)/(S P)

The usual standard error of a benchmark score has only the second term; one over seeds has only the
first. Here all terms are estimated from the mean squares of the two-way table (Searle, Casella,
McCulloch, "Variance Components", 1992), with Satterthwaite's degrees of freedom because there are
few seeds. Nothing here imports torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
SIGNIFICANT = 0.05  # level for p after Holm's correction
# A smaller variance is rounding; one different answer in a million gives more.
_NO_VARIANCE = 1e-20


def pass_at_k(samples: int, right: ArrayLike, k: int) -> np.ndarray:
    """Unbiased Pass@k = 1 - C(m-c, k) / C(m, k) (paper, section 1; Chen et al., 2021).

    Computed as 1 - prod_{i = m-c+1..m} (1 - k/i), which cannot overflow.

    Args:
        samples: m, samples per problem.
        right: c, how many of them are correct; any shape, values 0..m.
        k: 1..m.

    Returns:
        Pass@k of each problem, in the shape of `right`; 1 if fewer than k samples are wrong.

    Raises:
        ValueError: k is not in 1..m, or some c is not in 0..m.
    """
    right = np.asarray(right)
    if not 1 <= k <= samples:
        raise ValueError(f"Pass@{k} needs k >= 1 and at least {k} samples per problem, not "
                         f"{samples}.")
    if right.size and (right.min() < 0 or right.max() > samples):
        raise ValueError(f"The number of right samples has to lie in 0..{samples}.")
    # all_wrong[c] = probability that k samples out of m, c of them right, are all wrong
    all_wrong = np.ones(samples + 1)
    for count in range(1, samples + 1):
        all_wrong[count] = all_wrong[count - 1] * max(0.0, 1.0 - k / (samples - count + 1))
    return 1.0 - all_wrong[right.astype(int)]


def group_signal(samples: int, right: ArrayLike, group: int) -> np.ndarray:
    """Probability that a group of G answers is neither all correct nor all wrong, so RL can learn.

    Unbiased: Pass@G of the correct samples, plus Pass@G of the wrong ones, minus 1.

    Args:
        samples, right: m and c, as for `pass_at_k`.
        group: G, 1..m.

    Returns:
        The probability for each problem, in the shape of `right`.

    Raises:
        ValueError: as `pass_at_k`.
    """
    right = np.asarray(right)
    return pass_at_k(samples, right, group) + pass_at_k(samples, samples - right, group) - 1.0


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and problems with its confidence interval, as shares.

    With one seed the interval covers problems only, and nothing about another training run.
    """

    mean: float
    low: float
    high: float
    seeds: int
    problems: int


@dataclass(frozen=True)
class Difference:
    """One setup's mean minus another's, with its interval and two-sided p-value, as shares.

    `seeds` are the numbers of seeds of the two setups.
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
    """Mean of a (seeds, problems) table with an interval over both.

    The interval has Wilson's form, so it stays within [0, 1] and is never empty. The number of
    problems is replaced by the number of independent ones with the same variance, and the normal
    quantile by Student's. If the variance is 0 (all correct, all wrong, one problem), that number
    is P, as if all seeds were copies.

    Args:
        scores: (S, P), or (P,) for one seed; shares in [0, 1].
        level: nominal coverage.

    Raises:
        ValueError: the table is empty, or a value is missing or outside [0, 1].
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
    """First minus second setup on the same problems, with interval and p-value.

    Problems are paired, so their difficulty cancels. Seeds are not: equal seeds of two setups share
    at most the order of SFT batches, and treating them as independent can only widen the interval.

    Args:
        first: (S1, P) shares in [0, 1]; a single row adds no variance between seeds.
        second: (S2, P), the same problems in the same order.
        level: nominal coverage.

    Raises:
        ValueError: the numbers of problems differ, a table is empty, or a value is missing.
    """
    first, second = _table(first), _table(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError("A paired difference needs the same problems in both setups.")
    by_problem = first.mean(axis=0) - second.mean(axis=0)
    terms = [_problem_term(by_problem), *_seed_terms(first), *_seed_terms(second)]
    return _difference(float(by_problem.mean()), terms, (len(first), len(second)),
                       first.shape[1], level)


def gap_interval(train: ArrayLike, test: ArrayLike, level: float = LEVEL) -> Difference:
    """Mean on training problems minus mean on test problems, of the same seeds.

    There are two problem terms, since the problems differ. The seed term is the variance of each
    seed's own gap.

    Args:
        train: (S, P1) shares in [0, 1].
        test: (S, P2), the same seeds in the same order.
        level: nominal coverage.

    Raises:
        ValueError: the numbers of seeds differ, a table is empty, or a value is missing.
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
    """Holm's step-down correction, which controls the family-wise error rate.

    Args:
        p_values: of the whole family, in any order.

    Returns:
        Adjusted p-values in the same order, at most 1.
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
    """Variance of the mean from the choice of problems: Var(mean over seeds)/P."""
    problems = len(by_problem)
    if problems < 2:
        return _Term(0.0, 1.0)
    return _Term(float(by_problem.var(ddof=1)) / problems, problems - 1.0)


def _seed_terms(scores: np.ndarray) -> list[_Term]:
    """Variance from the choice of seeds: Var(seed means)/S, less the rest contained in it.

    The problem term contains the rest already.
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
    """The terms of one variance component, or none if its estimate is negative."""
    return terms if sum(term.variance for term in terms) > 0.0 else []


def _combine(terms: Sequence[_Term]) -> tuple[float, float]:
    """Sum of the terms and Satterthwaite's degrees of freedom (1 if the sum is 0).

    The degrees of freedom of a sum are at least the smallest among its terms. The rule breaks down
    when the subtracted terms nearly cancel the others, as for two setups that hardly differ. Then
    nothing is subtracted, which makes the interval too wide rather than too narrow.
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
    """Wilson's interval for a share observed in `independent` trials."""
    weight = quantile**2 / independent
    center = (mean + weight / 2.0) / (1.0 + weight)
    half = quantile / (1.0 + weight) * math.sqrt(
        mean * (1.0 - mean) / independent + (quantile / (2.0 * independent)) ** 2)
    # At a mean of 0 or 1, rounding must not put the mean outside.
    return min(mean, max(0.0, center - half)), max(mean, min(1.0, center + half))


def _difference(mean: float, terms: Sequence[_Term], seeds: tuple[int, int], problems: int,
                level: float) -> Difference:
    variance, freedom = _combine(terms)
    if variance > _NO_VARIANCE:
        error = math.sqrt(variance)
        half = _quantile(freedom, level) * error
        p_value = 2.0 * float(stdtr(freedom, -abs(mean) / error))
    else:
        # All problems differ by the same amount, mostly 0. The width is then Wilson's bound for
        # "none of P problems differs", and the p-value is that of the sign test.
        half = _wilson(0.0, float(problems), _quantile(max(problems - 1.0, 1.0), level))[1]
        p_value = min(1.0, 2.0 ** (1 - problems)) if mean else 1.0
    return Difference(mean, max(-1.0, mean - half), min(1.0, mean + half), p_value, seeds, problems)
