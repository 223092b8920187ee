"""HPT (arXiv 2509.04419): RL on a problem that is solved often enough, else SFT.

    P(q) = share of right answers among G
    P(q) > gamma:   the loss of Dr. GRPO on the G answers
    P(q) <= gamma:  the answers are dropped; L_SFT on the problem's demonstration

Read from the released code and second-hand notes. gamma is 0 for Qwen and 2/8 for Llama; with 0
this is SuperRL's rule, whose code it shares, also in how the two losses are weighed (ours, see
`superrl.py`). The setup `hpt` has the released code's loss: no division by the deviation, no clip,
sums over a constant length, no KL, weight of the entropy 0.001. It skips an update whose gradient
norm exceeds 80; that number belongs to its normalisation, so that other losses need another.
gamma < 0 is pure RL and gamma = 1 pure SFT.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .superrl import Gated


@dataclass(frozen=True)
class HPTSettings(Section):
    """The gate and the weight of what it sends to SFT."""

    section: ClassVar[str] = "hpt"
    gamma: float = setting(0.0, "a problem is taught by RL if its share of right answers is above "
                           "it", "released code: 0 for Qwen, 0.25 for Llama",
                           at_least=-1, at_most=1)
    sft_coefficient: float = setting(1.0, "factor of the SFT loss",
                                     "released code: 1, and 0.3 for 1.5B", at_least=0)
    largest_norm: float | None = setting(80.0, "an update with a larger gradient norm, before "
                                         "clipping, is left out; none = none is",
                                         "released code: 80", above=0)


class HPT(Gated):
    """RL above a rate of right answers, SFT below."""

    settings_section = HPTSettings

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.sft_coefficient = self.own.sft_coefficient
        self.largest_norm = self.own.largest_norm or self.largest_norm

    def learn_by_rl(self, rollouts):
        return [rollout.solved > self.own.gamma for rollout in rollouts]
