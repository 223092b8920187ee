r"""`rl.reward=answer_and_steps`: which equations are read, which hold, and which tricks fail."""

from dataclasses import replace
from fractions import Fraction

import pytest
from small_training import Fixed

from hybridrl_lib.config.methods import METHODS
from hybridrl_lib.config.presets import load_settings
from hybridrl_lib.methods.registry import make_method
from hybridrl_lib.problems.tiny import load_tiny_symbolic, load_tiny_word
from hybridrl_lib.rewards.steps import equations, steps_hold
from hybridrl_lib.setups import SETUPS
from hybridrl_lib.system.errors import UsageError

REFERENCE = r"First 24 + 17 = 41. Then 41 - 8 = 33. So \boxed{33}."


def judged(text):
    return [equation.holds for equation in equations(text)]


EQUATIONS = [
    ("24 + 17 = 41. Then 41 - 8 = 33.", [True, True]),
    ("24 + 17 = 42", [False]), ("((((3 + 1 = 9", [False]), ("(3 + 1 = 4)", [True]),
    ("2 + 3 * 4 = 14 and (2 + 3) * 4 = 20, 2^3^2 = 512, -3 + 5 = 2", [True] * 4),
    ("2 + 3 * 4 = 20", [False]),
    # chains: every neighbor
    ("2 * 3 + 4 = 6 + 4 = 10", [True, True]),
    ("5 + 3 = 8 + 2 = 10", [False, True]),  # the run-on equality of schoolchildren
    # units, money, thousands, words between
    ("3 apples + 4 apples = 7 apples", [True]),
    ("$5 x 4 = $20 and 5*$4=$21", [True, False]),
    ("12 hours * 60 minutes/hour = 720 minutes per day", [True]),
    ("2 skeins per hat + 4 skeins per scarf = 6 skeins of wool", [True]),
    ("48/2 = 24 clips and 10kg + 5kg = 15kg", [True, True]),
    ("1,200 + 300 = 1,500 and .5*2=1", [True, True]),
    ("2*60 minutes = 120 minutes = 2 hours", [True]),  # the conversion cannot be judged
    ("3 * 25 cents = $0.75", []),
    ("5 * 3 thousand = 15 thousand, and 2 dozen + 1 = 25", [True]),
    # per cent
    ("20% * 50 = 10; 20% of 50 = 10; 40/50 * 100 = 80%; 100% - 20% = 80%", [True] * 4),
    ("20% of 50 = 11", [False]),
    # decimals: rounded or cut in the last place; whole numbers are exact
    ("10 / 3 = 3.33, 5 / 3 = 1.67, 5 / 3 = 1.66, 1/3 = 33.3%", [True] * 4),
    ("10 / 3 = 3.4, 10 / 3 = 3, 1.5 + 1.5 = 3.1", [False] * 3),
    # LaTeX
    (r"\frac{1}{2} + \frac{1}{4} = \frac{3}{4}, 3 \times 4 \div 2 = 6", [True, True]),
    (r"$5 \cdot 3 = \boxed{15}$ and 2\frac{1}{2} + 1 = 3.5", [True, True]),
    (r"So \boxed{3 + 4 = 7}. Or \boxed{3 + 4 = 8}", [True, False]),
    (r"\(12 - 4 = 8\text{ dollars}\), 2^{3} = 8, 3² = 9", [True] * 3),
    ("**5 + 3 = 8**, 2**3 = 8", [True, True]),
    # GSM8K's calculator notes: the note, and the text around it
    ("48/2 = <<48/2=24>>24 clips", [True, True]),
    ("48/2 = <<48/2=25>>24 clips", [False, True]),
    ("48/2 = <<48/2=24>>25 clips", [True, False]),
    # the dash of a list is not a minus
    ("- 5 + 3 = 8\n* 2 + 2 = 4", [True, True]),
]


def test_equations_are_read_and_judged():
    """Arithmetic in words, LaTeX, units, and percentages: each equation is found and judged."""
    wrong = [(text, judged(text)) for text, verdicts in EQUATIONS if judged(text) != verdicts]
    assert not wrong


