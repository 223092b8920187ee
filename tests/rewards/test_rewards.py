"""Rewards: which answers count as right."""

from collections import Counter

import pytest

from hybridrl_lib.rewards.answers import canonical, extract_boxes, extract_lenient
from hybridrl_lib.rewards.numeric import decide, numbers_equal
from hybridrl_lib.rewards.verifier import REASONS, Verifier, check_gold
from hybridrl_lib.system.errors import UserError

# {gold: (right answers, wrong answers)}, all labeled by hand.
LABELED = {
    "18": (["18", "18.0", "018", "$18", r"\$18.00", "18 dollars", r"18\text{ cm}^2", "x = 18",
        "9+9=18"], ["19", "-18"]),
    "-18": (["\u221218"], []), "2125": (["2,125"], []), "2,125": (["2125"], []),
    r"10,\!080": (["10080"], []), "10080": ([r"10\,080"], []), "3000000": (["3 million"], []),
    "3": ([], ["3 million", "x", "three", "3x", "3 5", "3, 5", r"\text{3 or 4}", r"\frac{3}{}",
        ""]),
    r"\frac{3}{4}": (["3/4", "0.75", r"\dfrac{6}{8}", r"\frac34", r"75\%"], ["4/3"]),
    r"-\frac{3}{4}": ([r"\frac{-3}{4}"], []), r"\frac{1}{3}": (["0.333333"], ["0.33"]),
    "0.0000672": ([], ["0.000067"]), "1250000": ([], ["1250000.5"]),
    r"\frac{639}{40}": ([r"15\frac{39}{40}"], []), r"1\frac{4}{5}": ([r"\frac95"], []),
    "20": ([r"20\%"], ["0.2"]), "0.2": ([r"20\%"], []), r"90^\circ": (["90", "90 degrees"], []),
    r"90^{\circ}": (["90°"], []), "8": ([], ["3 5"]), "5,100": ([], ["5, 100"]),
    "2": ([], ["1 or 2 or 3", r"\{1,2,3\}", r"2\sqrt{4}"]), "5": ([], [r"5\text{ thirds}", "5/0"]),
    "17": ([], ["24-7"]), "12": ([], [r"3\times4"]), "4": ([r"2\sqrt{4}"], []),
    "100000": (["10^5"], []), "120": (["5!"], []),
    r"\text{Evelyn}": (["Evelyn", r"\text{evelyn}."], ["Evelyn or Navin"]),
    r"\text{(C)}": (["C", r"\textbf{(C)}"], ["B"]), "52_8": (["52_{8}", "52"], ["52_9", "42"]),
    r"3\sqrt{13}": ([r"\sqrt{117}"], []), r"11\sqrt2": ([r"11 \sqrt{2}"], []),
    "6 - 5i": (["-5i+6", "6 - 5 i"], ["6 + 5i"]), "2k+2": (["2(k+1)"], []), "2k": ([], ["2n"]),
    "(a+5)(b+2)": (["ab+2a+5b+10"], []), "y = 2x + 3": (["2x+3"], []),
    "5x - 7y + 11z + 4 = 0": (["-5x+7y-11z-4=0"], []),
    r"\frac{3\sqrt{3}}{4}": ([r"\frac{3 \sqrt 3}{4}"], []), "1,-2": (["-2, 1"], ["1"]),
    r"1 \pm \sqrt{19}": ([r"1-\sqrt{19}, 1+\sqrt{19}"], [r"1+\sqrt{19}"]),
    "(3,5)": ([], ["(5,3)", r"\{3,5\}"]), "(3,4]": ([], ["[3,4]"]),
    r"(-\infty, 2) \cup (3, \infty)": ([r"(3,\infty)\cup(-\infty,2)"], []),
    r"x \in [-2,7]": (["[-2,7]"], []), r"\left( 3, \frac{\pi}{2} \right)": ([r"(3,\pi/2)"], []),
    r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}": (
        [r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}"],
        [r"\begin{pmatrix} 2/3 \\ -1/3 \end{pmatrix}"]),
}  # fmt: skip
# Golds of GSM8K and MATH-500 with the oddest spellings of their kind.
ODD_GOLDS = (
    "18", "-10", "1,450,000", r"\frac43", r"\frac 59", r"\frac9{19}", r"\frac{270}7\text{ degrees}",
    ".0000672", r"11,\! 111,\! 111,\! 100", r"\$32,\!348", r"\$18.90", r"864 \mbox{ inches}^2",
    r"5.4 \text{ cents}", r"137 \frac{1}{2}", "4210_{5}", r"\text{east}", "p - q", r"\cot x",
    "1+274i", "3R^2", "3, 5, 7", "(6,31,-1)", r"\left(\frac{3}{5},\frac{8}{3}\right]",
    r"(-\infty, 0]", r"x \in [-2,7]", r"\{1\pm\sqrt{5},-2\}", "y = -2x",
    r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\frac{20000}{\pi}",
)  # fmt: skip


