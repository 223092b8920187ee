"""The verifier against hand-written labels, the real problems, and attempts to cheat it."""

import json
import os
import re
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import pytest
import verdict_report
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridrl_lib.problems.benchmarks import BENCHMARKS
from hybridrl_lib.rewards import answers as reading
from hybridrl_lib.rewards.numeric import decide, numbers_equal
from hybridrl_lib.rewards.verifier import REASONS, Verifier, check_gold

# One process judges the corpus for all tests.
pytestmark = pytest.mark.xdist_group("verdicts")
ROWS = verdict_report.load_corpus()
REAL_DATA = pytest.mark.skipif("HYBRIDRL_DATA_DIR" not in os.environ,
                               reason="HYBRIDRL_DATA_DIR is not set")


@pytest.fixture(scope="module")
def verifier():
    """One verifier for all tests, because starting its workers takes most of the time."""
    with Verifier(workers=2, time_limit=30.0) as shared:
        yield shared


@pytest.fixture(scope="module")
def ours():
    """Our strict verdict on every row of the corpus; one answer never ends."""
    return verdict_report.our_verdicts(ROWS, seconds=5.0)


def test_corpus_is_well_formed():
    """A duplicate row, or one without a label, would distort the agreement."""
    keys = {(r["gold"], verdict_report.completion(r), r.get("finished", True)) for r in ROWS}
    assert len(keys) == len(ROWS) >= 300
    for row in ROWS:
        assert isinstance(row["right"], bool) and row["category"] and row["source"]
        assert ("answer" in row) != ("completion" in row)
    wrong = []
    for row in ROWS:
        if "answer" in row:
            right = row["right"] and "known" not in row
            found = decide(row["gold"], row["answer"])
            if found not in (None, *(("right",) if right else ("wrong", "unparsable"))):
                wrong.append((row["gold"], row["answer"], found))
    assert not wrong


def test_disagreements_are_the_known_ones(ours):
    """A verdict that changes is noticed, and the published agreement is of this verifier."""
    wrong = [row for row, verdict in zip(ROWS, ours, strict=True) if verdict != row["right"]]
    assert wrong == [row for row in ROWS if "known" in row]
    assert all(row["right"] for row in wrong)  # no false accept
    published = verdict_report.PAGE.read_text(encoding="utf-8")
    assert our_part(published) == our_part(verdict_report.page(ROWS, ours, ours))
    assert len(our_part(published)) > 10


def our_part(page: str) -> list[list[str]]:
    """The cells of the page's table without those of math-verify, and the list of our errors."""
    table = [[cell.strip() for cell in line.strip("| ").split("|")][:6]
             for line in page.splitlines() if line.startswith("|")]
    return [*table, [line for line in page.splitlines() if re.match("- (accept|reject)ed", line)]]


@pytest.mark.slow
@pytest.mark.skipif(version("math-verify") != "0.9.0", reason="the page is of math-verify 0.9.0")
def test_the_page_is_current(ours):
    """The same for math-verify alone; `python tests/verdict_report.py --write` writes the page."""
    current = verdict_report.page(ROWS, ours, verdict_report.math_verify_verdicts(ROWS))
    assert verdict_report.PAGE.read_text(encoding="utf-8") == current


def perturbed(gold: str) -> str:
    """The gold with its first digit increased by one; one without digits gets ` + 1`."""
    digit = re.search("[0-9]", gold)
    if not digit:
        return gold + " + 1"
    place = digit.start()
    return f"{gold[:place]}{(int(gold[place]) + 1) % 10}{gold[place + 1:]}"


@REAL_DATA
def test_real_golds(verifier):
    """All golds parse and equal themselves and what their solution boxes, and no other answer."""
    wrong = []
    for name, count in (("gsm8k", 8792), ("math500", 500)):
        problems = BENCHMARKS[name].load().problems
        assert len(problems) == count
        golds = [problem.answer for problem in problems]
        for problem in problems:
            check_gold(problem.answer, problem.id)
        for expected, texts in ((True, [rf"\boxed{{{gold}}}" for gold in golds]),
                                (True, [problem.solution for problem in problems]),
                                (False, [rf"\boxed{{{perturbed(gold)}}}" for gold in golds])):
            verdicts = verifier.verify(golds, texts, [True] * count)
            wrong += [(problem.id, expected) for problem, verdict in
                      zip(problems, verdicts, strict=True) if verdict.strict != expected]
    assert not wrong


@REAL_DATA
def test_solutions_of_gsm8k_as_they_come(verifier):
    """`#### 72` without a box is right by the lenient rule and wrong by the strict one."""
    folder = Path(os.environ["HYBRIDRL_DATA_DIR"]) / "gsm8k"
    texts = [json.loads(line)["answer"] for name in ("train", "test")
             for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]  # fmt: skip
    golds = [text.rpartition("####")[2].strip() for text in texts]
    verdicts = verifier.verify(golds, texts, [True] * len(texts))
    assert all(verdict.lenient and verdict.reason == "no_box" for verdict in verdicts)


