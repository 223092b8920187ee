"""Both losses in every step: L = lambda L_SFT + (1 - lambda) L_RL (the paper's first way).

lambda is constant, or moves linearly or along half a cosine from its first value to its last.
"""

import math

from ..learning.progress import Progress, Weights
from .method import Method


class Combined(Method):
    """A weighted sum of the two losses, with a weight that may follow a schedule."""

    def weights(self, progress: Progress) -> Weights:
        fraction = progress.fraction
        if self.own.schedule == "cosine":
            fraction = (1 - math.cos(math.pi * fraction)) / 2
        lam = self.own.first + (self.own.last - self.own.first) * fraction
        return Weights(sft=lam, rl=1 - lam)
