"""Ways to keep the entropy of RL from collapsing, for every method (`entropy_control.*`).

    bonus     L - c H, c constant; as the paper's gamma, but only in steps that sample
    adaptive  L - c H while H is below a target; after each step c rises by a fixed change where H
              is below it and falls where it is not, within 0 and a largest value (Skywork-OR1)
    clip_cov  a random few of the tokens whose covariance is large give no policy gradient
    kl_cov    the tokens of largest covariance pay |log pi - log pi_old|

H of bonus and adaptive is the mean entropy at all tokens of an update, as with the paper's gamma:
of sampled answers and, where a method puts them into the same update (combined, chord, luffy,
superrl, hpt, uft, prefix_rft), of demonstrations, hints and prefixes as well. A step that samples
may also take an update of demonstrations alone: that has the term where it is a part of the step's
loss (bridge), and none where it is SFT beside RL (relift, mifo, sasr).

    covariance of token t = (log pi(y_t) - mean) (A_t - mean), means over an update's tokens that
                            L_RL weighs (hybrids of prefix_rft have no weight there)

Clip-Cov and KL-Cov are of 2505.22617, whose code was read for the sheet this follows: shares are
of all tokens of the update, at least one token. That code computes them over the micro-batch which
reaches the loss, so that its result moves with memory; here they are over the optimiser update,
scored once more before it. Its scripts also open or leave out the ratio's clip; that is `rl.clip`
and `rl.epsilon_*` here. Skywork measures H as -mean log pi_old of the sampled tokens; here it is
the entropy of the sampler's distributions, of which that is an estimate. Groups without signal
count in all means and, as the bonus acts on them, are not left out.
"""

import torch
from torch import Tensor

from .config import Settings
from .records import seed_of
from .updates import Learner, Update


class EntropyControl:
    """What `entropy_control.kind` says, over a run.

    Args:
        settings: of the run.
        seed: of the run; the random choice of clip_cov follows from it.
    """

    def __init__(self, settings: Settings, seed: int):
        self.settings, self.own, self.seed = settings, settings.entropy_control, seed
        self.coefficient = self.own.coefficient if self.own.kind == "bonus" else 0.0
        self._clear(0)

    def _clear(self, step: int) -> None:
        self.step, self.updates = step, 0
        self.tokens, self.marked, self.covariance = 0, 0, 0.0
        self.columns: dict[str, float] = {}  # of the step's line in metrics.jsonl

    def begin_step(self, step: int, entropy: float) -> float:
        """The weight of the entropy that a step adds to its own.

        Args:
            step: steps taken before.
            entropy: of the step's rollouts, nats a token.
        """
        self._clear(step)
        if self.own.kind not in ("bonus", "adaptive"):
            return 0.0
        used = self.coefficient
        if self.own.kind == "adaptive":
            low = entropy < self.own.target
            used = used if low else 0.0
            moved = self.coefficient + (self.own.change if low else -self.own.change)
            self.coefficient = min(max(moved, 0.0), self.own.largest)
        self.columns["entropy_control/coefficient"] = used
        return used

    def mark(self, update: Update, learner: Learner) -> None:
        """Chooses the tokens of an update that are treated apart: fills `update.marked`."""
        sampled = (update.rl != 0).nonzero().squeeze(-1).tolist()
        on_policy = self.own.kind == "kl_cov" and update.old is None  # |log ratio| has no gradient
        if self.own.kind not in ("clip_cov", "kl_cov") or not sampled or on_policy:
            return
        scores = [s.cpu() for s in learner.scores([update.sequences[i] for i in sampled])]
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
        """(N,) bool: the tokens that are treated apart."""
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

    def losses(self, losses: Tensor, marked: Tensor, scores: Tensor, old: Tensor) -> Tensor:
        """The policy's losses per token with the marked ones treated apart. Shapes (N,)."""
        if self.own.kind == "clip_cov":
            return torch.where(marked, losses.detach(), losses)
        return losses + self.own.kl_weight * marked * (scores - old).abs()

    def state(self) -> dict:
        """What a checkpoint has to hold."""
        return {"coefficient": self.coefficient}

    def load_state(self, state: dict) -> None:
        self.coefficient = state["coefficient"]


def covariances(log_probabilities: Tensor, advantages: Tensor) -> Tensor:
    """(log pi - mean) (A - mean) of each token; their mean drives the entropy down. Shapes (N,)."""
    return ((log_probabilities - log_probabilities.mean())
            * (advantages - advantages.mean()))
