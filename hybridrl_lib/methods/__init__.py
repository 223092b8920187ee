"""Methods: each decides lambda_SFT(t) and lambda_RL(t), one file a method."""

from ..config import Settings
from ..setups import Setup
from .method import Method, Progress, Stage, Weights
from .staged import Staged

METHODS = {"staged": Staged}


def make_method(setup: Setup, settings: Settings) -> Method:
    """The method of a setup, with its settings."""
    return METHODS[setup.method](setup, settings)


__all__ = ["METHODS", "Method", "Progress", "Stage", "Weights", "make_method"]
