"""One GRPO step of this library, in parts that can be timed: sampling, and the update.

It is the step of `training.Trainer` with one update a rollout batch, without its record and without
a KL term. The rewards are a fixed pattern, so that no verifier decides how much there is to learn.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import timed
from torch import Tensor

from hybridrl_lib.config.presets import load_settings
from hybridrl_lib.learning.learner import Learner
from hybridrl_lib.learning.update import Totals, Update
from hybridrl_lib.objectives import group_advantages, token_weights
from hybridrl_lib.policy.completions import Group
from hybridrl_lib.policy.packing import PromptCompletion
from hybridrl_lib.policy.policy import Policy
from hybridrl_lib.policy.sampling import sample

PATTERN = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)  # rewards of a group
TOKENS = (1024, 2048, 4096, 16384)  # of a micro-batch, tried in turn
LARGE = 1e7  # weights from which on more than 2,048 tokens a micro-batch are not tried
LEARNING_RATE = 1e-6  # so low that the answers stay those of the model that was given


def rewards(groups: int, samples: int, which: str) -> Tensor:
    """(groups, samples) rewards: `all` groups have a signal, or with `signal` every other one."""
    one = torch.tensor([PATTERN[number % len(PATTERN)] for number in range(samples)])
    table = one.repeat(groups, 1)
    if which == "signal":
        table[1::2] = 0.0
    return table


@dataclass(frozen=True)
class Outcome:
    """One step: seconds of its parts, completion tokens, the loss and its gradient's norm."""

    sampling: float
    update: float
    tokens: int
    loss: float
    norm: float


def fastest(candidates: Sequence[int], take: Callable[[int], Any]) -> tuple[int, dict[str, float]]:
    """The candidate whose second run takes the least time, and the seconds of each."""
    if len(candidates) == 1:
        return candidates[0], {}
    seconds = {}
    for candidate in candidates:
        take(candidate)
        seconds[candidate] = timed(take, candidate)[0]
    return (min(seconds, key=seconds.__getitem__),
            {str(key): round(value, 4) for key, value in seconds.items()})


def sizes_to_try(parameters: Iterable[torch.Tensor]) -> list[int]:
    """Tokens a micro-batch: a large model fills the machine with few."""
    small = sum(p.numel() for p in parameters) < LARGE
    return [n for n in TOKENS if small or n <= 2048]


class GRPOStep:
    """The policy in training.

    Args:
        policy: its weights are moved.
        questions: one a group.
        samples: G.
        max_new_tokens: cap on a completion's tokens.
        which: groups with a signal, as `rewards` takes it.
        loss_normalization, micro_batch_tokens: as in the settings.
    """

    def __init__(self, policy: Policy, questions: Sequence[str], *, samples: int,
                 max_new_tokens: int, which: str = "all",
                 loss_normalization: str = "sequence_mean", micro_batch_tokens: int = 1024):
        self.policy, self.questions, self.which = policy, questions, which
        self.settings = load_settings("tiny", (
            "rl.beta=0", f"rl.group_size={samples}", f"rl.max_new_tokens={max_new_tokens}",
            f"rl.loss_normalization={loss_normalization}",
            f"training.micro_batch_tokens={micro_batch_tokens}"), smoke=False)
        self.learner = Learner(policy, self.settings)
        self.learner.new_optimizer()

    def use_micro_batches_of(self, tokens: int) -> None:
        """Sets training.micro_batch_tokens; weights and optimizer stay as they are."""
        self.settings = self.learner.settings = replace(
            self.settings, training=replace(self.settings.training, micro_batch_tokens=tokens))

    def use_fastest_micro_batches(self, groups: Sequence[Group],
                                  chosen: int | None = None) -> dict[str, float]:
        """Sets those with which an update takes least time; the seconds of each that was tried.

        Args:
            chosen: take these, and try none.
        """
        def take(tokens: int) -> None:
            self.use_micro_batches_of(tokens)
            self.update(groups)

        best, tried = fastest([chosen] if chosen else sizes_to_try(self.learner.parameters), take)
        self.use_micro_batches_of(best)
        return tried

    def sample(self, seed: int) -> list[Group]:
        """G completions of every question, all decoded together."""
        rl = self.settings.rl
        return sample(self.policy, [self.policy.encode_prompt(q) for q in self.questions],
                      samples=rl.group_size, max_new_tokens=rl.max_new_tokens, temperature=1.0,
                      seed=seed, batch_size=len(self.questions) * rl.group_size)

    def update(self, groups: Sequence[Group]) -> tuple[float, float]:
        """One update from completions: (loss, norm of the gradient before clipping)."""
        rl = self.settings.rl
        sequences = [PromptCompletion(group.prompt_ids, completion.token_ids)
                     for group in groups for completion in group.completions]
        lengths = torch.tensor([len(s.completion) for s in sequences])
        none = torch.zeros(len(sequences))
        advantages = group_advantages(rewards(len(groups), rl.group_size, self.which),
                                      rl.advantage_scale)
        totals = Totals()
        self.learner.accumulate(Update(
            sequences, sft=none, rl=token_weights(lengths, rl.loss_normalization,
                                                  rl.max_new_tokens),
            entropy=none, advantages=advantages.flatten(), temperature=torch.ones(len(sequences))),
            totals)
        return totals.sums["loss/rl"], self.learner.step(LEARNING_RATE)

    def __call__(self, seed: int) -> Outcome:
        """A whole step."""
        began = time.perf_counter()
        groups = self.sample(seed)
        sampled = time.perf_counter()
        loss, norm = self.update(groups)
        return Outcome(sampled - began, time.perf_counter() - sampled,
                       sum(len(c.token_ids) for g in groups for c in g.completions), loss, norm)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.learner.optimizer.optimizer

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return self.learner.parameters
