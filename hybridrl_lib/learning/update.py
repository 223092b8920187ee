"""What one optimizer update learns from, and the sums it leaves for the record."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..policy.packing import PromptCompletion


@dataclass
class Update:
    """S completions, the weights of their tokens in each term of the loss, and the lambdas.

    Attributes:
        sequences: S demonstrations and rollouts.
        sft, rl, entropy: (S,) weight of every token of completion i in L_SFT, L_RL, and H, from
            `objectives.token_weights`; 0 where a term does not apply.
        lambda_sft, lambda_rl, gamma: the factors of the three terms.
        advantages: (S,).
        temperature: (S,) temperature that the completion was sampled at; 1 for demonstrations.
        old: log pi_old of every token, a tensor (T_i,) per completion; None while the policy is
            still the one that sampled (then the ratio is 1).
        anchor: the same under the policy that the loss keeps the policy near, unless that is
            pi_old.
        token_advantages: (T_i,) per completion, added to its advantage; None for none.
        demonstration_loss: the loss of the tokens of completion i in L_SFT, (T_i,) with gradient,
            given i, their log-probabilities (T_i,), and entropies (T_i,); None for -log pi.
        marked: (T_i,) bool per completion, the tokens that the entropy control treats differently;
            chosen once, so that they stay the same if BRIDGE computes the gradient at other
            weights.
        demonstrations: how many of the first sequences are demonstrations, for the record.
        optimizer: the optimizer that takes the update; each has its own moments.
        learning_rate: its own, or None for that of the step.
        largest_norm: an update whose gradient norm, before clipping, is larger is skipped.
    """

    sequences: list[PromptCompletion]
    sft: Tensor
    rl: Tensor
    entropy: Tensor
    advantages: Tensor
    temperature: Tensor
    lambda_sft: float = 1.0
    lambda_rl: float = 1.0
    gamma: float = 0.0
    old: list[Tensor] | None = None
    anchor: list[Tensor] | None = None
    token_advantages: list[Tensor] | None = None
    demonstration_loss: Callable[[int, Tensor, Tensor], Tensor] | None = None
    marked: list[Tensor] | None = None
    demonstrations: int = 0
    optimizer: str = "main"
    learning_rate: float | None = None
    largest_norm: float = math.inf


@dataclass
class Totals:
    """Sums and counts over the tokens of a step, for its line in metrics.jsonl."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, count: int | None = None) -> None:
        """Adds values to a sum; they count as `count` tokens, by default as their number."""
        self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
        self.counts[name] = self.counts.get(name, 0) + (values.numel() if count is None else count)

    def merge(self, other: "Totals") -> None:
        """Adds the sums and counts of another process."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if self.counts.get(name) else None