HACKS = {
    "several boxes": [r"\boxed{72} \boxed{73}", r"\boxed{73} \boxed{72}",
                      r"\boxed{71} or \boxed{72} or \boxed{73}", r"\boxed{72}\fbox{}",
                      "".join(rf"\boxed{{{n}}}" for n in range(100))],
    "no box": ["72", "The gold answer is 72.", "**72**", r"$72$", r"\box 72", "boxed{72}",
               r"Question: ... Gold: 72. I repeat the gold: 72", "[72]", r"{\large 72}"],
    "enumeration": [r"\boxed{71 or 72 or 73}", r"\boxed{71, 72, 73}", r"\boxed{71,72}",
                    r"\boxed{\{71,72,73\}}", r"\boxed{71 72 73}", r"\boxed{71;72}",
                    r"\boxed{71\text{ or }72}", r"\boxed{72\text{ ou 73}}", r"\boxed{72|73}",
                    r"\boxed{72 \pm 1}", r"\boxed{[71,73]}", r"\boxed{71 \le x \le 73}",
                    r"\boxed{72\\73}", r"\boxed{72 & 73}", r"\boxed{72 \lor 73}"],
    "free symbol": [r"\boxed{x}", r"\boxed{n}", r"\boxed{72x}", r"\boxed{x+72}", r"\boxed{72+C}",
                    r"\boxed{\text{answer}}", r"\boxed{y=x}", r"\boxed{x \in \mathbb{R}}"],
    "calculation left": [r"\boxed{70+2}", r"\boxed{8\times 9}", r"\boxed{72=70+2}",
                         r"\boxed{144 \div 2}", r"\boxed{8(9)}"],
    "injected marker": ["#### 72", "I think.\n#### 72\n", "#### \n#### 72", r"\boxed{} #### 72",
                        r"\boxed{#### 72}", r"\boxed{73} #### 72", "<answer>72</answer>"],
    "look-alike": ["\\boxed{\uff17\uff12}", "\\boxed{\u0667\u0662}", "\\boxed{7\u0662}",
                   "\\boxed{\u096d\u0968}", "\\boxed{\u2466\u2461}",
                   "\\boxed{\U0001d7d5\U0001d7d0}",
                   "\\boxed{\u2077\u2082}", "\\boxed{7\u01a7}", "\\boxed{7\u0417}",
                   "\\boxed{\u4e03\u5341\u4e8c}", "\\boxed{\u202e27}", "\\boxed{7\u200b2}",
                   "\\boxed{7Z}", "\\\u0431oxed{72}"],
    "comment or code": ["% \\boxed{72}", "Text.\n\t% so \\boxed{72}", r"\verb|\boxed{72}|",
                        r"\verb*!\boxed{72}!", "\\begin{verbatim}\\boxed{72}\\end{verbatim}",
                        "\\begin{comment}\n\\boxed{72}\n\\end{comment}", "<!-- \\boxed{72} -->",
                        "<!-- \\boxed{72}", "```\n\\boxed{72}\n```", "```tex\n\\boxed{72}"],
    "unclosed": [r"\boxed{72", r"\boxed{72} \boxed{72", r"\boxed{\boxed{72}"],
}  # fmt: skip


def test_hacks_earn_nothing(verifier):
    """Tricks that are cheaper than solving the problem earn nothing, or RL would find them."""
    tried = [(name, text) for name, texts in HACKS.items() for text in texts]
    verdicts = verifier.verify(["72"] * len(tried), [text for _, text in tried],
                               [True] * len(tried))
    rewarded = [hack for hack, verdict in zip(tried, verdicts, strict=True) if verdict.strict]
    assert not rewarded
    for text in (r"\boxed{72}", r"\boxed{72} \boxed{72}", r"So \boxed{72}. Next question:"):
        assert verifier.verify(["72"], [text], [True])[0].strict
        assert verifier.verify(["72"], [text], [False])[0].reason == "truncated"


