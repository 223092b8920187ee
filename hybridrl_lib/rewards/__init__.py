"""Rewards: strict and lenient verdicts on completions (paper.md §2)."""

from hybridrl_lib.rewards.answers import extract_boxes, extract_lenient
from hybridrl_lib.rewards.numeric import numbers_equal
from hybridrl_lib.rewards.steps import equations, steps_hold
from hybridrl_lib.rewards.verifier import REASONS, Verdict, Verifier, check_gold

__all__ = [
    "REASONS",
    "Verdict",
    "Verifier",
    "check_gold",
    "equations",
    "extract_boxes",
    "extract_lenient",
    "numbers_equal",
    "steps_hold",
]
