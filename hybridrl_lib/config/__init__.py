"""Every setting of a run: its default, bounds, and source; presets."""

from ..system.faces import lazy

_HOMES = {
    "load_settings": "presets", "preset_names": "presets", "resolve_preset": "presets",
    "get_setup": "presets", "describe": "presets", "difference": "presets",
    "settings_to_dict": "presets", "settings_from_dict": "presets",
    "Settings": "settings", "MethodSettings": "settings",
    "METHODS": "methods",
    "ModelSettings": "sections", "DataSettings": "sections", "TrainingSettings": "sections",
    "SFTSettings": "sections", "RLSettings": "sections", "EntropyControlSettings": "sections",
    "EvaluationSettings": "sections", "ProbeSettings": "sections", "VerifierSettings": "sections",
}
__getattr__, __all__ = lazy(__name__, _HOMES)
