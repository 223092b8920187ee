"""BRIDGE (arXiv 2509.06948 v1-v3): an adapter learns what makes SFT help RL.

    theta: base weights; w: LoRA adapter; hat: a copy of theta that learns from RL alone
    in every update, with gradients g of losses, all at the weights before it:
        g_sft, g_rl at (theta, w);  g_hat = that of L_RL at (hat, w), on the same rollouts
        theta <- theta - alpha [(1 - lambda) g_sft + lambda g_rl]        (the part for theta)
        hat   <- hat   - alpha g_hat                                     (the part for hat)
        w     <- w     - beta  [(1 - lambda) g_sft + lambda (g_rl - g_hat)]   (the parts for w)

J_RL(theta, w) - J_RL(hat, w) is the cooperative gain: what joint training gains over RL alone.

Second-hand: no official code; a note, reviews, and abstracts. Ambiguous: the policy gradient, GRPO
or PPO (here GRPO); LoRA's rank (`model.lora_rank`); beta, w's learning rate (5e-7 is given for all;
`bridge.adapter_learning_rate`); whether lambda is annealed (0.5 in the appendix;
`bridge.last_rl_weight`); and whether hat persists or is one step ahead of theta
(`bridge.auxiliary`). A wrong answer has reward -1 there and 0 here, which makes no difference for
an advantage that is divided by the deviation. hat has not sampled the answers: its ratio, and its
clip, are relative to the policy that did. Each of the three has its own AdamW, and its gradient is
clipped separately. The KL anchor is the initial model without an adapter. If hat persists, its gain
has no gradient at the first update, since hat is theta. The second pass costs about as much as an
RL update; compare at equal compute. In memory there are the model, hat, the reference, two sets of
moments, and two gradients (three if hat is one step ahead): nine times the model in fp32.

`bridge_without_gain` keeps the adapter and drops the gain from what it learns, `bridge_joint` lets
it learn what theta learns, and `bridge_without_adapter` leaves it 0: then theta learns from (1 -
lambda) SFT + lambda RL, which is the method `combined` with the weight 1 - lambda.
"""

import math

import torch
from torch import Tensor

from ..config.settings import Settings
from ..learning.learner import Learner
from ..learning.progress import Progress, Weights
from ..learning.step import Step
from ..learning.update import Totals, Update
from ..setups import Setup
from .method import Method, Run

Gradient = dict[str, Tensor]  # by the name of the weight; without those that have none


