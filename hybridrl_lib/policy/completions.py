"""Sampled completions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        token_ids: T ids, with the stop token at the end if the answer finished.
        log_probabilities: T numbers, log pi(token) as the sampler saw it, at its temperature.
        entropies: T numbers, entropy of each step's distribution in nats.
        finished: whether it ended by itself; False if it was cut off at the cap.
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
