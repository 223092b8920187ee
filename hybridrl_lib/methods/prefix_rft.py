"""Prefix-RFT (arXiv 2507.01679): one answer per group continues the demonstration's beginning.

    low falls from 0.95 to 0 along half a cosine over the run
    in every step, for each problem:
        G sampled answers, and a hybrid: the first floor(l T) of the demonstration's T tokens,
        l ~ U(low, 0.95), and an answer sampled from there on, judged as one text
        A: gain of each over the mean reward of all G + 1, divided by their deviation
        L = the clipped surrogate of L_GRPO on all G + 1; in the prefix, only the 20 % of the
            tokens at which the policy's entropy is highest have a gradient

Read from the released code and second-hand notes. The paper has N - 1 ordinary answers and the
hybrid; here all rl.group_size answers are ordinary and the hybrid is added: the paper's group of 8
is rl.group_size=7. In the code the 20 % are taken over a micro-batch; here over each prefix.
`prefix_rft.token_share=0` is a frozen prefix, 1 one that is learned completely. Prefix and answer
together are truncated at rl.max_new_tokens. The record counts the prefix as demonstration tokens
and what was sampled after it as rollout tokens; `loss/sft` is the surrogate of the hybrids. Its KL
was not found: there is none.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..learning.judging import overlong_of, rewards_of
from ..learning.progress import Progress
from ..learning.step import Rollout, Step
from ..learning.update import Update
from ..objectives import clipped_surrogate, importance_ratio, token_weights
from ..policy.packing import PromptCompletion
from ..policy.sampling import sample
from ..system.seeds import seed_of
from .method import Method, joint_advantages


@dataclass
class Hybrid:
    """A prefix of `prefix` tokens with a sampled end.

    Attributes:
        reward: of the whole text.
        shaped: the reward minus the penalty of the length, prefix included.
    """

    sequence: PromptCompletion
    prefix: int
    reward: float
    shaped: float
    advantage: float = 0.0


class PrefixRFT(Method):
    """RL with one answer per group that starts like the demonstration."""

    def shortest(self, progress: Progress) -> float:
        """The minimum fraction of a demonstration that becomes the prefix."""
        return self.own.longest * (1 + math.cos(math.pi * progress.step / progress.steps)) / 2

    def compose(self, step: Step) -> list[Update]:
        hybrids = self._sample(step)
        for rollout, hybrid in zip(step.rollouts, hybrids, strict=True):
            hybrid.advantage = joint_advantages(rollout, hybrid.shaped,
                                                self.settings.rl.advantage_scale)
        count = step.mini_batches
        step.row |= {
            "groups/beside": len(hybrids),
            "prefix_rft/shortest": self.shortest(step.progress),
            "prefix_rft/prefix_length": sum(h.prefix for h in hybrids) / len(hybrids),
            "prefix_rft/hybrid_reward": sum(h.reward for h in hybrids) / len(hybrids)}
        return [self._update(step, step.rollouts[i::count], hybrids[i::count])
                for i in range(count)]

    def _sample(self, step: Step) -> list[Hybrid]:
        """One hybrid per problem, with its reward."""
        policy, rl, progress = self.run.policy, self.settings.rl, step.progress
        draws, low, most = progress.random("prefix"), self.shortest(progress), rl.max_new_tokens
        prompts, prefixes = [], []
        for rollout in step.rollouts:
            solution = policy.encode_completion(rollout.problem.solution)[:-1]
            length = math.floor(draws.uniform(low, self.own.longest) * len(solution))
            prompts.append(policy.encode_prompt(rollout.problem.question))
            prefixes.append(solution[:min(length, most - 1)])
        groups = sample(policy, [p + prefix for p, prefix in zip(prompts, prefixes, strict=True)],
                        samples=1, max_new_tokens=most, temperature=rl.temperature,
                        seed=seed_of(progress.seed, "hybrids", progress.taken),
                        batch_size=self.settings.evaluation.batch_size)
        whole, finished = [], []
        for prefix, group in zip(prefixes, groups, strict=True):
            answer = group.completions[0]
            whole.append((prefix + answer.token_ids)[:most])
            finished.append(answer.finished and len(prefix) + len(answer.token_ids) <= most)
            step.tokens.update(demonstrations=len(prefix), rollouts=len(answer.token_ids))
        problems = [rollout.problem for rollout in step.rollouts]
        texts = [policy.decode(ids) for ids in whole]
        verdicts = self.run.verifier.verify([p.answer for p in problems], texts, finished)
        rewards = rewards_of(problems, texts, verdicts, rl.reward)
        shaped = rewards + overlong_of([len(ids) for ids in whole], finished, rl)
        return [Hybrid(PromptCompletion(prompt, ids), len(prefix), *worth)
                for prompt, ids, prefix, *worth in zip(
                    prompts, whole, prefixes, rewards.tolist(), shaped.tolist(), strict=True)]

    def _update(self, step: Step, rollouts: list[Rollout], hybrids: list[Hybrid]) -> Update:
        """A mini-batch with one normalizer over hybrids and answers."""
        rl = self.settings.rl
        update = step.update([hybrid.sequence for hybrid in hybrids], rollouts, sft=1.0, rl=1.0)
        lengths = torch.tensor([len(s.completion) for s in update.sequences])
        weight = token_weights(lengths, rl.loss_normalization, rl.max_new_tokens)
        answers = torch.arange(len(lengths)) >= len(hybrids)
        useful = torch.zeros(len(lengths), dtype=torch.bool)
        useful[:len(hybrids)] = torch.tensor([h.advantage for h in hybrids]) != 0
        update.sft, update.rl = weight * useful, weight * answers
        update.temperature[:] = rl.temperature
        update.demonstrations = 0  # their tokens are counted already

        def surrogate(index: int, scores: Tensor, entropies: Tensor) -> Tensor:
            hybrid = hybrids[index]
            old = scores.detach() if update.old is None else update.old[index].to(scores.device)
            learned = torch.ones_like(scores)
            most = math.ceil(self.own.token_share * hybrid.prefix)
            learned[:hybrid.prefix] = 0
            learned[entropies.detach()[:hybrid.prefix].topk(most).indices] = 1
            return -learned * clipped_surrogate(
                importance_ratio(scores, old), torch.full_like(scores, hybrid.advantage),
                *step.learner.clip_range)

        update.demonstration_loss = surrogate
        return update