class Bridge(Method):
    """SFT and RL on the base weights, and an adapter that is trained to make them cooperate."""

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.hat: dict[str, Tensor] = {}
        self.beside = 0  # updates of the adapter and of hat in this step

    def begin(self, run: Run) -> None:
        super().begin(run)
        before = set(run.policy.trained_weights())
        run.policy.train_base()
        self.trained = run.policy.trained_weights()  # kept: looking them up takes milliseconds
        self.base = {name: None for name in self.trained if name not in before}  # in order
        self._copy_theta_to_hat()

    def weights(self, progress: Progress) -> Weights:
        first, last = self.own.rl_weight, self.own.last_rl_weight
        rl = first if last is None else first + (last - first) * progress.fraction
        return Weights(sft=1 - rl, rl=rl)

    def compose(self, step: Step) -> list[Update]:
        """Alternating SFT and RL updates, both with the weight 1; `learn` mixes them."""
        updates, count = [], step.mini_batches
        for i in range(count):
            updates += [step.update(step.demonstrations[i::count], sft=1.0),
                        step.update(rollouts=step.rollouts[i::count], rl=1.0)]
        return updates

    def learn(self, step: Step, updates: list[Update], totals: Totals) -> list[float]:
        learner, own = step.learner, self.own
        for update in updates[1::2]:
            update.old = learner.scores(update.sequences)
        rate, adapter_rate = (
            step.learning_rate if peak is None else
            step.learning_rate * peak / self.settings.rl.learning_rate
            for peak in (own.base_learning_rate, own.adapter_learning_rate))
        norms: list[float] = []
        gains: list[float] = []
        self.beside = 0
        for taught, sampled in zip(updates[::2], updates[1::2], strict=True):
            mixed, for_adapter = self._mixed(step, taught, sampled, totals, rate, gains)
            norm = self._move(learner, mixed, True, rate, "main")
            if norm is not None:
                norms.append(norm)
            if own.adapter != "nothing":
                norm = self._move(learner, for_adapter, False, adapter_rate, "adapter")
                if norm is not None:
                    step.row["bridge/adapter_grad_norm"] = norm
        step.row["updates/beside"] = self.beside
        if gains:
            step.row["bridge/gain"] = sum(gains) / len(gains)
            step.row["bridge/distance"] = self._distance()
        return norms

    def _mixed(self, step: Step, taught: Update, sampled: Update, totals: Totals,
               rate: float, gains: list[float]) -> tuple[Gradient, Gradient]:
        """(gradient of the base weights, that of the adapter); hat has taken its step."""
        own, lam, learner = self.own, step.weights.rl, step.learner
        mixed = self._gradient(learner, taught, totals)
        before = totals.sums.get("loss/rl", 0.0)
        g_rl = self._gradient(learner, sampled, totals)
        loss = totals.sums.get("loss/rl", 0.0) - before
        of_sft, of_rl = (add((1.0, self._of_adapter(g))) for g in (mixed, g_rl))
        for g in mixed.values():  # in place: a gradient is as large as the model
            g.mul_(1 - lam)
        for name, g in g_rl.items():
            mixed[name] = mixed[name].add_(lam * g) if name in mixed else lam * g
        if own.adapter != "gain":
            return mixed, mixed if own.adapter == "both" else add((1 - lam, of_sft))
        if own.auxiliary == "persistent":
            g_rl = {}  # no longer needed
        of_hat, loss_hat = self._auxiliary(learner, sampled, g_rl, rate)
        gains.append(loss_hat - loss)
        gain = add((1.0, of_rl), (-1.0, of_hat))
        return mixed, add((1 - lam, of_sft), (lam, gain))

    # The auxiliary copy ------------------------------------------------------------------------

    def _auxiliary(self, learner: Learner, sampled: Update, g_rl: Gradient,
                   rate: float) -> tuple[Gradient, float]:
        """The adapter's part of g_hat, and L_RL at (hat, w); hat takes its step.

        The step clips the gradient that it is given, and is skipped only for its own loss.
        """
        totals = Totals()
        if self.own.auxiliary == "one_step":
            self._copy_theta_to_hat()
        own = {name: weight.data for name, weight in self.trained.items()}
        with learner.policy.with_weights(own | self.hat):
            if self.own.auxiliary == "one_step":
                self._move(learner, g_rl, True, rate, "hat")
                g_hat = self._gradient(learner, sampled, totals)
            else:
                g_hat = self._gradient(learner, sampled, totals)
                self._move(learner, g_hat, True, rate, "hat")
        return self._of_adapter(g_hat), totals.sums.get("loss/rl", 0.0)

    def _of_adapter(self, whole: Gradient) -> Gradient:
        return {name: g for name, g in whole.items() if name not in self.base}

    def _copy_theta_to_hat(self) -> None:
        if self.own.adapter == "gain":
            self.hat = {name: self.trained[name].detach().clone() for name in self.base}

    def _distance(self) -> float:
        """||theta - hat||."""
        return float(torch.nn.utils.get_total_norm(
            [self.trained[name].detach() - hat for name, hat in self.hat.items()]))

    def _gradient(self, learner: Learner, update: Update, totals: Totals) -> Gradient:
        """The gradient of an update's loss, taken off the weights.

        It is NaN if the loss is not finite: then whatever is made of it changes nothing.
        """
        learner.accumulate(update, totals)
        taken = {}
        for name, weight in self.trained.items():
            if weight.grad is not None:
                taken[name], weight.grad = weight.grad, None
        if not learner.loss_is_finite:
            taken = {name: g.fill_(math.nan) for name, g in taken.items()}
            learner.loss_is_finite = True
        return taken

    def _move(self, learner: Learner, wanted: Gradient, base: bool, rate: float,
              optimizer: str) -> float | None:
        """One step of the base weights, or of the adapter; None if there is no gradient."""
        mine = {name: g for name, g in wanted.items() if (name in self.base) == base}
        if not mine:
            return None
        for name, weight in self.trained.items():
            weight.grad = mine.get(name)
        norm = learner.step(rate, optimizer)
        self.beside += optimizer != "main" and math.isfinite(norm)
        return norm

    # The checkpoint ----------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.hat) if self.own.auxiliary == "persistent" else {}

    def load_state(self, state: dict, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.hat[name].copy_(tensor)


def add(*terms: tuple[float, Gradient]) -> Gradient:
    """A weighted sum of gradients, in new tensors."""
    result: Gradient = {}
    for factor, one in terms:
        for name, g in one.items():
            result[name] = factor * g if name not in result else result[name] + factor * g
    return result