UNJUDGED = ["", "no equation at all", "x + 3 = 7", "3x = 12", "2 x = 12", "7 = 5 + x",
            "f(2) = 9 - 3", "5 + 3 <= 9", "5 + 3 != 9", "5 + 3 >= 9", "a = 5", "5 = 5", "4 = 5",
            "total = 9", "17 mod 5 = 2", "twice 24 + 2 = 100", "shared by 5 friends = 250 / 5",
            "the sum of 3 and 4 = 7", r"\sqrt{2} + 1 = 5", "5! + 1 = 3", "sin(0) + 1 = 9",
            "6:00 + 2 = 8:00", "3 + = 4", "1/0 = 5", "2 + 2 = x", "2 + 2 = 4 - y", "= 8", "8 =",
            "2^99999999 = 5"]


def test_what_cannot_be_judged_is_neither_true_nor_false():
    """Algebra, comparisons, times, and broken texts cost no reward and earn none."""
    wrong = [text for text in UNJUDGED
             if any(not equation.holds or equation.shows for equation in equations(text))]
    assert not wrong


def test_all_reference_solutions_of_the_tiny_world_earn_1():
    """The reward pays for the solutions that SFT teaches."""
    for problem in (*load_tiny_word(), *load_tiny_symbolic()):
        assert steps_hold(problem.solution, problem.solution, problem.answer), problem.solution
        assert all(judged(problem.solution)) and judged(problem.solution)


RULE = [
    (REFERENCE, True),
    (r"24 + 17 - 8 = 33. \boxed{33}", True),  # in one line
    (r"33 = 41 - 8, as 41 = 24 + 17. \boxed{33}", True),
    # a wrong step with a right answer, which is what the reward is for
    (r"First 24 + 17 = 40. Then 41 - 8 = 33. So \boxed{33}.", False),
    (r"24 + 17 = 41 - 8 = 33. So \boxed{33}.", False),
    # leaving equations out
    (r"\boxed{33}", False), (r"So it is 33. \boxed{33}", False), (r"x = 33 \boxed{33}", False),
    # equations that say nothing
    (r"1 = 1. \boxed{33}", False), (r"33 = 33. \boxed{33}", False),
    (r"33 + 0 = 33. \boxed{33}", False), (r"33 * 1 = 33. \boxed{33}", False),
    (r"33 / 1 = 33. \boxed{33}", False), (r"33^1 = 33. \boxed{33}", False),
    (r"30 + 3 = 30 + 3. \boxed{33}", False), (r"0 + 33 = 33 - 0. \boxed{33}", False),
    (r"\boxed{33 = 33}", False),
    # true ones that do not lead to the answer
    (r"1 + 1 = 2. \boxed{33}", False), (r"24 + 17 = 41. So \boxed{33}.", False),
    # a false one among many true ones
    (r"2 + 2 = 4. " * 9 + r"41 - 8 = 33. 2 + 2 = 5. \boxed{33}", False),
    (r"x + 3 = 99. 41 - 8 = 33. \boxed{33}", True),  # unknowns cannot be judged
]


def test_the_rule():
    """All equations must hold, and one that says something must lead to the answer."""
    wrong = [text for text, right in RULE if steps_hold(text, REFERENCE, "33") is not right]
    assert not wrong


def test_where_the_reference_has_no_equation_none_is_required():
    """Geometry in words needs no equation; one that is false still costs the reward."""
    assert steps_hold("By symmetry it is 5.", "It is 5 by symmetry.", "5")
    assert not steps_hold("As 2 + 2 = 5 it is 5.", "It is 5 by symmetry.", "5")
    # an answer that is not a number, or that no equation gives: any true equation is enough
    for solution, answer in (("2 + 2 = 4, so Ann.", r"\text{Ann}"), ("2 + 2 = 4, so 9.", "9")):
        assert steps_hold("3 + 1 = 4, so it is", solution, answer)
        assert not steps_hold("It is", solution, answer)
    assert steps_hold("1 - 0.25 = 0.75", "1/4 + 1/2 = 3/4", r"\frac{3}{4}")
    assert equations("1 - 0.25 = 0.75")[0].values == {Fraction(3, 4)}


