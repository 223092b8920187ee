"""What the final answer of a text is, and whether it is correct."""

from ..system.faces import lazy

_HOMES = {
    "extract_boxes": "answers", "extract_lenient": "answers",
    "numbers_equal": "numeric",
    "equations": "steps", "steps_hold": "steps",
    "REASONS": "verifier", "Verdict": "verifier", "Verifier": "verifier", "check_gold": "verifier",
    "SharedVerifier": "shared",
}
__getattr__, __all__ = lazy(__name__, _HOMES)