@pytest.fixture(scope="module")
def verifier():
    """One verifier for all tests, because starting its worker takes most of the time."""
    with Verifier(time_limit=30.0) as shared:
        yield shared


def verdict(verifier, gold, text, finished=True):
    """The verdict on one completion."""
    return verifier.verify([gold], [text], [finished])[0]


def test_labeled_pairs(verifier):
    """The full check agrees with a person on every pair; every notation of gold equals itself."""
    rows = [(gold, answer, label == "right") for gold, (right, wrong) in LABELED.items()
            for label, answers in (("right", right), ("wrong", wrong)) for answer in answers]
    assert len(rows) == 90
    assert not [row for row in rows if verdict(
        verifier, row[0], rf"So it is \boxed{{{row[1]}}}.").strict is not row[2]]
    assert not [row for row in rows if decide(*row[:2]) not in (
        None, *(("right",) if row[2] else ("wrong", "unparsable")))], "certain or silent"
    for gold in ODD_GOLDS:
        check_gold(gold, "p")
    wrong = [gold for gold in ODD_GOLDS if not (verdict(verifier, gold, rf"\boxed{{{gold}}}").strict
                                                and verifier.can_parse(canonical(gold)))]
    assert not wrong


def test_fast_path_takes_the_answers_of_a_small_model():
    """What a small model puts into a box is decided without a worker."""
    undecided = [answer for answer in ("", "12", "-3/4", r"\frac{3}{}", r"\frac{3}{4}", "1/0", "x",
                                       "3 + 4", "12 /", "3 4", "1.2.3", "12x + 3", "x = 5",
                                       "5 apples", "1,000", "(3", "3 and 4")
                 if decide("12", answer) is None]
    assert not undecided
    assert numbers_equal("4", r"2\sqrt{4}") is None
    assert numbers_equal(r"\sqrt{2}", "2") is None
    assert numbers_equal("10", r"\sum_{k=1}^{4} k") is None
    assert numbers_equal("1/3", "0.333333") is True
    assert numbers_equal("1/3", "") is False


def test_bad_gold_names_the_problem(verifier):
    """A gold that cannot be parsed stops the run, and the error names its problem."""
    for gold in ("", "  ", "?", r"\frac{3}{", r"\frac{}{2}", r"\boxed{5", "5\0",
                 r"\begin{pmatrix} 1", "9" * 5000, None):
        with pytest.raises(UserError, match="test/algebra/7.json"):
            check_gold(gold, "test/algebra/7.json")
            pytest.fail(f"{gold!r} was accepted")
    for gold, answer in (("", "5"), (r"\frac{3}{", r"\frac{3}{"), (r"\sqrt[", "5")):
        with pytest.raises(UserError, match="gold"):
            verdict(verifier, gold, rf"\boxed{{{answer}}}")


