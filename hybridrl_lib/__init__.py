"""hybridrl_lib: combining supervised fine-tuning and GRPO on small language models.

These are the public names. They are imported when first used, so commands that do not need torch
start at once.
"""

from .system.faces import lazy

__version__ = "0.1.0"
__getattr__, __all__ = lazy(__name__, {
    "config.presets": "get_setup load_settings",
    "config.settings": "Settings",
    "experiments.compare": "choose_arms compare",
    "experiments.reproduce": "reproduce",
    "experiments.run": "run",
    "experiments.sweep": "SWEEPS sweep",
    "experiments.tuning": "choose",
    "learning.judging": "verdicts_of",
    "policy.loading": "load_policy",
    "policy.packing": "PromptCompletion pack",
    "policy.policy": "Policy",
    "policy.prompts": "prompt_text",
    "policy.sampling": "sample",
    "problems.benchmarks": "get_benchmark",
    "problems.problem": "Problem",
    "problems.splits": "load_parts",
    "report.report": "make_report",
    "rewards.answers": "extract_boxes extract_lenient",
    "rewards.steps": "steps_hold",
    "rewards.verifier": "Verifier check_gold",
    "setups": "SETUPS setups_with_notebook",
    "system.errors": "UserError",
    "training.evaluation": "evaluate",
})
