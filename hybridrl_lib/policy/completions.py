"""Sampled completions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        token_ids: T ids, including the stop token if the answer finished.
        log_probabilities: T numbers, log pi(token) at the sampling temperature.
        entropies: T numbers, the entropy of each step's distribution in nats.
        finished: whether it ended by itself; False if it was truncated.
        text: without special tokens.
    """

    token_ids: list[int]
    log_probabilities: list[float]
    entropies: list[float]
    finished: bool
    text: str


@dataclass(frozen=True)
class Group:
    """The G completions of one prompt."""

    prompt_ids: list[int]
    completions: list[Completion]
