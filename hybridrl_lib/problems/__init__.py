"""What is asked: problems, benchmarks, and their splits."""

from ..system.faces import lazy

_HOMES = {
    "BENCHMARKS": "benchmarks", "get_benchmark": "benchmarks",
    "Benchmark": "problem", "BenchmarkData": "problem", "Problem": "problem",
    "answer_sentence": "problem", "solution_steps": "problem",
    "ProblemParts": "splits", "in_turn": "splits", "load_parts": "splits",
}
__getattr__, __all__ = lazy(__name__, _HOMES)
