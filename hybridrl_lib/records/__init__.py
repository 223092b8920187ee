"""What a run leaves on disk."""

from ..system.faces import lazy

_HOMES = {
    "RunFolder": "run_folder", "run_folder": "run_folder", "NUMERICS_VERSION": "run_folder",
    "experiment_folder": "folders", "published_folder": "folders", "results_folder": "folders",
    "Health": "health", "DETECTORS": "health",
    "only_writer": "locks",
}
__getattr__, __all__ = lazy(__name__, _HOMES)