HOSTILE = [
    "1+" * 50_000 + "1 = 2", "(" * 100_000 + "1 = 1", "9" * 100_000 + " + 1 = 2",
    "9^9^9^9 = 1", "=" * 100_000, "1 = " * 30_000, "<<" * 50_000, "1 apple " * 20_000 + "= 3",
    r"\frac{" * 30_000, "a " * 50_000 + "= 5 + 5", "2^" * 30_000 + "2 = 4", "- " * 50_000 + "1=1",
    "\\" * 100_000, "1/" * 50_000, "(1+1)" * 20_000 + "=2", "1\n" * 50_000, " " * 100_000 + "=",
    "*" * 100_000, "\n" * 100_000, "1 " * 50_000 + "= 1 + 1", "1:" * 50_000, ". - " * 20_000,
    "\\text{" * 20_000, "²" * 50_000, "$" * 100_000 + "1+1=2"]


def test_a_hostile_text_costs_little():
    """Texts without arithmetic, or with too much, are skipped; a quadratic reader would hang."""
    wrong = [text[:8] for text in HOSTILE if len(equations(text)) > 1]
    assert not wrong


def test_the_reward_of_a_run(make_trainer, monkeypatch):
    """The verdicts still judge the answer only; the reward that gives advantages is stricter."""
    texts = []
    monkeypatch.setattr("hybridrl_lib.learning.judging.steps_hold", lambda text, solution,
                        answer: (texts.append((text, solution, answer)) or len(texts) % 4 == 1))
    trainer = make_trainer("rl", "rl.reward=answer_and_steps", verifier=Fixed([1, 1, 1, 0]))
    trainer.train()
    row = trainer.folder.lines("metrics.jsonl")[0]
    assert (row["reward/answer"], row["verdicts"]) == (0.75, {"right": 24, "wrong": 8})
    assert len(texts) == 48  # in two steps; the steps of a wrong answer are not judged
    assert row["reward"] == 6 / 32
    assert {pair[1:] for pair in texts} == {(p.solution, p.answer) for p in trainer.parts.train}
    plain = make_trainer("rl", folder="plain")
    plain.train()
    assert "reward/answer" not in plain.folder.lines("metrics.jsonl")[0]


@pytest.mark.parametrize("setup", ["luffy", "prefix_rft"])
def test_what_joins_the_group_is_judged_like_the_group(make_trainer, monkeypatch, setup):
    """A demonstration or hybrid with a false equation earns 0, as an answer would."""
    false_step = r"2 + 2 = 5. \boxed{7}"
    monkeypatch.setattr("hybridrl_lib.policy.policy.Policy.decode", lambda *_: false_step)
    column = f"{setup}/{'demonstration' if setup == 'luffy' else 'hybrid'}_reward"
    for reward, expected in (("answer", 1), ("answer_and_steps", 0)):
        trainer = make_trainer(setup, f"rl.reward={reward}", verifier=Fixed([1]), folder=reward)
        if setup == "luffy":
            trainer.parts = replace(trainer.parts, train=tuple(
                replace(p, solution=false_step) for p in trainer.parts.train))
        trainer.train()
        assert trainer.folder.lines("metrics.jsonl")[0][column] == expected


def test_every_setup_takes_the_reward():
    """The reward is a setting of RL, so no method refuses it."""
    wrong = []
    for setup in SETUPS.values():
        settings = load_settings("tiny", ["rl.reward=answer_and_steps"], setup=setup)
        if make_method(setup, settings).settings.rl.reward != "answer_and_steps":
            wrong.append(setup.name)
    assert not wrong and {setup.method for setup in SETUPS.values()} == set(METHODS)
    with pytest.raises(UsageError, match=r"rl\.reward.*answer, answer_and_steps"):
        load_settings("tiny", ["rl.reward=steps"])
