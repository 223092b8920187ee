"""One step as a method sees it: demonstrations and rewarded answers, and updates made of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config.settings import Settings
from ..objectives import token_weights
from ..policy.completions import Group
from ..policy.packing import PromptCompletion
from ..problems.problem import Problem
from .learner import Learner
from .progress import Progress, Weights
from .update import Update


@dataclass
class Rollout:
    """The G answers to one problem, with their rewards and advantages.

    Attributes:
        rewards: (G,) of 0 and 1.
        shaped: (G,) the rewards minus the penalty on long answers, if there is one; the advantages
            come from these.
        advantages: (G,).
        reference: log pi of every token under the base model, (T_i,) per answer, at steps that
            measure it.
        anchor: the same under the model that the loss keeps the policy near, if it does.
    """

    problem: Problem
    group: Group
    rewards: Tensor
    shaped: Tensor
    advantages: Tensor
    reference: list[Tensor] | None = None
    anchor: list[Tensor] | None = None

    @property
    def sequences(self) -> list[PromptCompletion]:
        return [PromptCompletion(self.group.prompt_ids, completion.token_ids)
                for completion in self.group.completions]

    @property
    def solved(self) -> float:
        """Fraction of correct answers."""
        return int((self.rewards > 0).sum()) / len(self.rewards)  # in fp32, 1 of 5 is above 0.2


@dataclass
class Step:
    """What a method sees of a step.

    Attributes:
        progress: where the run stands.
        weights: what the method gave for this step.
        gamma: weight of the entropy term.
        learning_rates: of `sft` and `rl` at this step.
        row: the line of metrics.jsonl; a method's own columns are `<method>/<name>`.
        learner: scores completions and takes updates.
        demonstrations: problems of the SFT batch; none if lambda_SFT = 0.
        rollouts: answers to the problems of the RL batch; none if lambda_RL = 0.
        tokens: tokens that the method itself sampled or learned from, added to the run's counts.
    """

    progress: Progress
    settings: Settings
    learner: Learner
    weights: Weights
    gamma: float
    learning_rates: dict[str, float]
    row: dict
    demonstrations: list[Problem] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    tokens: Counter = field(default_factory=Counter)

    @property
    def learning_rate(self) -> float:
        """That of the stage."""
        return self.learning_rates[self.progress.stage.name]

    @property
    def mini_batches(self) -> int:
        """Updates in which a batch of rollouts is used once; 1 without rollouts."""
        return self.settings.rl.updates_per_rollout if self.weights.rl > 0 else 1

    def update(self, demonstrations: Sequence[Problem | PromptCompletion] = (),
               rollouts: Sequence[Rollout] = (), *, sft: float | None = None,
               rl: float | None = None, gamma: float | None = None, **more) -> Update:
        """An update on demonstrations, followed by the answers of whole groups.

        Args:
            sft, rl, gamma: lambda_SFT, lambda_RL, and gamma; default: the step's own.
            more: other fields of `Update`.
        """
        settings, policy = self.settings, self.learner.policy
        sft = self.weights.sft if sft is None else sft
        rl = self.weights.rl if rl is None else rl
        gamma = self.gamma if gamma is None else gamma
        taught = [item if isinstance(item, PromptCompletion) else
                  PromptCompletion(policy.encode_prompt(item.question),
                                   policy.encode_completion(item.solution))
                  for item in demonstrations]
        sampled = [sequence for rollout in rollouts for sequence in rollout.sequences]

        def weights(sequences, normalization, factor) -> Tensor:  # (S,), 0 if the term is absent
            lengths = torch.tensor([len(s.completion) for s in sequences])
            if not sequences or factor == 0:
                return torch.zeros(len(sequences))
            return token_weights(lengths, normalization, settings.rl.max_new_tokens)

        none_taught, none_sampled = torch.zeros(len(taught)), torch.zeros(len(sampled))
        anchored = [rollout.anchor for rollout in rollouts if rollout.anchor is not None]
        return Update(
            sequences=taught + sampled, demonstrations=len(taught),
            lambda_sft=sft if taught else 0.0, lambda_rl=rl if sampled else 0.0, gamma=gamma,
            sft=torch.cat([weights(taught, settings.sft.loss_normalization, sft), none_sampled]),
            rl=torch.cat([none_taught, weights(sampled, settings.rl.loss_normalization, rl)]),
            entropy=weights(taught + sampled, settings.sft.loss_normalization, gamma),
            advantages=torch.cat([none_taught, *(rollout.advantages for rollout in rollouts)]),
            temperature=torch.cat([none_taught + 1, none_sampled + settings.rl.temperature]),
            # A demonstration has no anchor; its places are never read, as lambda_RL is 0 there.
            anchor=None if not anchored else
            [torch.zeros(len(s.completion)) for s in taught] + sum(anchored, []),
            **more)

    def scores_when_sampled(self, rollouts: Sequence[Rollout]) -> list[list[Tensor]]:
        """log pi_old (T_i,) of every answer of every rollout, before the policy has moved.

        In fp32 the sampler's own log-probabilities serve. In half precision they differ from the
        training model's by more than a small divergence, and are computed again.
        """
        if self.learner.policy.precision == "fp32":
            return [[torch.tensor(c.log_probabilities) for c in rollout.group.completions]
                    for rollout in rollouts]
        flat = iter(self.learner.scores([s for r in rollouts for s in r.sequences]))
        return [[next(flat) for _ in rollout.group.completions] for rollout in rollouts]