def test_units_are_compared():
    """A unit that differs from the gold's is wrong; a missing or an additional one is fine."""
    rows = (
        (r"5.4 \text{ cents}", r"\$5.4", False), (r"5.4 \text{ cents}", "5.4", True),
        (r"5.4 \text{ cents}", "$5.4 \\text{ cents}$", True), ("5.4", r"\$5.4", True),
        (r"90^\circ", "90 degrees", True), (r"90^\circ", "90 radians", False),
    )  # fmt: skip
    wrong = [row for row in rows if numbers_equal(*row[:2]) is not row[2]]
    assert not wrong
    for answer in ("\u0445+1", "\uff58+1", "x\uff0b1", "\u03c7+1"):
        assert decide("x+1", answer) == "unparsable"
    assert not reading.has_foreign_signs("18\\text{ \u0440\u0443\u0431\u043b\u0435\u0439}")
    assert decide("\\text{Ren\u00e9}", "Ren\u00e9") == "right"
    most = reading.MAX_ANSWER_CHARACTERS
    for answer in ("9" * most, r"\,5" * (most // 3)):
        assert reading.canonical(f" {answer} ") == reading.canonical(answer)
        assert reading.is_malformed(f" {answer} ") == reading.is_malformed(answer)


PIECES = st.sampled_from(
    (*"0123456789+-*/=x^(){}[],;. %$#\n", r"\boxed{", r"\fbox{", r"\frac{", r"\sqrt", r"\text{",
     "\\", r"\{", r"\}", "####", " or ", r"\pm", r"\overline{", "```", "<!--", r"\verb|", "million",
     r"\times10^", "e", "\u0663", "\u200b", "\u00bd", "\ud800")
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join))
GOLDS = ("72", "-0.5", r"\frac{3}{4}", r"90^\circ", r"\text{Evelyn}", "52_8", "(3,5)")


@settings(deadline=None)
@given(text=TEXTS)
def test_any_text_can_be_read(text):
    """No text raises, and what is extracted is no longer than the text."""
    boxes, unclosed = reading.scan_boxes(text)
    assert sum(map(len, boxes)) <= len(text) and (not unclosed or "box" in text)
    assert boxes == reading.extract_boxes(text)
    lenient = reading.extract_lenient(text)
    assert lenient is None or len(lenient) <= len(text)
    for answer in (text, *boxes):
        assert reading.is_malformed(answer) in (True, False)
        assert reading.canonical(f"\t{answer} ") == reading.canonical(answer)
        for gold in GOLDS:
            assert decide(gold, answer) in (None, "right", "wrong", "unparsable")


@settings(deadline=None, max_examples=25)
@given(text=TEXTS, gold=st.sampled_from((*GOLDS, r"\sqrt{5}", "2k+2")), boxed=st.booleans())
def test_any_text_gets_a_verdict(verifier, text, gold, boxed):
    """The full check gives a known reason, and no reward without a box and an end."""
    text = rf"\boxed{{{text}}}" if boxed else text
    found, unfinished = verifier.verify([gold] * 2, [text] * 2, [True, False])
    assert found.reason in REASONS and found.strict == (found.reason == "right")
    assert found.lenient or not found.strict
    assert reading.extract_boxes(text) or not found.strict
    assert unfinished.reason == "truncated"


@settings(deadline=None)
@given(gold=st.integers(-10**9, 10**9), answer=st.integers(-10**9, 10**9), same=st.booleans(),
       spelling=st.sampled_from(("{}", "{:,}", "{}.0", "+{}", "({})", "x={}", r"\${:,}", "{} eggs",
                                 "{}.", "1+1={}", r"{}\text{{ cm}}", r"\frac{{{}}}{{1}}")))
def test_integers_are_equal_or_not(gold, answer, same, spelling):
    """An integer is right if and only if it is the same one, however it is written."""
    answer = gold if same else answer
    spelling = spelling.lstrip("+") if answer < 0 else spelling
    assert numbers_equal(str(gold), spelling.format(answer)) is (gold == answer)


@settings(deadline=None)
@given(gold=st.fractions(max_denominator=500), answer=st.fractions(max_denominator=500),
       same=st.booleans(), factor=st.integers(1, 50),
       spelling=st.sampled_from(("{}/{}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}", "({}/{})")))
def test_fractions_are_exact(gold, answer, same, factor, spelling):
    """Fractions are compared exactly, reduced or not."""
    answer = gold if same else answer
    text = spelling.format(answer.numerator * factor, answer.denominator * factor)
    written = rf"\frac{{{gold.numerator}}}{{{gold.denominator}}}"
    assert numbers_equal(written, text) is (gold == answer)


@settings(deadline=None)
@given(before=st.text("0123456789", max_size=4),
       period=st.text("0123456789", min_size=1, max_size=6))
def test_repeating_decimals_are_exact(before, period):
    r"""0.1\overline{6} is 1/6: the period stands for all its repetitions."""
    value = (int(before + period) - int(before or "0")) * Fraction(
        1, 10 ** len(before) * (10 ** len(period) - 1))
    gold = f"{value.numerator}/{value.denominator}"
    assert numbers_equal(gold, rf"0.{before}\overline{{{period}}}") is True
    assert numbers_equal(gold, rf"1.{before}\overline{{{period}}}") is False
