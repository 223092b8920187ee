"""Problems: what is asked, the reference solution, the parts, the prompt."""

from .benchmarks import BENCHMARKS, get_benchmark
from .problem import Benchmark, BenchmarkData, Problem, answer_sentence, solution_steps
from .prompts import INSTRUCTION, encode_prompt, pad_token_id, prompt_text, stop_token_ids
from .splits import ProblemParts, in_turn, load_parts

__all__ = ["BENCHMARKS", "INSTRUCTION", "Benchmark", "BenchmarkData", "Problem", "ProblemParts",
           "answer_sentence", "encode_prompt", "get_benchmark", "in_turn", "load_parts",
           "pad_token_id", "prompt_text", "solution_steps", "stop_token_ids"]
