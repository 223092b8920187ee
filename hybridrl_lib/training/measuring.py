"""Measurements between updates: KL to the reference, probes, and validation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.settings import Settings
from ..learning.judging import reward_metrics, verdicts_of
from ..learning.learner import Learner
from ..learning.step import Rollout, Step
from ..objectives import k3
from ..policy.packing import PromptCompletion
from ..policy.policy import Policy
from ..policy.sampling import sample
from ..problems.problem import Problem
from ..rewards.verifier import Verifier
from ..system.seeds import seed_of
from .evaluation import accuracy, distinct_answers, evaluate


@dataclass(frozen=True)
class Measuring:
    """Measures a policy during training."""

    policy: Policy
    learner: Learner
    verifier: Verifier
    settings: Settings
    seed: int

    def score_reference(self, step: Step, anchor_weights: dict[str, Tensor] | None) -> None:
        """Scores every token of the step under the reference and under the anchor of the loss.

        Fills `Rollout.reference` and `Rollout.anchor`, and the columns kl/reference and kl/anchor
        with k3 from the policy that sampled.

        Args:
            anchor_weights: of `rl.kl_anchor=stage`; None for the other anchors.
        """
        count, tokens, kl = step.mini_batches, 0, {"reference": 0.0}
        for rollouts in (step.rollouts[index::count] for index in range(count)):
            sequences = [s for rollout in rollouts for s in rollout.sequences]
            mine = step.scores_when_sampled(rollouts)
            with self.policy.reference() as model:
                reference = iter(self.learner.scores(sequences, model))
            for rollout, scores in zip(rollouts, mine, strict=True):
                rollout.reference = [next(reference) for _ in scores]
                rollout.anchor = rollout.reference if self.learner.needs_anchor else None
                kl["reference"] += divergence(scores, rollout.reference)
                tokens += sum(map(len, scores))
            if anchor_weights is not None:
                kl["anchor"] = kl.get("anchor", 0.0) + self._score_anchor(
                    rollouts, sequences, mine, anchor_weights)
        step.row |= {f"kl/{name}": total / max(1, tokens) for name, total in kl.items()}

    def _score_anchor(self, rollouts: Sequence[Rollout], sequences: Sequence[PromptCompletion],
                      mine: Sequence[Sequence[Tensor]], weights: dict[str, Tensor]) -> float:
        """Fills `Rollout.anchor` from other weights; returns the sum of k3 over all tokens."""
        with self.policy.with_weights(weights):
            anchor = iter(self.learner.scores(sequences))
        total = 0.0
        for rollout, scores in zip(rollouts, mine, strict=True):
            rollout.anchor = [next(anchor) for _ in scores]
            total += divergence(scores, rollout.anchor)
        return total

    def probe(self, problems: Sequence[Problem], step: int) -> dict:
        """Columns of probe.jsonl: the same validation prompts, sampled by every setup."""
        probe, rl = self.settings.probe, self.settings.rl
        groups = sample(
            self.policy, [self.policy.encode_prompt(p.question) for p in problems],
            samples=probe.samples, max_new_tokens=rl.max_new_tokens, temperature=rl.temperature,
            seed=seed_of(self.seed, "probe", step),
            batch_size=self.settings.evaluation.batch_size)
        verdicts = verdicts_of(problems, groups, self.verifier)
        rewards = torch.tensor([float(v.strict) for v in verdicts]).view(-1, probe.samples)
        sequences = [PromptCompletion(g.prompt_ids, c.token_ids)
                     for g in groups for c in g.completions]
        mine = torch.cat(self.learner.scores(sequences))
        with self.policy.reference() as model:
            base = torch.cat(self.learner.scores(sequences, model))
        row = {**reward_metrics(groups, rewards), "kl/base": float(k3(mine, base).mean()),
               "distinct_answers": distinct_answers(groups)}
        return row | {"groups_with_signal": 1 - row["frac_reward_zero_std"]}

    def validate(self, problems: Sequence[Problem]) -> dict:
        """Columns of validation.jsonl: exact match and token loss on the validation problems."""
        rows = evaluate(self.policy, problems, self.settings.evaluation, self.verifier,
                        part="validation", samples=0, seed=self.seed)
        taught = [PromptCompletion(self.policy.encode_prompt(p.question),
                                   self.policy.encode_completion(p.solution)) for p in problems]
        loss = -float(torch.cat(self.learner.scores(taught, temperature=1.0)).mean())
        return {"strict": accuracy(rows), "loss": loss, "problems": len(problems)}


def divergence(scores: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Sum of k3 over the tokens of a problem's answers.

    Args:
        scores, theirs: (T_i,) log-probabilities of each answer, under sampler and other model.
    """
    return sum(float(k3(mine.to(other.device), other).sum())
               for mine, other in zip(scores, theirs, strict=True))
