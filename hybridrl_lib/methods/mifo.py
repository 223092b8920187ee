"""MIFO (arXiv 2510.04454): RL and SFT in turns; SFT leaves alone the weights that RL moved most.

    C = 0, a number per trained weight
    in every step:
        sample G answers per problem; take the RL updates;  C <- alpha C + |what they moved|
        put each problem with at most a fraction p of correct answers into the buffer
        if the buffer holds M: one SFT update on M of them, with the top k% of the weights by C
            frozen; L_SFT = mean of -log pi over the fraction rho of each demonstration's tokens
            at which the policy's entropy is highest

Second-hand, from abstract, reviews, and summaries; there is no code. Unverified: the exact form of
the importance C. Not found: p, rho, alpha, k, and the size of the buffer, so all values are ours.
alpha = 0 is the paper's second variant (`mifo_last`): only the last step of RL counts. Our choices:
a problem that stays hard enters the buffer again; what a step's RL updates moved counts together,
and a step without any leaves C unchanged; k% is taken over all weights together; SFT has its own
optimizer; there is at most one SFT update per step.

With Adam it is not enough to set the gradient of a frozen weight to 0: momentum and weight decay
would still move it. So its gradient is 0, which keeps it out of the norm and the moments, and its
value is restored after the update. Adam's first updates move all weights by about the learning
rate, so C is uninformative until some have passed. C takes as much memory as the trained weights,
and a step keeps a copy of these.
"""

import math

import torch
from torch import Tensor

from ..config.settings import Settings
from ..learning.step import Step
from ..learning.update import Totals, Update
from ..objectives import token_weights
from ..setups import Setup
from .method import Method, Run


class MIFO(Method):
    """RL, and SFT on the uncertain tokens of hard problems that spares the weights RL moved."""

    kept = ("buffer",)

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.buffer: list[str] = []  # ids of problems; SFT takes the first
        self.importance: dict[str, Tensor] = {}  # C

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.problems = {problem.id: problem for problem in run.problems}

    def compose(self, step: Step) -> list[Update]:
        updates = super().compose(step)
        self.buffer += [rollout.problem.id for rollout in step.rollouts
                        if rollout.solved <= self.own.accuracy]
        taught, size = [], self.own.batch_size
        if len(self.buffer) >= size:
            taught, self.buffer = self.buffer[:size], self.buffer[size:]
            updates.append(self._sft_update(step, taught))
        step.row |= {"mifo/taught": len(taught), "mifo/buffer": len(self.buffer)}
        return updates

    def _sft_update(self, step: Step, taught: list[str]) -> Update:
        """The mean over the learned tokens: `token_weights` only counts those."""
        update = step.update([self.problems[name] for name in taught], sft=1.0, gamma=0.0,
                             optimizer="sft", learning_rate=step.learning_rates["sft"])
        counts = [math.ceil(self.own.token_share * len(s.completion)) for s in update.sequences]
        update.sft = token_weights(torch.tensor(counts), self.settings.sft.loss_normalization)
        step.row["mifo/token_share"] = sum(counts) / sum(len(s.completion)
                                                         for s in update.sequences)

        def uncertain_tokens(index: int, scores: Tensor, entropies: Tensor) -> Tensor:
            chosen = entropies.detach().topk(counts[index]).indices
            return -scores * torch.zeros_like(scores).index_fill(0, chosen, 1.0)

        update.demonstration_loss = uncertain_tokens
        return update

    def learn(self, step: Step, updates: list[Update], totals: Totals) -> list[float]:
        trained = self.run.policy.trained_weights
        before = {name: w.detach().clone() for name, w in trained().items()}
        norms = super().learn(step, [u for u in updates if u.optimizer == "main"], totals)
        if any(map(math.isfinite, norms)):
            for name, weight in trained().items():
                moved = (weight.detach() - before[name]).abs()
                self.importance[name] = self.own.decay * self.importance.get(name, 0.0) + moved
        del before  # a copy of the weights; the next update needs the memory
        for update in updates:
            if update.optimizer == "sft":
                norms.append(self._learn_unfrozen(step, update, totals))
        return norms

    def _learn_unfrozen(self, step: Step, update: Update, totals: Totals) -> float:
        """Takes the update without moving the most important weights."""
        frozen, trained = self.frozen_weights(), self.run.policy.trained_weights()
        weights = {name: w for name, w in trained.items() if name in frozen}
        kept = {name: weight.detach()[frozen[name]] for name, weight in weights.items()}
        step.learner.accumulate(update, totals)
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad[frozen[name]] = 0
        norm = step.learner.step(update.learning_rate, update.optimizer)
        for name, weight in weights.items():
            weight.data[frozen[name]] = kept[name]
        count = sum(weight.numel() for weight in trained.values())
        step.row["mifo/frozen"] = sum(int(mask.sum()) for mask in frozen.values()) / count
        return norm

    def frozen_weights(self) -> dict[str, Tensor]:
        """Masks, of each weight's shape, of the top k% by C among those that RL has moved."""
        values = torch.cat([values.flatten() for values in self.importance.values()] or
                           [torch.zeros(0)])
        top = values.topk(round(self.own.frozen * len(values)), sorted=False).indices
        chosen = torch.zeros_like(values, dtype=torch.bool).index_fill(0, top, True) & (values > 0)
        pieces = chosen.split([values.numel() for values in self.importance.values()])
        return {name: piece.view_as(values) for piece, (name, values) in
                zip(pieces, self.importance.items(), strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        return self.importance

    def load_state(self, state: dict, tensors: dict[str, Tensor]) -> None:
        super().load_state(state, tensors)
        # In the order of the weights, since among equals the first are frozen; a file has its own.
        policy = self.run.policy
        self.importance = {name: tensors[name].to(policy.device)
                           for name in policy.trained_weights() if name in tensors}
