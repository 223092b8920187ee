"""`hybridrl compare`: equal tuning, what is run, the tables, and what each arm used."""

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import synthetic_records
from facts import lines_with, notes_with
from made_up_runs import make_up_runs
from synthetic_records import build_experiment

from hybridrl_lib.cli import main
from hybridrl_lib.config.methods import METHODS
from hybridrl_lib.config.presets import get_setup, load_settings, preset_names, settings_to_dict
from hybridrl_lib.experiments import plan as plans
from hybridrl_lib.experiments.compare import (
    BASELINE,
    choose_arms,
    compare,
    kept_settings,
    make_plan,
)
from hybridrl_lib.experiments.tuning import Tuned, choose, greedy_alone, learning_rates, rates
from hybridrl_lib.methods.registry import make_method
from hybridrl_lib.report.arm_figures import draw_diagnostics, draw_pass_at_k
from hybridrl_lib.report.arm_notes import by_samples, grid_ends, ties, unlike_their_names
from hybridrl_lib.report.arm_tables import arms_texts, difference_rows, report_arms
from hybridrl_lib.report.arms import below_budget, beyond_budget, make_arms, used, verdict
from hybridrl_lib.report.hyperparameters import changes_of
from hybridrl_lib.report.loading import Experiment, Run, load_experiment
from hybridrl_lib.report.statistics import Difference, holm, paired_difference
from hybridrl_lib.setups import SETUPS, paper_setups
from hybridrl_lib.system.errors import UsageError, UserError

TITLE = SETUPS[BASELINE].title


@pytest.fixture()
def started(monkeypatch):
    """The commands that are started; each leaves a made-up record instead of training."""
    monkeypatch.setattr("hybridrl_lib.report.arm_tables.as_bytes", lambda figure, kind: b"")
    return make_up_runs(monkeypatch)


def go(**more):
    lines = []
    files = compare("tiny", jobs=2, experiment="cmp", say=lines.append,
                    **({"seeds": (0, 1), "transfer": 0, "methods": ["rl"]} | more))
    return files, "\n".join(map(str, lines))


def plan_of(**more):
    arguments = {"preset": "tiny", "seeds": (0,), "methods": ["rl"], "grid": (1.0,), "jobs": 1,
                 "experiment": "cmp", "settings": ()} | more
    return make_plan(**arguments)


def table(text: str) -> list[dict[str, str]]:
    """The rows of a CSV text."""
    return list(csv.DictReader(text.splitlines()))


def test_every_arm_is_tuned_on_the_same_grid(started, results):
    """Same factors, same seeds, judged on validation; the test runs take the best and no other."""
    files, said = go(grid=(0.5, 1.0, 2.0))
    tuning = [c for c in started.commands if "tuning" in " ".join(c)]
    asked = {(c[1], c[c.index("--experiment") + 1], c[c.index("--seed") + 1]) for c in tuning}
    assert asked == {(arm, f"cmp-tuning-{factor}", str(seed)) for arm in ("rl", BASELINE)
                     for factor in ("0.5", "1", "2") for seed in (1000, 1001)}
    final = [c for c in started.commands if c not in tuning]
    assert sorted((c[1], c[4], c[5]) for c in final) == sorted(
        [("base", "--seed", "0"), *((arm, "--seed", str(seed)) for arm in ("rl", BASELINE)
                                    for seed in (0, 1))])
    assert all(("rl.learning_rate=0.0003" in c) == (c[1] == "rl") for c in final)
    rows = table((results / "cmp" / "tuning.csv").read_text())
    assert len(rows) == 12
    assert {(r["setup"], r["rate_factor"]) for r in rows if r["chosen"] == "1"} == {
        ("rl", "2"), (BASELINE, "1")}
    names = {path.name for path in files}
    assert {"comparison.csv", "comparison.md", "comparison.tex", "forest.svg",
            "pass_at_k.png"} <= names
    page = (results / "cmp" / "comparison.md").read_text()
    assert notes_with(page, 1000, 1001), "the seeds of tuning are named"
    assert notes_with(page, "--transfer"), "what was left out is named"
    assert lines_with(said, SETUPS["rl"].title, 2), "what each arm used is printed, too"


