"""hybridrl_lib: combining supervised fine-tuning and GRPO on small language models.

Names are imported when first used, so that commands which need no torch start at once.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "load_settings": "config", "Settings": "config",
    "Problem": "problems", "load_parts": "problems",
    "load_policy": "policy", "Policy": "policy",
    "sample": "rollouts", "evaluate": "evaluation",
    "Verifier": "rewards", "make_report": "report", "SETUPS": "setups",
    "UserError": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
