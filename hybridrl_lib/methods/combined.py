"""Both losses in every step: L = lambda L_SFT + (1 - lambda) L_RL (paper, section 3).

lambda is constant, or moves along a line or half a cosine from its first value to its last.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..setups import Setup
from .method import Method, Progress, Weights, mixing_stage


@dataclass(frozen=True)
class CombinedSettings(Section):
    """lambda and its schedule."""

    section: ClassVar[str] = "combined"
    first: float = setting(0.5, "lambda at the first step", "paper §3 has no value",
                           at_least=0, at_most=1)
    last: float = setting(0.5, "lambda at the last step", "paper §3 has no value",
                          at_least=0, at_most=1)
    schedule: str = setting("constant", "how lambda moves from first to last",
                            "paper §3: at any time", choices=("constant", "linear", "cosine"))

    def check(self) -> None:
        if self.schedule == "constant" and self.first != self.last:
            self.refuse("last", f"a constant lambda stays at combined.first = {self.first:g}; "
                        "choose combined.schedule=linear or cosine")


class Combined(Method):
    """A weighted sum of the two losses, with a weight that may follow a schedule."""

    settings_section = CombinedSettings
    dynamic_sampling = True

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        self.stages = (mixing_stage(settings),)

    def weights(self, progress: Progress) -> Weights:
        way = progress.way
        if self.own.schedule == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        share = self.own.first + (self.own.last - self.own.first) * way
        return Weights(sft=share, rl=1 - share)