def test_tuning_leaves_the_behavior_model_alone():
    """Tuning moves neither PEAR's behavior model nor leaves switching without its probes."""
    for preset in preset_names():
        for arm in (s for s in SETUPS.values() if s.method == "pear"):
            settings = load_settings(preset, smoke=False, setup=arm)
            assert settings.method.behavior_rate == settings.sft.learning_rate
            assert set(learning_rates(settings)) == {"sft.learning_rate", "rl.learning_rate"}
    unprobed = {setup.name for setup in SETUPS.values()
                if any(text.startswith("probe.every") for text in greedy_alone(setup))}
    assert unprobed == {name for name, setup in SETUPS.items() if setup.method != "switching"}


def test_what_is_finished_is_not_run_again(started, results):
    """The same command resumes; with other settings it is refused instead of mixing."""
    go(grid=(1.0,))
    before = {path: path.stat().st_mtime_ns for path in results.glob("cmp/*/seed-*/manifest.json")}
    assert len(before) == 5
    started.commands.clear()
    go(grid=(1.0,))
    go(grid=(1.0,), settings=("evaluation.batch_size=3",))  # memory only: not another setting
    assert not started.commands
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(UserError, match="rl.beta: 0.02 -> 0.1"):
        go(grid=(1.0,), settings=("rl.beta=0.1",))
    path = results / "cmp" / "rl" / "seed-1" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"numerics_version": 0}))
    with pytest.raises(UserError, match="rl/seed-1"):  # as `hybridrl run` would refuse it
        go(grid=(1.0,))


def test_transfer_trains_on_one_and_tests_on_all(started, results):
    """Each arm once more per benchmark."""
    go(grid=(1.0,), seeds=(0, 1), transfer=1)
    alone = [c for c in started.commands if "only" in " ".join(c)]
    limits = {c[c.index("--experiment") + 1]: tuple(text for text in c if "_limits=" in text)
              for c in alone}
    assert limits == {f"cmp-only-{name}": (f"data.train_limits={left}",
                                           f"data.validation_limits={left}") for name,
                      left in (("tiny_word", "1000000000,0"), ("tiny_symbolic", "0,1000000000"))}
    rows = table((results / "cmp" / "transfer.csv").read_text())
    assert {(r["setup"], r["trained_on"], r["tested_on"]) for r in rows} == {
        (setup, one, other) for setup in ("rl", BASELINE)
        for one in ("tiny_word", "tiny_symbolic") for other in ("tiny_word", "tiny_symbolic")}
    assert {c[c.index("--seed") + 1] for c in alone} == {"0"}
    assert load_settings("tiny", limits["cmp-only-tiny_word"])  # the settings exist
    assert all("evaluation.samples=0" in c for c in alone), "only one greedy answer is shown"


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(started, results):
    """Finished arms are in the tables and the command fails; without any, the error is why."""
    started.fails |= {f"{arm} seed {seed}": "it broke\n"
                      for arm in ("base", "rl", BASELINE) for seed in (0, 1)}
    with pytest.raises(UserError, match="rl seed 0, rl seed 1.*base seed 0"):
        go(grid=(1.0,))
    assert not (results / "cmp" / "comparison.csv").exists()
    started.fails = {"rl seed 1": "it broke\n"}
    lines = []
    with pytest.raises(UserError, match="rl seed 1"):
        compare("tiny", seeds=(0, 1), transfer=0, methods=["rl"], grid=(1.0,), jobs=2,
                experiment="cmp", say=lines.append)
    assert any("it broke" in line for line in lines)
    rows = table((results / "cmp" / "comparison.csv").read_text())
    assert {r["setup"]: r["seeds"] for r in rows} == {"base": "1", BASELINE: "2", "rl": "1"}


