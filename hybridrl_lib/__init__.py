"""hybridrl_lib: combining supervised fine-tuning and GRPO on small language models.

Names are imported when first used, so commands that do not need torch start at once.
"""

from .system.faces import lazy

__version__ = "0.1.0"
_HOMES = {
    "Settings": "config", "load_settings": "config", "get_setup": "config",
    "Problem": "problems", "get_benchmark": "problems", "load_parts": "problems",
    "Policy": "policy", "PromptCompletion": "policy", "load_policy": "policy", "pack": "policy",
    "prompt_text": "policy", "sample": "policy",
    "Verifier": "rewards", "check_gold": "rewards", "extract_boxes": "rewards",
    "extract_lenient": "rewards", "steps_hold": "rewards",
    "SETUPS": "setups", "setups_with_notebook": "setups",
    "evaluate": "training",
    "verdicts_of": "learning",
    "make_report": "report",
    "run": "experiments.run", "reproduce": "experiments.reproduce",
    "compare": "experiments.compare", "choose_arms": "experiments.compare",
    "choose": "experiments.tuning", "SWEEPS": "experiments.sweep", "sweep": "experiments.sweep",
    "UserError": "system.errors",
}
__getattr__, __all__ = lazy(__name__, _HOMES)