def test_extract_boxes():
    """The boxes a reader sees; the lenient rule: the last box, else ####, else the last number."""
    rows = {r"a \boxed{5} b \boxed{\frac{1}{2}}": ["5", r"\frac{1}{2}"], r"\boxed { 5 }": ["5"],
            r"\fbox{5}": ["5"], r"\boxed{\{1,2\}}": [r"\{1,2\}"],
            r"\boxed{\boxed{5}}": [r"\boxed{5}"], r"stray } and { \boxed{5}": ["5"], r"\boxed{": [],
            r"\boxed{ then \boxed{5}": ["5"], "no box": [], r"\boxed{}": [""]}
    assert {text: extract_boxes(text) for text in rows} == rows
    rows = {r"\boxed{3} #### 4": "3", r"\boxed{3} \boxed{4} 5": "4", "3 + 4 = 7\n#### 7": "7",
            "#### 7\nThat is 8.": "7", "#### 1,080 dollars": "1,080 dollars",
            "it costs $1,080.50.": "1,080.50", "it falls to -3": "-3", "10-3": "3",
            "about 3/4": "3/4", r"so $\frac{3}{4}$": r"\frac{3}{4}", "1 1/2": "1 1/2",
            "x2 is 50%": "50%", "nothing": None}
    assert {text: extract_lenient(text) for text in rows} == rows


def test_strict_and_lenient(verifier):
    """Both verdicts and the reason, also for hacks: unfinished, several boxes, no real box."""
    rows = [
        ("5", r"\boxed{5}", True, True, True, "right"),
        ("5", r"\boxed{5} or \boxed{5.0}", True, True, True, "right"),
        ("5", r"\boxed{\boxed{5}}", True, True, True, "right"),
        ("5", r"\boxed{5}", False, False, True, "truncated"),
        ("5", "5", False, False, True, "truncated"),
        ("5", "the answer is 5", True, False, True, "no_box"),
        ("5", "the answer is 6", True, False, False, "no_box"),
        ("5", "", True, False, False, "no_box"),
        ("5", r"\boxed{6}", True, False, False, "wrong"),
        ("5", r"#### 5 \boxed{6}", True, False, False, "wrong"),
        ("5", r"\boxed{4} \boxed{5}", True, False, True, "conflicting_boxes"),
        ("5", r"\boxed{5} \boxed{4}", True, False, False, "conflicting_boxes"),
        ("5", r"\boxed{5} \boxed{}", True, False, False, "conflicting_boxes"),
        ("5", " ".join(rf"\boxed{{{n}}}" for n in range(999)), True, False, False,
         "conflicting_boxes"),
        ("5", r"\boxed{\boxed{4}\boxed{5}}", True, False, False, "unparsable"),
        ("5", r"\boxed{}", True, False, False, "unparsable"),
        ("5", r"\boxed{5} \boxed{6", True, False, True, "unparsable"),
        ("5", r"\boxed{5", True, False, True, "unparsable"),
    ]
    wrong = []
    for gold, text, finished, *expected in rows:
        found = verdict(verifier, gold, text, finished)
        if [found.strict, found.lenient, found.reason] != expected:
            wrong.append((text[:40], finished, expected, found))
    assert not wrong
    assert {row[-1] for row in rows} <= set(REASONS)


def test_counts_and_order(verifier):
    """Verdicts are in the order of the completions, and each is counted, cached or not."""
    golds = ["1", r"\sqrt{2}", "3", r"\sqrt{2}", "5"] * 2
    texts = [r"\boxed{1}", r"\boxed{2^{1/2}}", "3", r"\boxed{\sqrt{3}}", r"\boxed{5}"] * 2
    ended = [True, True, True, True, False] * 2
    with Verifier(workers=2, time_limit=30.0) as fresh:
        verdicts = fresh.verify(golds, texts, ended)
        assert [v.strict for v in verdicts] == [True, True, False, False, False] * 2
        assert fresh.verify(golds, texts, ended) == verdicts
        assert +fresh.counts == Counter(right=8, wrong=4, no_box=4, truncated=4)
        assert fresh.counts["worker_restarts"] == 0
    with pytest.raises(ValueError):
        verifier.verify(["1"], [r"\boxed{1}", r"\boxed{2}"], [True])
    with pytest.raises(ValueError):
        Verifier(workers=0)
