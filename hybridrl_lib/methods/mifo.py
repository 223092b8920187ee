"""MIFO (arXiv 2510.04454): RL and SFT in turns; SFT leaves alone the weights that RL moved most.

    C = 0, a number for every trained weight
    in every step:
        sample G answers a problem; take the RL updates;  C <- alpha C + |what they moved|
        put each problem with at most a share p of right answers into the buffer
        if the buffer holds M: one SFT update on M of them, with the top k% of the weights by C
            frozen; L_SFT = mean of -log pi over the share rho of each demonstration's tokens
            at which the policy's entropy is highest

Second-hand, from abstract, reviews and summaries; there is no code. Unverified: the exact form of
the importance C. Not found: p, rho, alpha, k and the size of the buffer, so all values are ours.
alpha = 0 is the paper's second variant (`mifo_last`): the last step of RL alone decides. Our
choices: a problem that stays hard enters the buffer again; what a step's RL updates moved counts
together, and a step without any leaves C as it is; k% is taken over all weights at once; SFT has an
optimiser of its own; an SFT update comes at most once a step.

With Adam it is not enough to set the gradient of a frozen weight to 0: momentum and weight decay
would still move it. So its gradient is 0, which keeps it out of the norm and the moments, and its
value is put back after the update. Adam's first updates move all weights by about the learning
rate, so that C says little until some have passed. It takes as much memory as the trained weights,
and a step keeps a copy of these.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .method import Method, mixing_stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Step
    from ..updates import Totals, Update

UNKNOWN = "the paper's value was not found"


@dataclass(frozen=True)
class MIFOSettings(Section):
    """What goes to SFT, what of it is learned, and what is frozen meanwhile."""

    section: ClassVar[str] = "mifo"
    batch_size: int = setting(16, "M, demonstrations in an SFT update", UNKNOWN, at_least=1)
    accuracy: float = setting(0.0, "p: problems with at most this share of right answers are "
                              "buffered", UNKNOWN, at_least=0, at_most=1)
    token_share: float = setting(0.2, "rho: share of a demonstration's tokens that is learned, "
                                 "rounded up", UNKNOWN, above=0, at_most=1)
    decay: float = setting(0.9, "alpha: what is left of the importance at the next RL step",
                           f"{UNKNOWN}, except 0 in its second variant", at_least=0, at_most=1)
    frozen: float = setting(0.1, "k: share of the weights that SFT leaves alone", UNKNOWN,
                            at_least=0, at_most=1)


class MIFO(Method):
    """RL, and SFT on hard problems' uncertain tokens that forgets no RL."""

    settings_section = MIFOSettings
    limits = ("token_share", "frozen")
    own_loss = True
    sharded = False

    @classmethod
    def copies(cls, own: MIFOSettings, device: str) -> tuple[float, float]:
        # SFT's moments and C; the weights before RL, or (more on a CPU) what topk takes of C.
        return 3.0, 1.0 if device == "cuda" else 2.5

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.stages = (mixing_stage(settings),)
        self.buffer: list[str] = []  # ids of problems, the next to be taught first
        self.importance: dict[str, Tensor] = {}  # C

    def begin(self, trainer) -> None:
        self.problems = {problem.id: problem for problem in trainer.parts.train}
        self.policy = trainer.policy

    def compose(self, step: "Step") -> "list[Update]":
        updates = super().compose(step)
        self.buffer += [rollout.problem.id for rollout in step.rollouts
                        if rollout.solved <= self.own.accuracy]
        taught, size = [], self.own.batch_size
        if len(self.buffer) >= size:
            taught, self.buffer = self.buffer[:size], self.buffer[size:]
            updates.append(self._sft_update(step, taught))
        step.row |= {"mifo/taught": len(taught), "mifo/buffer": len(self.buffer)}
        return updates

    def _sft_update(self, step: "Step", taught: list[str]) -> "Update":
        """The mean over the tokens that are learned: `token_weights` counts them alone."""
        import torch

        from ..objectives import token_weights

        update = step.update([self.problems[name] for name in taught], sft=1.0, gamma=0.0,
                             optimizer="sft", learning_rate=step.learning_rates["sft"])
        counts = [math.ceil(self.own.token_share * len(s.completion)) for s in update.sequences]
        update.sft = token_weights(torch.tensor(counts), self.settings.sft.loss_normalisation)
        step.row["mifo/token_share"] = sum(counts) / sum(len(s.completion)
                                                         for s in update.sequences)

        def uncertain_tokens(index, scores, entropies):
            chosen = entropies.detach().topk(counts[index]).indices
            return -scores * torch.zeros_like(scores).index_fill(0, chosen, 1.0)

        update.demonstration_loss = uncertain_tokens
        return update

    def learn(self, step: "Step", updates: "list[Update]", totals: "Totals") -> list[float]:
        before = {name: w.detach().clone() for name, w in self.policy.trained_weights().items()}
        norms = super().learn(step, [u for u in updates if u.optimizer == "main"], totals)
        if any(map(math.isfinite, norms)):
            for name, weight in self.policy.trained_weights().items():
                moved = (weight.detach() - before[name]).abs()
                self.importance[name] = self.own.decay * self.importance.get(name, 0.0) + moved
        del before  # a copy of the weights, which the next update has better use for
        for update in updates:
            if update.optimizer == "sft":
                norms.append(self._learn_unfrozen(step, update, totals))
        return norms

    def _learn_unfrozen(self, step: "Step", update: "Update", totals: "Totals") -> float:
        """Takes the update with the most important weights held where they are."""
        frozen = self.frozen_weights()
        weights = {name: w for name, w in self.policy.trained_weights().items() if name in frozen}
        kept = {name: weight.detach()[frozen[name]] for name, weight in weights.items()}
        step.learner.accumulate(update, totals)
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad[frozen[name]] = 0
        norm = step.learner.step(update.learning_rate, update.optimizer)
        for name, weight in weights.items():
            weight.data[frozen[name]] = kept[name]
        count = sum(weight.numel() for weight in self.policy.trained_weights().values())
        step.row["mifo/frozen"] = sum(int(mask.sum()) for mask in frozen.values()) / count
        return norm

    def frozen_weights(self) -> "dict[str, Tensor]":
        """Where each weight is among the top k% by C, and RL has moved it; of its shape, bool."""
        import torch

        values = torch.cat([values.flatten() for values in self.importance.values()] or
                           [torch.zeros(0)])
        top = values.topk(round(self.own.frozen * len(values)), sorted=False).indices
        chosen = torch.zeros_like(values, dtype=torch.bool).index_fill(0, top, True) & (values > 0)
        pieces = chosen.split([values.numel() for values in self.importance.values()])
        return {name: piece.view_as(values) for piece, (name, values) in
                zip(pieces, self.importance.items(), strict=True)}

    def state(self):
        return {"buffer": self.buffer}

    def load_state(self, state):
        self.buffer = state["buffer"]

    def tensors(self):
        return self.importance

    def load_tensors(self, tensors):
        # In the order of the weights, since among equals the first are frozen; a file has its own.
        self.importance = {name: tensors[name].to(self.policy.device)
                           for name in self.policy.trained_weights() if name in tensors}
