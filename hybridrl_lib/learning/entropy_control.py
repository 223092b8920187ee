"""Ways to keep the entropy of RL from collapsing (`entropy_control.*`), for methods that sample.

    adaptive  L - c H while H is below a target; after each step c rises by a fixed change if H is
              below it and falls otherwise, within 0 and a maximum (Skywork-OR1)
    clip_cov  a few random tokens among those with a large covariance give no policy gradient
    kl_cov    the tokens of largest covariance pay |log pi - log pi_old|

A constant bonus is the paper's own entropy term, `rl.gamma` in a setup with entropy regularization.

H is the mean entropy at all tokens of an update: of sampled answers and, if a method puts them into
the same update (combined, chord, luffy, superrl, hpt, uft, prefix_rft), of demonstrations, hints,
and prefixes. A step that samples may also take an update on demonstrations only. That update has
the entropy term if it is part of the step's loss (bridge), and none if it is a separate SFT update
(relift, mifo, sasr).

    covariance of token t = (log pi(y_t) - mean) (A_t - mean), with means over the tokens of an
                            update that L_RL weights (hybrids of prefix_rft have no weight there)

Clip-Cov and KL-Cov are from arXiv 2505.22617. Its released code differs from this one: it has the
token mean, no KL, an open or missing clip of the ratio (`rl.loss_normalization`, `rl.beta`,
`rl.clip`, and `rl.epsilon_*` here), and computes covariances over the micro-batch that reaches the
loss, so its result depends on memory. Here they are over the optimizer update, which is scored once
more before it; fractions are of all tokens of the update, at least one token. Skywork-OR1 measures
H as -mean log pi_old of the sampled tokens of the previous step; here it is the entropy of the
sampler's distributions at this step, of which that is an estimate. Groups without signal count in
all means and, since the bonus acts on them, are not skipped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config.settings import Settings
from ..system.seeds import seed_of
from .update import Update


class EntropyControl:
    """What `entropy_control.kind` does over a run.

    Args:
        settings: of the run.
        seed: of the run; determines the random choice of clip_cov.
    """

    kept = ("coefficient",)  # in a checkpoint

    def __init__(self, settings: Settings, seed: int):
        self.settings, self.own, self.seed = settings, settings.entropy_control, seed
        self.coefficient = 0.0
        self._clear(0)

    def _clear(self, step: int) -> None:
        self.step, self.updates = step, 0
        self.tokens, self.marked, self.covariance = 0, 0, 0.0
        self.columns: dict[str, float] = {}  # of the step's line in metrics.jsonl

    def begin_step(self, step: int, entropy: float) -> float:
        """The entropy weight that a step adds to its own.

        Args:
            step: steps taken before.
            entropy: of the step's rollouts, nats per token.
        """
        self._clear(step)
        if self.own.kind != "adaptive":
            return 0.0
        low = entropy < self.own.target
        used = self.coefficient if low else 0.0
        moved = self.coefficient + (self.own.change if low else -self.own.change)
        self.coefficient = min(max(moved, 0.0), self.own.largest)
        self.columns["entropy_control/coefficient"] = used
        return used

    def sampled_to_mark(self, update: Update) -> list[int]:
        """The sampled completions of an update whose tokens may be marked; empty for none."""
        if self.own.kind not in ("clip_cov", "kl_cov"):
            return []
        if self.own.kind == "kl_cov" and update.old is None:  # |log ratio| has no gradient yet
            return []
        return (update.rl != 0).nonzero().squeeze(-1).tolist()

    def mark(self, update: Update, sampled: Sequence[int], scores: Sequence[Tensor]) -> None:
        """Chooses the tokens of an update that are treated differently: fills `update.marked`.

        Args:
            sampled: what `sampled_to_mark` gives.
            scores: log pi (T_i,) of these completions.
        """
        scores = [s.cpu() for s in scores]
        advantages = torch.cat([
            update.advantages[i] + (torch.zeros(len(s)) if update.token_advantages is None
                                    else update.token_advantages[i])
            for i, s in zip(sampled, scores, strict=True)])
        covariance = covariances(torch.cat(scores), advantages)
        chosen = self._choose(covariance)
        pieces = iter(chosen.split([len(s) for s in scores]))
        update.marked = [next(pieces) if i in set(sampled) else
                         torch.zeros(len(s.completion), dtype=torch.bool)
                         for i, s in enumerate(update.sequences)]
        self.updates += 1
        self.tokens += len(chosen)
        self.marked += int(chosen.sum())
        self.covariance += float(covariance.sum())
        self.columns = {"entropy_control/covariance": self.covariance / self.tokens,
                        "entropy_control/share": self.marked / self.tokens}

    def _choose(self, covariance: Tensor) -> Tensor:
        """(N,) bool: the marked tokens."""
        own, chosen = self.own, torch.zeros(len(covariance), dtype=torch.bool)
        if own.kind == "kl_cov":
            chosen[covariance.topk(max(1, int(own.kl_share * len(covariance)))).indices] = True
            return chosen
        within = ((covariance >= own.clip_low) & (covariance <= own.clip_high)).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(
            seed_of(self.seed, "clip_cov", self.step, self.updates))
        order = torch.randperm(len(within), generator=generator)
        chosen[within[order[:max(1, int(own.clip_share * len(covariance)))]]] = True
        return chosen

    def penalty(self, log_p: Tensor, old: Tensor, marked: Tensor, weights: Tensor) -> Tensor:
        """KL-Cov: sum_t w_t |log pi - log pi_old| over the marked tokens. Arguments (N,)."""
        return (weights * self.own.kl_weight * marked * (log_p - old).abs()).sum()


def covariances(log_p: Tensor, advantages: Tensor) -> Tensor:
    """(log pi - mean) (A - mean) of each token; their mean drives the entropy down. Shapes (N,)."""
    return (log_p - log_p.mean()) * (advantages - advantages.mean())
