"""HPT (arXiv 2509.04419): RL on a problem that is solved often enough, otherwise SFT.

    P(q) = fraction of correct answers among G
    P(q) > gamma:   the loss of Dr. GRPO on the G answers
    P(q) <= gamma:  the answers are dropped; L_SFT on the problem's demonstration

Read from the released code and second-hand notes. gamma is 0 for Qwen and 2/8 for Llama; with 0
this is SuperRL's rule, whose code it shares, including how the two losses are weighted (our choice,
see `superrl.py`). The setup `hpt` has the released code's loss: no division by the deviation, no
clip, sums over a constant length, no KL, entropy weight 0.001. Differences from that code: it
divides the summed loss by the maximum length only, not by the number of answers, so the entropy and
HPT's SFT have more weight there; `constant` divides by both. It skips an update whose gradient norm
exceeds 80; that number belongs to its normalization, so other losses need another. gamma < 0 is
pure RL and gamma = 1 pure SFT.
"""

from ..config.settings import Settings
from ..learning.step import Rollout
from ..setups import Setup
from .superrl import Gated


class HPT(Gated):
    """RL above a rate of correct answers, SFT below."""

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.sft_coefficient = self.own.sft_coefficient
        self.largest_norm = self.own.largest_norm or self.largest_norm

    def learn_by_rl(self, rollouts: list[Rollout]) -> list[bool]:
        return [rollout.solved > self.own.gamma for rollout in rollouts]
