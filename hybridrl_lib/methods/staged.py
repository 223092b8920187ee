"""The paper's six setups: SFT epochs with lambda = (1, 0), then RL epochs with lambda = (0, 1).

Algorithm 1: for each epoch of SFT, for each batch, compute L_SFT and update; for each epoch of RL,
for each x, sample, reward, compute L_RL, and update. A setup with both stages gives each half of
the epochs (5 + 5), and SFT the odd one.
"""

from .method import Method


class Staged(Method):
    """Stages of fixed length, one after the other."""
