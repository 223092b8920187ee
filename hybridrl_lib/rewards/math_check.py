"""The worker process: math-verify on one gold answer and one answer at a time.

Run as `python -m hybridrl_lib.rewards.math_check`. Each request and each reply is a JSON object
after its length in four bytes. The process ends with its input. It has no time limit of its own,
since math-verify's signals are ignored by some computations; the parent kills it.
"""

import json
import logging
import math
import os
import signal
import struct
import sys
from functools import lru_cache
from typing import Any, BinaryIO

LENGTH = struct.Struct(">I")
OUT_OF_MEMORY_EXIT = 3


def write_message(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Send one JSON object."""
    data = json.dumps(message).encode()  # ASCII: lone surrogates survive as escapes
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """Receive one JSON object; None if the other side has closed."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    data = stream.read(length)
    return json.loads(data) if len(data) == length else None


@lru_cache(maxsize=4_096)
def _parse(answer: str) -> tuple[Any, ...]:
    """The answer as SymPy objects; empty if it cannot be parsed."""
    from math_verify import LatexExtractionConfig, parse

    found = parse(
        "$" + answer.replace("%", r"\%") + "$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None)
    return tuple(_with_imaginary_unit(expression) for expression in found)


def _with_imaginary_unit(expression: Any) -> Any:
    """Reads `i` as the imaginary unit; math-verify makes different symbols of "5i" and "5 i"."""
    import sympy

    symbols = [s for s in getattr(expression, "free_symbols", ()) if s.name == "i"]
    return expression.subs({symbol: sympy.I for symbol in symbols}) if symbols else expression


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    # Intervals may be answered by inequalities: x > 5 for (5, \infty).
    return verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True)


def check(gold: str, answer: str) -> str:
    """ "right", "wrong", "unparsable" (the answer) or "bad_gold"."""
    try:
        parsed_gold = list(_parse(gold))
    except MemoryError:
        raise
    except Exception:
        parsed_gold = []
    if not parsed_gold:
        return "bad_gold"
    try:
        parsed_answer = list(_parse(answer))
        if not parsed_answer:
            return "unparsable"
        # Gold first: the comparison is not symmetric.
        return "right" if _verify(parsed_gold, parsed_answer) else "wrong"
    except MemoryError:
        raise
    except Exception:  # whatever a hostile answer makes SymPy raise, it is not right
        return "unparsable"


def _limit_memory(bytes_allowed: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (bytes_allowed, bytes_allowed))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # only a guard: the parent's time limit holds without it


def _limit_processor_time(seconds: float) -> None:
    """Lets the system end this process if the parent is gone."""
    try:
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(usage.ru_utime + usage.ru_stime + 2 * seconds) + 10
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    except (ImportError, ValueError, OSError):
        pass


def main() -> None:
    """Answer requests {"gold", "answer", "seconds"} until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not look like a reply
    _limit_memory(int(sys.argv[1]))
    try:
        check("\\sqrt{2}+x", "x+2^{1/2}")  # loads and warms everything before a clock runs
    except ImportError as error:
        write_message(replies, {"error": str(error)})
        return
    write_message(replies, {"ready": True})
    while (request := read_message(sys.stdin.buffer)) is not None:
        _limit_processor_time(request["seconds"])
        try:
            outcome = check(request["gold"], request["answer"])
        except MemoryError:
            os._exit(OUT_OF_MEMORY_EXIT)
        write_message(replies, {"outcome": outcome})


if __name__ == "__main__":
    main()
