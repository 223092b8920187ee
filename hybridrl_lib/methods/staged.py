"""The paper's six setups: SFT epochs with lambda = (1, 0), then RL epochs with lambda = (0, 1).

Algorithm 1: for each epoch of SFT, for each batch, compute L_SFT and update; for each epoch of RL,
for each x, sample, reward, compute L_RL and update. A setup with both stages gives each half of
the epochs (5 + 5), the odd one to SFT.
"""

import math

from ..config import Settings
from ..setups import Setup
from .method import Method, Stage


class Staged(Method):
    """Stages of fixed length, one after the other."""

    dynamic_sampling = True

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        epochs, count = settings.training.epochs, len(setup.stages)
        shares = [epochs // count + (i < epochs % count) for i in range(count)]
        if setup.shares:
            shares = [math.ceil(share * epochs) if name == "sft" else max(1, int(share * epochs))
                      for name, share in zip(setup.stages, setup.shares, strict=True)]
        self.stages = tuple(Stage(name, share)
                            for name, share in zip(setup.stages, shares, strict=True))
