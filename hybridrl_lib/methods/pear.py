"""PEAR (arXiv 2602.01058, section numbers unknown): SFT weighted for the RL that follows, then RL.

    pi_beta: the model that wrote the demonstration y_1..y_T;  delta_t, clipped, is
             log pi_theta(y_t|x, y_<t) - log pi_beta(y_t|x, y_<t) at the update's own theta
    L = sum_t G_t * -log pi_theta(y_t|x, y_<t),  no gradient through G, log G clipped
    sequence   log G_t = delta_1 + ... + delta_T
    token      log G_t = (T - t) log gamma + delta_t+1 + ... + delta_T     (t itself is not in it)
    block      the same from the end of the block of t; blocks of one token are `token`
    then the same GRPO as after plain SFT

No official code. The formulas and clip bounds are second-hand, from a re-implementation with a
mapping to the paper's sections. Unspecified, not found: what the weighted losses are divided by;
that is a setting, and `weights` has the step size of SFT. T is the true length, and EOS is in the
product and the loss; the re-implementation takes the padded length, and clamps G to [0.1, 10].
`pear_centered` is the variant of a replication, which found that on long answers published PEAR
only trains their end: delta minus its mean over the answer, weights of mean 1 (here over an
update). Its clip comes after that. The paper's negative examples are not implemented: their formula
is unverified.

Human solutions have no pi_beta, so the demonstrations are sampled: the first correct one of
`pear.samples` answers of the behavior model. A problem without one is left out of SFT. That they
are correct answers, not any, is in no log-probability. By default, pi_beta is the run's base model
after some plain SFT. `sft_sampled_then_rl` learns from the same demonstrations without weights:
that is the arm to compare with.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from ..config.methods import PEARSettings
from ..config.settings import Settings
from ..learning.progress import Progress
from ..learning.step import Step
from ..learning.update import Update
from ..setups import Setup
from .method import Run
from .pear_demonstrations import (
    OF_THIS_RUN,
    Demonstration,
    behavior_policy,
    demonstrations_from,
    refuse_other_tokenizer,
    sample_demonstrations,
    sizes_of,
    tensors_of,
)
from .staged import Staged
from .weight_changes import copy_of, weight_changes


class PEAR(Staged):
    """SFT weighted by how likely the policy is to continue as the demonstration does, then RL."""

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        # By problem; sampled at the first step of SFT.
        self.demonstrations: dict[str, Demonstration] | None = None
        self.after_sft: dict[str, Tensor] = {}

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.at_first = copy_of(run.policy.trained_weights())
        if self.own.behavior != OF_THIS_RUN and not run.has_begun:  # otherwise they are sampled
            refuse_other_tokenizer(self.own.behavior, run.policy, run.problems, run.settings)

    # SFT ---------------------------------------------------------------------------------------

    def compose(self, step: Step) -> list[Update]:
        if not step.demonstrations:
            if step.progress.step == 0:
                self.after_sft = copy_of(self.run.policy.trained_weights())
            return super().compose(step)
        if self.demonstrations is None:
            self._sample(step)
        known = [self.demonstrations[problem.id] for problem in step.demonstrations
                 if problem.id in self.demonstrations]
        update = step.update([demonstration.sequence for demonstration in known])
        step.row["pear/demonstrations"] = len(known)
        if known and self.own.level != "none":
            weights = self._weights(step, update, known)
            update.demonstration_loss = lambda i, scores, entropies: -weights[i] * scores
        return [update]

    def _weights(self, step: Step, update: Update,
                 known: Sequence[Demonstration]) -> list[Tensor]:
        """G (T_i,) of every demonstration of an update."""
        scores = step.learner.scores(update.sequences, temperature=1.0)
        deltas = [score - demonstration.behavior
                  for score, demonstration in zip(scores, known, strict=True)]
        weights = [log_weights(delta, self.own).exp() for delta in deltas]
        self._describe(step.row, deltas, weights)
        if self.own.normalization == "weights":
            shares = list(zip(update.sft.tolist(), weights, strict=True))
            scale = (sum(share * len(weight) for share, weight in shares)
                     / sum(share * float(weight.sum()) for share, weight in shares))
            weights = [scale * weight for weight in weights]
        return weights

    def _sample(self, step: Step) -> None:
        """Has the behavior model write the demonstrations; it is dropped afterwards."""
        run, own = self.run, self.own
        policy, taught = behavior_policy(
            own.behavior, run.policy, run.problems, run.settings, own.behavior_epochs,
            own.behavior_rate or run.settings.sft.learning_rate, run.seed)
        self.demonstrations, tokens = sample_demonstrations(
            policy, run.policy, run.problems, run.verifier, run.settings, own.samples, run.seed)
        without = len(run.problems) - len(self.demonstrations)
        step.tokens.update(behavior=tokens, behavior_demonstrations=taught.tokens)
        step.row |= {"pear/problems_without": without, "pear/behavior_tokens": tokens,
                     "groups/beside": len(run.problems) * own.samples,
                     "updates/beside": taught.updates}
        run.note(f"the behavior model solved {len(self.demonstrations)} of {len(run.problems)} "
                 "training problems; the others are left out of SFT")

    def _describe(self, row: dict, deltas: list[Tensor], weights: list[Tensor]) -> None:
        """Mean log-ratio, fraction of clipped tokens, mean weight, and effective sample size."""
        own, count = self.own, sum(map(len, weights))
        total = sum(float(weight.sum()) for weight in weights)
        squares = sum(float(weight.pow(2).sum()) for weight in weights)
        outside = sum(int(((d < own.delta_low) | (d > own.delta_high)).sum())
                      for d in (centered(delta, own) for delta in deltas))
        row |= {"pear/delta": sum(float(delta.sum()) for delta in deltas) / count,
                "pear/clipped": outside / count, "pear/weight": total / count,
                "pear/effective": total ** 2 / (count * squares)}

    # RL ----------------------------------------------------------------------------------------

    def after_step(self, row: dict, progress: Progress) -> None:
        """When the policy is validated, how far RL has moved the weights."""
        every = self.run.steps_per_epoch(progress.stage) * self.settings.training.validate_every
        step = progress.step + 1
        if progress.stage.name == "rl" and (step == progress.steps or step % every == 0):
            changes = weight_changes(self.at_first, self.after_sft,
                                     copy_of(self.run.policy.trained_weights()))
            row |= {f"pear/{name}": value for name, value in changes.items()}

    # The checkpoint ----------------------------------------------------------------------------

    def state(self) -> dict:
        known = self.demonstrations
        return {} if known is None else {"demonstrations": sizes_of(known)}

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"after_sft/{name}": weight for name, weight in self.after_sft.items()}
        return kept | tensors_of(self.demonstrations or {})

    def load_state(self, state: dict, tensors: dict[str, Tensor]) -> None:
        self.after_sft = {name.removeprefix("after_sft/"): weight
                          for name, weight in tensors.items() if name.startswith("after_sft/")}
        if "demonstrations" in state:
            self.demonstrations = demonstrations_from(state["demonstrations"], tensors,
                                                      self.run.policy.device)


def centered(delta: Tensor, own: PEARSettings) -> Tensor:
    """The log-ratios (T,) of an answer, minus their mean with `pear.centered`."""
    return delta - delta.mean() if own.centered else delta


def log_weights(delta: Tensor, own: PEARSettings) -> Tensor:
    """log G (T,) of every token of an answer.

    Args:
        delta: (T,) log pi_theta - log pi_beta, not clipped.
    """
    delta = centered(delta, own).clamp(own.delta_low, own.delta_high).double()
    length, up_to = len(delta), delta.cumsum(0)
    if own.level == "sequence":
        result = up_to[-1].expand(length)
    else:
        size = own.block_size if own.level == "block" else 1
        place = delta.new_ones(length).cumsum(0)  # 1..T
        end = ((place / size).ceil() * size).clamp(max=length)
        result = (length - end) * math.log(own.gamma) + up_to[-1] - up_to[end.long() - 1]
    return result.clamp(own.log_weight_low, own.log_weight_high).float()
