"""Coverage-guided fuzzing of verification: any completion, golds of all kinds, a real worker."""

import sys
import time

import atheris

with atheris.instrument_imports(include=["hybridrl_lib.rewards"]):
    from hybridrl_lib.rewards import answers as answers_module
    from hybridrl_lib.rewards import numeric, verifier
    from hybridrl_lib.rewards.verifier import REASONS, Verifier

GOLDS = (
    "7919", "-10", "0.0000672", r"\frac{3}{4}", r"1\frac{4}{5}", r"5.4 \text{ cents}",
    r"90^\circ", r"12.5\%", r"\text{Evelyn}", r"\text{(C)}", "52_8", r"3\sqrt{13}", "6 - 5i",
    "2k+2", "1,-2", "(3,4]", r"x \in [-2,7]", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
    "y = 2x + 3", r"\{1\pm\sqrt{5},-2\}",
)  # fmt: skip
TIME_LIMIT = 2.0
SHARED = Verifier(time_limit=TIME_LIMIT)
CACHES = (answers_module.canonical, answers_module.is_malformed, numeric.decide,
          numeric.parse_number)  # fmt: skip


def check_one(data: bytes) -> None:
    """No exception, a known reason, no answer far beyond the limit, and nothing for no box."""
    if len(data) < 2:
        return
    gold, text = GOLDS[data[0] % len(GOLDS)], data[2:].decode("utf-8", "surrogateescape")
    text = rf"\boxed{{{text}}}" if data[1] % 4 else text  # mostly one box, else as it comes
    started = time.monotonic()
    found, unfinished = SHARED.verify([gold, gold], [text, text], [True, False])
    # Each box may take the limit twice: a worker that breaks is given a second try.
    assert time.monotonic() - started < 2 * TIME_LIMIT * (verifier.MAX_BOXES + 1) + 60
    assert found.reason in REASONS and found.strict == (found.reason == "right")
    assert found.lenient or not found.strict
    assert unfinished.reason == "truncated" and not unfinished.strict
    if found.strict:
        assert answers_module.extract_boxes(text)
        # The same answer behind another one is a guess.
        guess = SHARED.verify([gold], [text + r" \boxed{123456789}"], [True])[0]
        assert not guess.strict
    for cached in CACHES:
        if cached.cache_info().currsize > 10_000:
            cached.cache_clear()
    if len(SHARED._outcomes) > 10_000:
        SHARED._outcomes.clear()


if __name__ == "__main__":
    atheris.Setup(sys.argv, check_one)
    atheris.Fuzz()