def test_the_arms():
    """The paper's setups and one per method; arms without SFT have the rollouts of SFT -> RL."""
    names = [setup.name for setup in choose_arms(())]
    assert names[0] == "base" and set(paper_setups()) <= set(names)
    assert {get_setup(name).method for name in names} == set(METHODS)
    assert "sft_then_full_rl" in names
    assert {s.name for s in choose_arms(["pear", "staged"])} >= {"pear", "sft", "base"}
    assert "pear_centered" not in names
    assert {s.name for s in choose_arms(["relift"])} == {"base", BASELINE, "relift"}
    for method, brings in (("pear", "sft_sampled_then_rl"), ("superrl", "superrl_drop"),
                           ("combined", "combined_cosine"), ("prl", "frpo")):
        assert {s.name for s in choose_arms([method])} == {"base", BASELINE, method, brings}
    assert {s.name for s in choose_arms(["superrl_drop"])} == {"base", BASELINE, "superrl_drop"}
    with pytest.raises(UsageError, match="relift"):
        choose_arms(["relft"])
    def stages(name, epochs):
        settings = load_settings("tiny", [f"training.epochs={epochs}"], smoke=False,
                                 setup=get_setup(name))
        return make_method(get_setup(name), settings).stages

    wrong = []
    for epochs in (2, 3, 5, 10):
        sft, rl = stages(BASELINE, epochs)
        assert sft.epochs + rl.epochs == epochs and sft.epochs - rl.epochs == epochs % 2
        for name in ("raft", "frpo", "prl", "prl_newline", "luffy", "combined"):
            if stages(name, epochs)[-1] != rl:
                wrong.append((name, epochs))
        if stages("sft_then_full_rl", epochs) != (sft, *stages("rl", epochs)):
            wrong.append(("sft_then_full_rl", epochs))
    assert not wrong


def test_a_factor_multiplies_the_presets_own_rates(monkeypatch, results):
    """Rates of a factor, how a factor is chosen (ties: nearest to 1), and the command of a run."""
    for setup in ("rl", "bridge"):
        arm = get_setup(setup)
        assert rates(plan_of(), arm, 2.0) == ("sft.learning_rate=0.0004", "rl.learning_rate=0.0003")
        assert rates(plan_of(), arm, 1.0) == ()
    own = replace(SETUPS["rl"], name="rl_fast", settings=("rl.learning_rate=0.001",))
    monkeypatch.setitem(SETUPS, "rl_fast", own)
    plan = plan_of(methods=["rl_fast"], settings=("rl.learning_rate=0.5", "rl.beta=0.1"))
    assert plans.given(own, plan.settings) == ("rl.beta=0.1",)
    assert rates(plan, own, 2.0)[-1] == "rl.learning_rate=0.002"
    record = plans.run_job(plan, own, 0, "x", (*plans.given(own, plan.settings),
                                               *rates(plan, own, 2.0)))
    assert "rl.learning_rate=0.002" in record.command
    scores = {0.5: (0.2, 0.6), 1.0: (0.5, 0.1), 2.0: (0.4, 0.4)}
    tuned = [Tuned("rl", factor, seed, value) for factor, values in scores.items()
             for seed, value in enumerate(values)]
    assert choose(tuned, "rl") == 0.5, "0.4 twice: as far from 1, and the smaller"
    assert choose([*tuned, Tuned("rl", 1.0, 2, 0.7)], "rl") == 1.0
    job = plans.run_job(plan_of(), get_setup("rl"), 0, "cmp", ("rl.beta=0.1", "pear.level=block"))
    assert job.command == (sys.executable, "-m", "hybridrl_lib.cli", "run", "rl", "--preset",
                           "tiny", "--seed", "0", "--experiment", "cmp", "--set", "rl.beta=0.1")
    assert (job.name, job.seed) == ("rl seed 0", 0) and not job.record.is_complete


def test_what_cannot_be_compared_is_refused_before_any_run():
    """The error names the seed, option, or setting."""
    for more, fact in (
            ({"seeds": (0, 1000), "grid": (1.0, 2.0)}, "1000"), ({"grid": ()}, "--grid"),
            ({"grid": (0.0, 1.0)}, "--grid"), ({"settings": ("rl.bta=1",)}, "rl.beta"),
            ({"methods": ["pear"], "settings": ("relift.every=3",)}, "relift"),
            ({"methods": ["pear"], "settings": ("pear.behavior=none",)}, "pear.behavior")):
        with pytest.raises(UsageError, match=fact):
            plan_of(**more)
            pytest.fail(f"{more} was accepted")
    assert plan_of(settings="rl.beta=0.1 rl.group_size=4").settings == (
        "rl.beta=0.1", "rl.group_size=4")


