"""Prefix-RFT (arXiv 2507.01679): one answer of a group goes on from the demonstration's beginning.

    low falls from 0.95 to 0 along half a cosine over the run
    in every step, for each problem:
        G sampled answers, and a hybrid: the first floor(l T) of the demonstration's T tokens,
        l ~ U(low, 0.95), and an answer sampled from there on, judged as one text
        A: gain of each over the mean reward of all G + 1, over their deviation
        L = the clipped surrogate of L_GRPO on all G + 1; of the prefix, only the 20 % of the
            tokens at which the policy's entropy is highest have a gradient

Read from the released code and second-hand notes. The paper has N - 1 ordinary answers and the
hybrid; here all rl.group_size answers are ordinary and the hybrid comes on top: the paper's group
of 8 is rl.group_size=7. `prefix_rft.token_share=0` is a frozen prefix, 1 one that is learned whole.
Prefix and answer together are cut at rl.max_new_tokens. The record counts the prefix as
demonstration tokens and what was sampled behind it as rollout tokens; `loss/sft` is the surrogate
of the hybrids. Its KL was not found: there is none.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..records import seed_of
from ..setups import Setup
from .method import Method, Progress, mixing_stage

if TYPE_CHECKING:
    from ..packing import PromptCompletion
    from ..steps import Rollout, Step
    from ..updates import Update


@dataclass(frozen=True)
class PrefixRFTSettings(Section):
    """How long prefixes are and how much of them is learned."""

    section: ClassVar[str] = "prefix_rft"
    longest: float = setting(0.95, "largest share of a demonstration that is a prefix; also where "
                             "the smallest begins", "paper: 0.95", at_least=0, below=1)
    token_share: float = setting(0.2, "share of a prefix's tokens with a gradient, those of "
                                 "highest entropy, rounded up", "paper: 0.2",
                                 at_least=0, at_most=1)


@dataclass
class Hybrid:
    """A prefix of `prefix` tokens with a sampled end, its reward, and that less the punishment of
    its length, prefix included."""

    sequence: "PromptCompletion"
    prefix: int
    reward: float
    shaped: float
    advantage: float = 0.0


class PrefixRFT(Method):
    """RL with one answer a group that begins as the demonstration does."""

    settings_section = PrefixRFTSettings
    own_loss = True

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.stages = (mixing_stage(settings),)

    def begin(self, trainer) -> None:
        self.trainer = trainer

    def shortest(self, progress: Progress) -> float:
        """The share of a demonstration that a prefix has at least."""
        return self.own.longest * (1 + math.cos(math.pi * progress.step / progress.steps)) / 2

    def compose(self, step: "Step") -> "list[Update]":
        hybrids = self._sample(step)
        for rollout, hybrid in zip(step.rollouts, hybrids, strict=True):
            self._share_out(rollout, hybrid)
        count = step.mini_batches
        step.row |= {
            "groups/beside": len(hybrids),
            "prefix_rft/shortest": self.shortest(step.progress),
            "prefix_rft/prefix_length": sum(h.prefix for h in hybrids) / len(hybrids),
            "prefix_rft/hybrid_reward": sum(h.reward for h in hybrids) / len(hybrids)}
        return [self._update(step, step.rollouts[i::count], hybrids[i::count])
                for i in range(count)]

    def _sample(self, step: "Step") -> list[Hybrid]:
        """One hybrid a problem, judged."""
        from ..judging import overlong_of, rewards_of
        from ..packing import PromptCompletion
        from ..rollouts import sample

        policy, cap = self.trainer.policy, self.settings.rl.max_new_tokens
        draws, low = step.progress.random("prefix"), self.shortest(step.progress)
        prompts, prefixes = [], []
        for rollout in step.rollouts:
            solution = policy.encode_completion(rollout.problem.solution)[:-1]
            length = math.floor(draws.uniform(low, self.own.longest) * len(solution))
            prompts.append(policy.encode_prompt(rollout.problem.question))
            prefixes.append(solution[:min(length, cap - 1)])
        groups = sample(policy, [p + prefix for p, prefix in zip(prompts, prefixes, strict=True)],
                        samples=1, max_new_tokens=cap, temperature=self.settings.rl.temperature,
                        seed=seed_of(step.progress.seed, "hybrids", step.progress.taken),
                        batch_size=self.settings.evaluation.batch_size)
        whole, finished = [], []
        for prefix, group in zip(prefixes, groups, strict=True):
            answer = group.completions[0]
            whole.append((prefix + answer.token_ids)[:cap])
            finished.append(answer.finished and len(prefix) + len(answer.token_ids) <= cap)
            self.trainer.tokens["demonstrations"] += len(prefix)
            self.trainer.tokens["rollouts"] += len(answer.token_ids)
        problems = [rollout.problem for rollout in step.rollouts]
        texts = [policy.decode(ids) for ids in whole]
        verdicts = self.trainer.verifier.verify([p.answer for p in problems], texts, finished)
        rewards = rewards_of(problems, texts, verdicts, self.settings.rl.reward)
        shaped = rewards + overlong_of([len(ids) for ids in whole], finished, self.settings.rl)
        return [Hybrid(PromptCompletion(prompt, ids), len(prefix), *worth)
                for prompt, ids, prefix, *worth in zip(
                    prompts, whole, prefixes, rewards.tolist(), shaped.tolist(), strict=True)]

    def _share_out(self, rollout: "Rollout", hybrid: Hybrid) -> None:
        """Advantages in the joint group."""
        import torch

        from ..objectives import group_advantages

        rewards = torch.cat([rollout.shaped, rollout.shaped.new_tensor([hybrid.shaped])])
        joint = group_advantages(rewards[None], self.settings.rl.advantage_scale)[0]
        rollout.advantages, hybrid.advantage = joint[:-1], float(joint[-1])

    def _update(self, step: "Step", rollouts: "list[Rollout]", hybrids: list[Hybrid]) -> "Update":
        """A mini-batch with one normaliser over hybrids and answers."""
        import torch

        from ..objectives import policy_token_losses, token_weights

        rl = self.settings.rl
        bounds = (rl.epsilon_low, rl.epsilon_high) if rl.clip else (math.inf, math.inf)
        update = step.update([hybrid.sequence for hybrid in hybrids], rollouts, sft=1.0, rl=1.0)
        lengths = torch.tensor([len(s.completion) for s in update.sequences])
        weight = token_weights(lengths, rl.loss_normalisation, rl.max_new_tokens)
        answers = torch.arange(len(lengths)) >= len(hybrids)
        useful = torch.zeros(len(lengths), dtype=torch.bool)
        useful[:len(hybrids)] = torch.tensor([h.advantage for h in hybrids]) != 0
        update.sft, update.rl = weight * useful, weight * answers
        update.temperature[:] = rl.temperature
        update.demonstrations = 0  # their tokens are counted already

        def surrogate(index, scores, entropies):
            hybrid = hybrids[index]
            old = scores.detach() if update.old is None else update.old[index].to(scores.device)
            learned = torch.ones_like(scores)
            most = math.ceil(self.own.token_share * hybrid.prefix)
            learned[:hybrid.prefix] = 0
            learned[entropies.detach()[:hybrid.prefix].topk(most).indices] = 1
            return learned * policy_token_losses(
                scores, old, torch.full_like(scores, hybrid.advantage), *bounds)

        update.demonstration_loss = surrogate
        return update
