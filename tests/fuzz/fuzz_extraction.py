"""Coverage-guided fuzzing of answer extraction: any text, no worker. See README.md beside this."""

import sys

import atheris

with atheris.instrument_imports(include=["hybridrl_lib.rewards.answers"]):
    from hybridrl_lib.rewards import answers


def check_one(data: bytes) -> None:
    """No exception, and what is found stands in the text or is made of it."""
    text = data.decode("utf-8", "surrogateescape")
    boxes, unclosed = answers.scan_boxes(text)
    assert isinstance(unclosed, bool) and len(boxes) <= text.count("box")
    assert sum(map(len, boxes)) <= len(text)
    lenient = answers.extract_lenient(text)
    assert lenient is None or len(lenient) <= len(text)
    for answer in (text, *boxes, lenient or ""):
        answers.canonical(answer)
        answers.is_text(answer)
        answers.words(answer)
        answers.has_foreign_signs(answer)
        answers.is_malformed(answer)
        # Wrapping and spaces change nothing that has a meaning.
        assert answers.canonical(f" {answer} ") == answers.canonical(answer)
    for cached in (answers.canonical, answers.is_malformed):
        if cached.cache_info().currsize > 10_000:
            cached.cache_clear()


if __name__ == "__main__":
    atheris.Setup(sys.argv, check_one)
    atheris.Fuzz()