def test_an_arm_keeps_what_defines_it(started, results):
    """A setting for all arms must not turn a control into the arm that it controls for."""
    for method, setting, keeps, takes in (
            ("pear", "pear.level=block", "sft_sampled_then_rl", "pear"),
            ("superrl", "superrl.unsolved=sft", "superrl_drop", "superrl"),
            ("hpt", "rl.clip=true", "hpt", "rl"),
            ("bridge", "model.adapter=none", "bridge", "rl")):
        started.commands.clear()
        lines = []
        compare("tiny", seeds=(0,), transfer=0, methods=["rl", method], grid=(1.0,), jobs=2,
                experiment=f"cmp-{method}", settings=(setting,), say=lines.append)
        (sentence,) = kept_settings(plan_of(methods=["rl", method], settings=(setting,)))
        assert sentence in lines and lines_with(sentence, keeps)
        assert setting.partition("=")[0] in sentence
        assert all((setting in command) == (command[1] != keeps and (
            setting.partition(".")[0] not in METHODS or command[1] == takes))
            for command in started.commands)
        assert {keeps, takes} <= {command[1] for command in started.commands}


def test_the_command_line(monkeypatch, capsys):
    """Options reach `compare` as they are meant."""
    seen = []
    monkeypatch.setattr("hybridrl_lib.experiments.compare.compare",
                        lambda *arguments, **named: seen.append((*arguments, named)))
    assert main(["compare", "--seeds", "2", "--methods", "relift,pear", "rl", "--grid", "1,3",
                 "--transfer", "1", "--set", "rl.beta=0.1"]) == 0
    assert seen == [("tiny", (0, 1), ["relift", "pear", "rl"], (1.0, 3.0), 1, None, None,
                     ["rl.beta=0.1"], {"executor": "local"})]
    assert main(["compare", "--grid", "half"]) == 2
    assert "half" in capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four arms with three seeds; ReLIFT has columns of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic_records.GAIN, "relift", 2.6)
        folder = build_experiment(
            tmp_path_factory.mktemp("arms") / "made", ["base", "rl", BASELINE, "relift"], range(3),
            {"tiny_word": 60, "tiny_symbolic": 40}, {"tiny_word": 5}, epochs=2)
    for path in folder.glob("relift/*/metrics.jsonl"):
        lines = [json.loads(line) | {"relift/taught": 3, "groups/correct_counts": [1, 2, 1]}
                 for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture()
def experiment(made):
    """It, read anew, because tests change configs in place."""
    return load_experiment(made)


def texts_of(experiment, tuned=(), alone=None, factors=None) -> dict[str, str]:
    """The tables and pages of a comparison."""
    arms = make_arms(experiment, BASELINE, factors or {})
    return arms_texts(experiment, arms, BASELINE, tuned, alone or {})


def page_of(experiment, **more) -> str:
    return texts_of(experiment, **more)["comparison.md"]


def test_differences_and_holm_are_those_of_the_formulas(experiment):
    """Paired over problems, against SFT -> RL; one family per metric over arms and benchmarks."""
    arms = {arm.setup: arm for arm in make_arms(experiment, BASELINE, {"rl": 2.0})}
    assert not arms[BASELINE].differences and not arms["base"].differences
    p_values = []
    for benchmark in ("tiny_word", "tiny_symbolic"):
        for setup in ("rl", "relift"):
            tables = [np.stack([run.answers["last", "test", benchmark].strict
                                for run in experiment.of(name)]).astype(float)
                      for name in (setup, BASELINE)]
            wanted = paired_difference(*tables)
            found, p = arms[setup].differences[benchmark, "exact_match"]
            assert found == wanted
            p_values.append((wanted.p_value, p))
    assert [p for _, p in p_values] == pytest.approx(holm(p for p, _ in p_values))
    assert arms["rl"].rate_factor == 2.0
    (arm,) = (arm for arm in make_arms(experiment, BASELINE, {}) if arm.setup == "relift")
    arm = replace(arm, differences={("tiny_word", "exact_match"): difference(0.0, 0.9),
                                    ("tiny_word", "pass@8"): difference(0.2, 0.01)})
    assert arm.verdict("exact_match") == TIE and arm.verdict("pass@8") == BETTER
    (row,) = difference_rows(experiment, [arm], BASELINE)
    assert row[-1] == TIE


def test_a_setting_that_some_arm_defines_is_listed_for_the_others(experiment):
    """LUFFY has beta = 0 and DeepSeekMath one update whatever is asked for."""
    for settings, facts in ((["rl.beta=0"], ["rl.beta=0", "0.02"]),
                            (["rl.updates_per_rollout=1"], ["rl.updates_per_rollout=1", 2]),
                            (["relift.batch_size=4"], ["relift.batch_size=4", 16]), ([], [])):
        runs = []
        for name in ("base", "rl", BASELINE, "luffy", "deepseekmath", "relift"):
            own = plans.own_settings(SETUPS[name], settings)
            config = {"preset": "tiny", "settings": settings_to_dict(load_settings(
                "tiny", [*own, *([] if name != "rl" else ["rl.learning_rate=1"])], smoke=False,
                setup=SETUPS[name]))}
            runs.append(Run(name, 0, config, {}, [], [], {}))
        said = changes_of(runs, tuned=True)
        assert len(said) == bool(facts) and (not facts or lines_with(said[0], *facts))
        for run in runs:
            run.config["settings"]["rl"]["learning_rate"] = 0.5
        assert changes_of(runs, tuned=True) == said, "the rates of a comparison have a table"
        assert len(changes_of(runs)) == len(said) + 1
    for run in experiment.runs:
        rate = [f"rl.learning_rate={1e-5 if run.setup == 'rl' else 2e-5}"]
        settings = load_settings("tiny", ["training.epochs=4", *rate], setup=SETUPS[run.setup])
        run.config.update(preset="tiny", settings=settings_to_dict(settings))
    assert notes_with(page_of(experiment), "training.epochs=4", 10)
    assert not lines_with(page_of(experiment), "rl.clip=false")
    for run in experiment.runs:
        run.config["settings"] = settings_to_dict(load_settings(
            "tiny", ["rl.learning_rate=1"] if run.setup == "rl" else
            ["rl.clip=false", "rl.beta=0", "relift.batch_size=7"] if run.setup == "relift" else [],
            smoke=False, setup=SETUPS[run.setup]))
    (row,) = lines_with(page_of(experiment), "rl.clip=false")
    assert row.startswith("| ReLIFT |") and lines_with(row, "rl.beta=0")
    assert "relift." not in row and "learning_rate" not in row, "its own, and the rates"


def test_lenient_scores_are_next_to_strict_ones(experiment):
    """Lenient scores have no verdict, nor has what was not sampled; one seed has a note."""
    texts = texts_of(experiment)
    head = next(line for line in texts["comparison.md"].splitlines() if line.startswith("| arm |"))
    assert head.count("lenient") == 2
    lenient = [r for r in table(texts["comparison.csv"]) if r["metric"] == "exact_match_lenient"]
    assert len(lenient) == 8 and not any(r["difference"] or r["p_holm"] for r in lenient)
    for r in lenient:
        answers = [run.answers["last", "test", r["benchmark"]].lenient
                   for run in experiment.of(r["setup"])]
        assert float(r["mean"]) == pytest.approx(100 * np.mean(answers), abs=0.01)
    greedy = replace(experiment, runs=tuple(replace(run, answers={
        key: replace(a, samples=0) for key, a in run.answers.items()}) for run in experiment.runs))
    for factors in ({}, {"rl": 0.25}):
        texts = texts_of(greedy, factors=factors)
        metrics = {r["metric"] for r in table(texts["comparison.csv"])}
        assert metrics == {"exact_match", "exact_match_lenient"}
        assert "Pass@" not in texts["comparison.md"].partition("\n## ")[2].partition("\n## ")[0]
    notes = len(notes_with(page_of(experiment), "seed"))
    for setups in (("rl", "relift", BASELINE), (BASELINE,)):
        one = replace(experiment, runs=tuple(run for run in experiment.runs
                                             if run.seed == 0 or run.setup not in setups))
        assert len(notes_with(page_of(one), "seed")) > notes, setups


def test_an_arm_that_equals_another_is_named(experiment):
    """Switching that never switches is SFT; a verdict on it would be one on SFT, given twice."""
    assert not unlike_their_names(experiment)
    twin = tuple(replace(run, setup="switching",
                         metrics=[line | {"stage": "sft"} for line in run.metrics])
                 for run in experiment.of("rl"))
    both = replace(experiment, runs=experiment.runs + twin)
    title = SETUPS["switching"].title
    stage, alike = unlike_their_names(both)
    assert lines_with(stage.removeprefix(title), "RL")
    assert lines_with(alike, title, "RL")
    text = page_of(both)
    assert stage in text and alike in text
    wrong = replace(both, runs=tuple(replace(run, answers={
        key: replace(a, strict=a.strict & False, right=a.right * 0) for key, a in
        run.answers.items()}) for run in both.runs))
    assert unlike_their_names(wrong) == [stage], "none was right, so they are not the same arm"


def tuning_of(scores: dict[str, tuple], factors=(0.25, 1.0)) -> list[Tuned]:
    """Tuning runs of two seeds: {setup: (greedy, sampled) at each factor}."""
    return [Tuned(setup, factor, seed, *values) for setup, found in scores.items()
            for factor, values in zip(factors, found, strict=True) for seed in (1000, 1001)]


def test_what_samples_would_have_chosen_is_given(experiment):
    """What samples would have chosen, ties, and ends of the grid are named."""
    tuned = tuning_of({"rl": ((0.8, 0.2), (0.7, 0.5)), "relift": ((0.6, 0.1), (0.9, 0.4)),
                       BASELINE: ((0.9, 0.3), (0.8, 0.2))})
    factors = {"rl": 0.25, BASELINE: 0.25}
    texts = texts_of(experiment, tuned=tuned, factors=factors)
    assert "| RL | **80.0 / 20.0** | 70.0 / 50.0 |" in texts["comparison.md"]
    (sentence,) = by_samples(make_arms(experiment, BASELINE, factors), tuned)
    assert lines_with(sentence, 1, 3) and sentence in texts["comparison.md"]
    assert {r["metric"] for r in table(texts["comparison.csv"]) if r["verdict"]} == {"exact_match"}
    assert {(r["setup"], r["sampled"]) for r in table(texts["tuning.csv"])
            if r["chosen"] == "1"} == {("rl", "20.00"), ("relift", "40.00"), (BASELINE, "30.00")}
    alike = texts_of(experiment)
    assert {r["metric"] for r in table(alike["comparison.csv"]) if r["verdict"]} == {
        "exact_match", "pass@1", "pass@8"}
    arms = make_arms(experiment, BASELINE, {})
    assert not by_samples(arms, [replace(t, sampled=0.0) for t in tuned])
    unprobed = [replace(t, sampled=None) for t in tuned]
    assert "| RL | 80.0 | **70.0** |" in page_of(experiment, tuned=unprobed)
    assert not by_samples(arms, unprobed)
    tuned = tuning_of({"rl": ((0.7,), (0.7,)), "relift": ((0.6,), (0.8,)),
                       BASELINE: ((0.75,), (0.75,))})
    arms = make_arms(experiment, BASELINE, {"rl": 0.25})
    (tie,) = ties(arms, tuned)
    assert lines_with(tie, "RL", 0.25, 1) and lines_with(tie, TITLE, 0.25, 1)
    assert SETUPS["relift"].title not in tie
    low, high = grid_ends(arms, tuned)
    assert lines_with(low, 1, 3, 0.25) and lines_with(high, 2, 3, 1)
    text = page_of(experiment, tuned=tuned, factors={"rl": 0.25})
    assert all(sentence in text for sentence in (tie, low, high))


def test_notes_on_older_records_differ(experiment):
    """Older records lack the costs of PEAR's behavior model and of BRIDGE's copies."""
    arms = {name: tuple(replace(run, setup=name) for run in experiment.of("relift"))
            for name in ("pear", "bridge")}
    both = replace(experiment, runs=experiment.runs + arms["pear"] + arms["bridge"])
    new = replace(both, runs=tuple(replace(run, metrics=[
        line | {"updates/beside": 1} for line in run.metrics]) for run in both.runs))
    for name in arms:
        title = SETUPS[name].title
        before, after = (notes_with(page_of(one), title) for one in (both, new))
        assert before and after and before != after, name
    alone = {"tiny_word": replace(experiment, runs=tuple(
        run for run in experiment.runs if run.seed == 0 and run.setup != "base"))}
    texts = texts_of(experiment, alone=alone)
    (base,) = (arm for arm in make_arms(experiment, BASELINE, {}) if arm.setup == "base")
    score = base.scores["tiny_symbolic", "exact_match"]
    row = [line for line in texts["comparison.md"].splitlines()
           if line.startswith("| base model |")][-1]
    assert row.endswith(f"| {100 * score.mean:.1f} [{100 * score.low:.1f}, "
                        f"{100 * score.high:.1f}] |")
    rows = table(texts["transfer.csv"])
    assert {r["setup"] for r in rows} == {"rl", BASELINE, "relift"}
    assert {r["seeds"] for r in rows} == {"1"}


def difference(mean, p):
    """A difference with Holm's p."""
    return Difference(mean, mean - 0.1, mean + 0.1, p, 3, 60), p


TIE = verdict([difference(0.2, 0.2)])
BETTER, WORSE = verdict([difference(0.2, 0.01)]), verdict([difference(-0.2, 0.01)])


def test_who_does_not_beat_the_baseline_is_named(experiment):
    """By Holm's p and the sign: a significant loss must not look like a gain."""
    mixed = verdict([difference(0.2, 0.01), difference(-0.2, 0.01)])
    assert len({BETTER, WORSE, TIE, mixed}) == 4
    assert verdict([difference(0.2, 0.01), difference(0.0, 0.9)]) == BETTER
    assert verdict([difference(-0.2, 0.01), difference(0.3, 0.05)]) == WORSE
    texts, arms = texts_of(experiment), make_arms(experiment, BASELINE, {})
    verdicts = {(arm.setup, metric): arm.verdict(metric) for arm in arms
                for metric in ("exact_match", "pass@8")}
    assert verdicts["relift", "exact_match"] == BETTER
    assert verdicts["rl", "exact_match"] == TIE and verdicts["rl", "pass@8"] == WORSE
    assert all(verdicts[setup, metric] == "" for setup in (BASELINE, "base")
               for metric in ("exact_match", "pass@8"))
    rows = {row[0].removesuffix(" †"): row[-1] for row in difference_rows(
        experiment, arms, BASELINE)}
    assert rows == {"ReLIFT": BETTER, "RL": TIE}
    named = lines_with(texts["comparison.md"], TITLE)
    assert lines_with("\n".join(named), "ReLIFT") and lines_with("\n".join(named), "RL")
    rows = table(texts["comparison.csv"])
    assert {r["verdict"] for r in rows if r["setup"] == "rl" and "lenient" not in r["metric"]} <= {
        WORSE, TIE}
    assert {r["verdict"] for r in rows if r["setup"] in (BASELINE, "base")} == {""}


def test_who_used_more_than_the_budget_is_marked(experiment, tmp_path):
    """In the text, the tables, and the forest plot: twice the rollouts may be what wins."""
    arms = [replace(arm, used=replace(arm.used, rollouts=2 * arm.used.rollouts))
            if arm.setup == "rl" else arm for arm in make_arms(experiment, BASELINE, {})]
    base = next(arm.used for arm in arms if arm.setup == BASELINE)
    arms = [replace(arm, used=base) if arm.setup == "relift" else arm for arm in arms]
    assert beyond_budget(arms, BASELINE) == {"rl"} and not below_budget(arms, BASELINE)
    report_arms(tmp_path / "out", experiment, arms, BASELINE, [], {})
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "RL †" in text and lines_with(text, TITLE, "†") and "ReLIFT †" not in text
    assert r"RL \textdagger{} &" in (tmp_path / "out" / "comparison.tex").read_text()
    assert "RL †" in (tmp_path / "out" / "figures" / "forest.svg").read_text(encoding="utf-8")
    less = [replace(arm, used=replace(base, updates=base.updates / 2, updates_beside=base.updates))
            if arm.setup == "relift" else arm for arm in arms]
    assert "relift" in beyond_budget(less, BASELINE), "what is trained besides the policy counts"
    assert below_budget(less, BASELINE) == {"relift"}
    other = arms_texts(experiment, less, BASELINE, [], {})["comparison.md"]
    assert len(notes_with(other, "ReLIFT", TITLE)) > len(notes_with(text, "ReLIFT", TITLE))
    runs = experiment.of("relift")
    found = used(runs)
    assert found.rollouts == np.mean([sum(4 * 2 for _ in run.metrics) for run in runs])
    beside = [replace(run, metrics=[line | {"groups/beside": 3} for line in run.metrics])
              for run in runs]
    assert used(beside).rollouts == found.rollouts + np.mean([3 * len(run.metrics) for run in runs])
    assert found.updates == np.mean([sum(line["updates"] for line in run.metrics) for run in runs])
    aside = [replace(run, metrics=[run.metrics[0] | {"updates/beside": 70}, *run.metrics[1:]],
                     manifest=run.manifest | {"tokens": run.manifest["tokens"] | {
                         "behavior": 20, "behavior_demonstrations": 300}}) for run in runs]
    more = used(aside)
    assert (more.updates, more.updates_beside) == (found.updates, 70) and not found.updates_beside
    assert (more.demonstration_tokens, more.generated_tokens) == (
        found.demonstration_tokens + 300, found.generated_tokens + 20)
    assert found.minutes == pytest.approx(np.mean([run.manifest["seconds/wall"] / 60
                                                   for run in runs]))


def test_the_files_have_every_arm(experiment, tmp_path):
    """Tables and figures, and a diagnostic figure for a method with columns of its own."""
    arms = make_arms(experiment, BASELINE, {})
    files, printed = report_arms(tmp_path / "out", experiment, arms, BASELINE, [], {})
    names = {path.name for path in files}
    assert {"forest.svg", "forest.png", "pass_at_k.svg", "diagnostics_relift.svg"} <= names
    assert "diagnostics_staged.svg" not in names and "tuning.csv" not in names
    rows = table((tmp_path / "out" / "comparison.csv").read_text())
    assert {(r["setup"], r["benchmark"], r["metric"]) for r in rows} == {
        (setup, benchmark, metric) for setup in ("base", "rl", BASELINE, "relift")
        for benchmark in ("tiny_word", "tiny_symbolic")
        for metric in ("exact_match", "exact_match_lenient", "pass@1", "pass@8")}
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert all(SETUPS[arm.setup].title in text and SETUPS[arm.setup].title in printed
               for arm in arms)
    latex = (tmp_path / "out" / "comparison.tex").read_text()
    widths = [latex.count(rf"\begin{{tabular}}{{l{'r' * columns}}}") for columns in (4, 3)]
    assert widths == [2, 2], "narrow enough for a page: one per benchmark"


def test_figures_of_arms(experiment):
    """A constant does not fill its panel, titles are wrapped, lambda is drawn if losses mix."""
    metrics = [{"step": step, "stage": "sft", "epoch": step, "mifo/frozen": 0.1 + 3e-7 * (step % 2),
                "mifo/taught": 16 * (step % 2), "mifo/buffer": step, "mifo/token_share": 0.2}
               for step in (1, 2, 3)]
    figure = draw_diagnostics(Experiment("made", (Run("mifo", 0, {}, {}, metrics, [], {}),), ()),
                              "mifo")
    panels = {panel.get_title(loc="left"): panel for panel in figure.axes if panel.get_visible()}
    low, high = panels["frozen"].get_ylim()
    assert low < 0.09 and high > 0.11
    low, high = panels["taught"].get_ylim()
    assert -2 < low <= 0 and 16 <= high < 18
    assert [name for name, panel in panels.items() if panel.get_xlabel()] == [
        "frozen", "taught", "token share"]
    run = replace(experiment.of("rl")[0], setup="switching")
    figure = draw_pass_at_k(replace(experiment, runs=(run, *experiment.of(BASELINE))), BASELINE)
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    (title,) = (title for title in titles if title.replace("\n", " ") == SETUPS["switching"].title)
    assert "\n" in title
    for weights, drawn in (((0.5, 0.5), True), ((1.0, 0.25), True), ((1.0, 1.0), False),
                           ((1.0, 0.0), False)):
        runs = tuple(replace(run, setup="combined", metrics=[
            line | {"lambda/sft": weights[place % 2]} for place, line in enumerate(run.metrics)])
            for run in experiment.of("rl"))
        figure = draw_diagnostics(replace(experiment, runs=runs), "combined")
        assert (figure is not None) == drawn, weights
        if drawn:
            (panel,) = figure.axes
            assert "λ" in panel.get_title(loc="left")
