"""The policy pi_theta: load, score, sample, save."""

from ..system.faces import lazy

_HOMES = {
    "Policy": "policy",
    "load_policy": "loading", "load_tokenizer": "loading",
    "choose_device": "device", "choose_precision": "device",
    "INSTRUCTION": "prompts", "encode_prompt": "prompts", "prompt_text": "prompts",
    "PromptCompletion": "packing", "Packed": "packing", "pack": "packing",
    "score_tokens": "scoring",
    "sample": "sampling",
    "Completion": "completions", "Group": "completions",
}
__getattr__, __all__ = lazy(__name__, _HOMES)
