"""`hybridrl compare`: equal tuning, what is run, the tables, and what each arm used."""

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import synthetic_records
from made_up_runs import make_up_runs
from synthetic_records import build_experiment

from hybridrl_lib.cli import main
from hybridrl_lib.config.methods import METHODS
from hybridrl_lib.config.presets import get_setup, load_settings, preset_names, settings_to_dict
from hybridrl_lib.experiments import plan as module
from hybridrl_lib.experiments.compare import BASELINE, choose_arms, compare, make_plan
from hybridrl_lib.experiments.tuning import Tuned, choose, learning_rates, rates, tuning_settings
from hybridrl_lib.methods.registry import make_method
from hybridrl_lib.report.arm_figures import draw_diagnostics, draw_pass_at_k
from hybridrl_lib.report.arm_tables import difference_rows, report_arms
from hybridrl_lib.report.arms import beyond_budget, make_arms, used, verdict
from hybridrl_lib.report.hyperparameters import changes_of
from hybridrl_lib.report.loading import Experiment, Run, load_experiment
from hybridrl_lib.report.statistics import Difference, holm, paired_difference
from hybridrl_lib.setups import SETUPS, paper_setups
from hybridrl_lib.system.errors import UsageError, UserError


@pytest.fixture()
def started(monkeypatch):
    """The commands that are started; each leaves a made-up record instead of training."""
    return make_up_runs(monkeypatch, module)


def go(**more):
    lines = []
    files = compare("tiny", jobs=2, experiment="cmp", say=lines.append,
                    **({"seeds": (0, 1), "transfer": 0, "methods": ["rl"]} | more))
    return files, "\n".join(map(str, lines))


def test_every_arm_is_tuned_on_the_same_grid(started, results):
    """Same factors, same seeds, judged on validation; the test runs take the best and no other.

    The made-up `rl` gains from a higher rate, SFT -> RL does not: it keeps the preset's.
    """
    files, said = go(grid=(0.5, 1.0, 2.0))
    tuning = [c for c in started if "tuning" in " ".join(c)]
    asked = {(c[1], c[c.index("--experiment") + 1], c[c.index("--seed") + 1]) for c in tuning}
    assert asked == {(arm, f"cmp-tuning-{factor}", str(seed)) for arm in ("rl", BASELINE)
                     for factor in ("0.5", "1", "2") for seed in (1000, 1001)}
    final = [c for c in started if c not in tuning]
    assert sorted((c[1], c[4], c[5]) for c in final) == sorted(
        [("base", "--seed", "0"), *((arm, "--seed", str(seed)) for arm in ("rl", BASELINE)
                                    for seed in (0, 1))])
    assert all(("rl.learning_rate=0.0003" in c) == (c[1] == "rl") for c in final)
    rows = list(csv.DictReader((results / "cmp" / "tuning.csv").open()))
    assert len(rows) == 12
    assert {(r["setup"], r["rate_factor"]) for r in rows if r["chosen"] == "1"} == {
        ("rl", "2"), (BASELINE, "1")}
    names = {path.name for path in files}
    assert {"comparison.csv", "comparison.md", "comparison.tex", "forest.svg",
            "pass_at_k.png"} <= names
    page = (results / "cmp" / "comparison.md").read_text()
    assert "seeds 1000 and 1001" in page
    assert "1 of 2 arms took the largest factor, 2: beyond it" in page and "smallest" not in page
    assert "optimizer updates" in said, "what each arm used is printed, too"
    assert "Not run: `--transfer N`" in page


@pytest.mark.parametrize("preset", preset_names())
def test_tuning_leaves_the_behavior_model_alone(preset):
    """PEAR and its control would learn from different demonstrations once their factors differ."""
    for arm in (s for s in SETUPS.values() if s.method == "pear"):
        settings = load_settings(preset, smoke=False, setup=arm)
        assert settings.method.behavior_rate == settings.sft.learning_rate
        assert set(learning_rates(settings)) == {"sft.learning_rate", "rl.learning_rate"}


def test_what_decides_by_its_probes_is_tuned_with_them():
    """Without them switching would be another method: a stage that never ends."""
    for setup in SETUPS.values():
        unprobed = any(text.startswith("probe.every") for text in tuning_settings(setup))
        assert unprobed == (setup.method != "switching"), setup.name


def test_what_is_finished_is_not_run_again(started, results):
    """The same command goes on; with other settings it says so instead of mixing."""
    go(grid=(1.0,))
    before = {path: path.stat().st_mtime_ns for path in results.glob("cmp/*/seed-*/manifest.json")}
    assert len(before) == 5
    _, said = go(grid=(1.0,))
    assert "5 of 5 runs are finished already" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}
    _, said = go(grid=(1.0,), settings=("evaluation.batch_size=3",))
    assert "5 of 5 runs are finished already" in said, "memory alone is no other setting"
    with pytest.raises(UserError, match="made with other settings .rl.beta: 0.02 -> 0.1"):
        go(grid=(1.0,), settings=("rl.beta=0.1",))


def test_transfer_trains_on_one_and_tests_on_all(started, results):
    """Each arm once more for each benchmark, without the other's training and validation problems:
    by the latter it would choose the best weights, or switch."""
    go(grid=(1.0,), seeds=(0, 1), transfer=1)
    alone = [c for c in started if "only" in " ".join(c)]
    limits = {c[c.index("--experiment") + 1]: tuple(text for text in c if "_limits=" in text)
              for c in alone}
    assert limits == {f"cmp-only-{name}": (f"data.train_limits={left}",
                                           f"data.validation_limits={left}")
                      for name, left in (("tiny_word", "1000000000,0"),
                                         ("tiny_symbolic", "0,1000000000"))}
    rows = list(csv.DictReader((results / "cmp" / "transfer.csv").open()))
    assert {(r["setup"], r["trained_on"], r["tested_on"]) for r in rows} == {
        (setup, one, other) for setup in ("rl", BASELINE)
        for one in ("tiny_word", "tiny_symbolic") for other in ("tiny_word", "tiny_symbolic")}
    assert {c[c.index("--seed") + 1] for c in started if "only" in " ".join(c)} == {"0"}
    assert load_settings("tiny", limits["cmp-only-tiny_word"])  # a setting that there is
    assert all("evaluation.samples=0" in c for c in alone), "one greedy answer is all that is shown"


def test_a_run_that_fails_is_named_and_keeps_no_other_from_running(monkeypatch, results):
    monkeypatch.setattr(module, "environment", lambda plan: {})
    job = module.run_job(plan_of(), get_setup("rl"), 0, "cmp", ())
    bad = replace(job, command=(sys.executable, "-c", "raise SystemExit('it broke')"))
    lines = []
    with pytest.raises(UserError, match="1 of 1 runs failed .rl seed 0."):
        module.work(plan_of(), [bad], lines.append)
    assert any("it broke" in line for line in lines)


def test_one_failure_leaves_the_comparison_of_the_others(started, monkeypatch, results):
    """The arms that are finished are in the tables, and the command still fails."""
    work = module.work

    def broken(plan, jobs, say):
        work(plan, [replace(job, command=(sys.executable, "-c", "raise SystemExit('no')"))
                    if job.name == "rl seed 1" else job for job in jobs], say)

    monkeypatch.setattr(module, "work", broken)
    with pytest.raises(UserError, match="1 of 5 runs failed .rl seed 1."):
        go(grid=(1.0,))
    assert "rl,tiny_word" in (results / "cmp" / "comparison.csv").read_text()


def test_why_runs_failed_is_said_where_none_is_left_to_show(monkeypatch, results):
    """Not that there is no experiment, which is only what follows."""
    def broken(plan, jobs, say):
        raise UserError("2 of 2 runs failed (...)")

    monkeypatch.setattr(module, "work", broken)
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        go(grid=(1.0,))


def test_runs_of_other_numerics_are_not_mixed_in(started, results):
    """As `hybridrl run` would not go on with them."""
    go(grid=(1.0,))
    path = results / "cmp" / "rl" / "seed-1" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"numerics_version": 0}))
    with pytest.raises(UserError, match="rl/seed-1.*older or newer.*numerics version 0"):
        go(grid=(1.0,))


def plan_of(**more):
    arguments = {"preset": "tiny", "seeds": (0,), "methods": ["rl"], "grid": (1.0,), "jobs": 1,
                 "experiment": "cmp", "settings": ()} | more
    return make_plan(**arguments)


# Choices ------------------------------------------------------------------------------------------


def test_the_arms():
    """Unless told otherwise: the paper's, RL's whole budget after SFT, one of each method."""
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
    with pytest.raises(UsageError, match="did you mean .relift"):
        choose_arms(["relft"])


@pytest.mark.parametrize("setup", ["raft", "frpo", "prl", "prl_newline", "luffy", "combined"])
def test_arms_without_a_stage_of_sft_have_the_rollouts_of_sft_then_rl(setup):
    """The budget that is equal; RL alone has the paper's, twice as many."""
    settings = [load_settings("tiny", smoke=False, setup=get_setup(name))
                for name in (setup, BASELINE)]
    mine, theirs = (make_method(get_setup(name), chosen).stages[-1]
                    for name, chosen in zip((setup, BASELINE), settings, strict=True))
    assert mine.name == theirs.name == "rl" and mine.epochs == theirs.epochs


@pytest.mark.parametrize("epochs", [2, 3, 5, 10])
def test_an_odd_epoch_is_not_given_to_rl(epochs):
    """SFT -> RL gives it to SFT, and so do the arms that have RL's half."""
    settings = load_settings("tiny", [f"training.epochs={epochs}"], smoke=False)
    stages = {name: make_method(get_setup(name), replace(settings, method=load_settings(
        "tiny", smoke=False, setup=get_setup(name)).method, rl=replace(settings.rl, beta=0))).stages
        for name in (BASELINE, "raft", "frpo", "sft_then_full_rl")}
    assert stages["raft"][-1] == stages["frpo"][-1] == stages[BASELINE][-1]
    assert [s.epochs for s in stages["sft_then_full_rl"]] == [stages[BASELINE][0].epochs, epochs]


def test_the_full_rl_arm_takes_as_many_rl_steps_as_rl_alone():
    settings = load_settings("tiny", smoke=False)
    stages = {name: make_method(get_setup(name), settings).stages
              for name in ("rl", "sft_then_rl", "sft_then_full_rl")}
    assert stages["sft_then_full_rl"] == (stages["sft_then_rl"][0], stages["rl"][0])


def test_the_best_mean_is_chosen_and_the_nearer_of_equals():
    scores = {0.5: (0.2, 0.6), 1.0: (0.5, 0.1), 2.0: (0.4, 0.4)}
    tuned = [Tuned("rl", factor, seed, value) for factor, values in scores.items()
             for seed, value in enumerate(values)]
    assert choose(tuned, "rl") == 0.5, "0.4 twice: as far from 1, and the smaller"
    assert choose([*tuned, Tuned("rl", 1.0, 2, 0.7)], "rl") == 1.0


@pytest.mark.parametrize("setup", ["rl", "bridge"])
def test_a_factor_is_of_the_presets_own_rates(setup):
    arm = get_setup(setup)
    assert rates(plan_of(), arm, 2.0) == ("sft.learning_rate=0.0004", "rl.learning_rate=0.0003")
    assert rates(plan_of(), arm, 1.0) == ()


@pytest.mark.parametrize(("more", "words"), [
    ({"seeds": (0, 1000), "grid": (1.0, 2.0)}, "The seed 1000 is one that learning rates"),
    ({"grid": ()}, "one or more factors"), ({"grid": (0.0, 1.0)}, "one or more factors"),
    ({"settings": ("rl.bta=1",)}, "rl.beta"),
    ({"methods": ["pear"], "settings": ("relift.every=3",)}, "No arm has the settings relift")])
def test_what_cannot_be_compared_is_one_sentence(more, words):
    with pytest.raises(UsageError, match=words):
        plan_of(**more)


def test_a_method_with_impossible_settings_is_refused_before_any_run():
    with pytest.raises(UsageError, match="pear.behavior cannot be 'none': human solutions"):
        plan_of(methods=["pear"], settings=("pear.behavior=none",))


@pytest.mark.parametrize(("method", "setting", "keeps", "takes"), [
    ("pear", "pear.level=block", "sft_sampled_then_rl", "pear"),
    ("superrl", "superrl.unsolved=sft", "superrl_drop", "superrl"),
    ("hpt", "rl.clip=true", "hpt", "rl"),
    ("bridge", "model.adapter=none", "bridge", "rl")])
def test_an_arm_keeps_what_makes_it_what_it_is_called(started, results, method, setting, keeps,
                                                      takes):
    """A setting for all arms must not turn a control into the arm that it controls for."""
    _, said = go(grid=(1.0,), seeds=(0,), methods=["rl", method], settings=(setting,))
    assert f"{keeps} keeps {setting.partition('=')[0]}=" in said and said.count(" keeps ") == 1
    assert all((setting in command) == (command[1] != keeps and (
        setting.partition(".")[0] not in METHODS or command[1] == takes)) for command in started)
    assert {keeps, takes} <= {command[1] for command in started}


def test_an_arm_with_a_rate_of_its_own_is_tuned_too(monkeypatch):
    """A setup may set its learning rate; the grid multiplies it like any other."""
    own = replace(SETUPS["rl"], name="rl_fast", settings=("rl.learning_rate=0.001",))
    monkeypatch.setitem(SETUPS, "rl_fast", own)
    plan = plan_of(methods=["rl_fast"], settings=("rl.learning_rate=0.5", "rl.beta=0.1"))
    assert module.given(own, plan.settings) == ("rl.beta=0.1",)
    assert rates(plan, own, 2.0)[-1] == "rl.learning_rate=0.002"
    record = module.run_job(plan, own, 0, "x", (*module.given(own, plan.settings),
                                                *rates(plan, own, 2.0)))
    assert "rl.learning_rate=0.002" in record.command


def test_settings_may_be_one_text_as_in_a_notebook():
    assert plan_of(settings="rl.beta=0.1 rl.group_size=4").settings == (
        "rl.beta=0.1", "rl.group_size=4")


def test_the_command_line(monkeypatch, capsys):
    """Options reach `compare` as they are meant."""
    seen = []
    monkeypatch.setattr(module, "compare", lambda *arguments, **named: seen.append(
        (*arguments, named)))
    assert main(["compare", "--seeds", "2", "--methods", "relift,pear", "rl", "--grid", "1,3",
                 "--transfer", "1", "--set", "rl.beta=0.1"]) == 0
    assert seen == [("tiny", (0, 1), ["relift", "pear", "rl"], (1.0, 3.0), 1, None, None,
                     ["rl.beta=0.1"], {"executor": "local"})]
    assert main(["compare", "--grid", "half"]) == 2
    assert "no list of factors" in capsys.readouterr().err


# The report ---------------------------------------------------------------------------------------


@pytest.fixture()
def experiment(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic_records.GAIN, "relift", 2.6)
    build_experiment(tmp_path / "made", ["base", "rl", BASELINE, "relift"], range(3),
                     {"tiny_word": 60, "tiny_symbolic": 40}, {"tiny_word": 5}, epochs=2)
    for path in (tmp_path / "made").glob("relift/*/metrics.jsonl"):
        lines = [json.loads(line) | {"relift/taught": 3, "groups/correct_counts": [1, 2, 1]}
                 for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_experiment(tmp_path / "made")


def test_differences_and_holm_are_those_of_the_formulas(experiment):
    """Paired over problems, against SFT -> RL, one family a metric over arms and benchmarks."""
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


def test_what_all_runs_have_otherwise_than_the_preset_is_said(experiment, tmp_path):
    """Protects the reader from taking a shorter comparison for the preset's own budget."""
    for run in experiment.runs:
        rate = [f"rl.learning_rate={1e-5 if run.setup == 'rl' else 2e-5}"]
        settings = load_settings("tiny", ["training.epochs=4", *rate], setup=SETUPS[run.setup])
        run.config.update(preset="tiny", settings=settings_to_dict(settings))
    arms = make_arms(experiment, BASELINE, {})
    report_arms(tmp_path / "out", experiment, arms, BASELINE, [], {})
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "Every run has `training.epochs=4` (preset tiny: `10`).\n" in text


@pytest.mark.parametrize(("settings", "said"), [
    (["rl.beta=0"], ["`rl.beta=0` (preset tiny: `0.02`)"]),
    (["rl.updates_per_rollout=1"], ["`rl.updates_per_rollout=1` (preset tiny: `2`)"]),
    (["relift.batch_size=4"], ["`relift.batch_size=4` (preset tiny: `16`)"]), ([], [])])
def test_a_setting_that_some_arm_has_by_itself_is_said_of_the_others(settings, said):
    """LUFFY has beta = 0 and DeepSeekMath one update whatever is asked for; only ReLIFT has a
    buffer."""
    runs = []
    for name in ("base", "rl", BASELINE, "luffy", "deepseekmath", "relift"):
        own = module.own_settings(SETUPS[name], settings)
        config = {"preset": "tiny", "settings": settings_to_dict(load_settings(
            "tiny", [*own, *([] if name != "rl" else ["rl.learning_rate=1"])], smoke=False,
            setup=SETUPS[name]))}
        runs.append(Run(name, 0, config, {}, [], [], {}))
    assert changes_of(runs, tuned=True) == said
    for run in runs:
        run.config["settings"]["rl"]["learning_rate"] = 0.5
    assert changes_of(runs, tuned=True) == said, "the rates of a comparison have a table"
    assert len(changes_of(runs)) == len(said) + 1


# What the page says of its arms -------------------------------------------------------------------


def page_of(experiment, folder, tuned=(), alone=None, factors=None):
    arms = make_arms(experiment, BASELINE, factors or {})
    report_arms(folder, experiment, arms, BASELINE, tuned, alone or {})
    return (folder / "comparison.md").read_text()


def test_lenient_scores_stand_beside_strict_ones(experiment, tmp_path):
    """What training adds may be the box alone; no difference is tested by them."""
    text = page_of(experiment, tmp_path / "out")
    head = next(line for line in text.splitlines() if line.startswith("| arm |"))
    assert head.count("exact match, lenient") == 2
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    lenient = [r for r in rows if r["metric"] == "exact_match_lenient"]
    assert len(lenient) == 8 and not any(r["difference"] or r["p_holm"] for r in lenient)
    for r in lenient:
        answers = [run.answers["last", "test", r["benchmark"]].lenient
                   for run in experiment.of(r["setup"])]
        assert float(r["mean"]) == pytest.approx(100 * np.mean(answers), abs=0.01)


def test_what_was_not_sampled_has_no_verdict(experiment, tmp_path):
    """`none` beats the baseline by Pass@1 would be a result that nobody measured."""
    greedy = replace(experiment, runs=tuple(
        replace(run, answers={key: replace(a, samples=0) for key, a in run.answers.items()})
        for run in experiment.runs))
    text = page_of(greedy, tmp_path / "out")
    assert "By exact match:" in text and "Pass@" not in text.partition("## What each")[0]
    other = page_of(greedy, tmp_path / "other", factors={"rl": 0.25})
    assert "Pass@" not in other.partition("## What each")[0]


def test_one_seed_is_said_beside_the_verdicts(experiment, tmp_path):
    assert "of that run alone" not in page_of(experiment, tmp_path / "three")
    for setups in (("rl", "relift", BASELINE), (BASELINE,)):
        one = replace(experiment, runs=tuple(run for run in experiment.runs
                                             if run.seed == 0 or run.setup not in setups))
        verdicts = page_of(one, tmp_path / setups[0]).partition("## What each arm used")[0]
        assert "Where an arm or the baseline has one seed, the verdict is of that run" in verdicts


def test_an_arm_that_is_another_is_said(experiment, tmp_path):
    """Switching that never switches is SFT; a verdict on it would be one on SFT, told twice."""
    assert "counted twice" not in page_of(experiment, tmp_path / "apart")
    twin = tuple(replace(run, setup="switching",
                         metrics=[line | {"stage": "sft"} for line in run.metrics])
                 for run in experiment.of("rl"))
    text = page_of(replace(experiment, runs=experiment.runs + twin), tmp_path / "out")
    title = SETUPS["switching"].title
    assert f"- {title}: no run had a stage of RL.\n" in text
    assert f"- RL and {title} were right on the same problems with every seed" in text
    wrong = replace(experiment, runs=tuple(replace(run, answers={
        key: replace(a, strict=a.strict & False, right=a.right * 0) for key, a in
        run.answers.items()}) for run in experiment.runs))
    assert "were right on the same" not in page_of(wrong, tmp_path / "wrong"), "none was right"


def test_ties_of_learning_rates_are_said(experiment, tmp_path):
    """A choice by rule is not a choice by score."""
    tuned = [Tuned(setup, factor, seed, score) for setup, low, high in (
        ("rl", 0.7, 0.7), ("relift", 0.6, 0.8), (BASELINE, 0.75, 0.75)) for factor, score in (
        (0.25, low), (1.0, high)) for seed in (1000, 1001)]
    text = page_of(experiment, tmp_path / "out", tuned)
    assert ("- Equally good factors had RL (× 0.25 and 1); SFT + RL (× 0.25 and 1): the one "
            "nearest to 1 was taken.\n") in text
    assert "it is for greedy exact match" in text


def test_what_samples_would_have_chosen_is_said(experiment, tmp_path):
    """Greedy answers and sampled ones want other rates: a verdict by Pass@k is of both."""
    tuned = [Tuned(setup, factor, seed, greedy, sampled) for setup, found in (
        ("rl", ((0.8, 0.2), (0.7, 0.5))), ("relift", ((0.6, 0.1), (0.9, 0.4))),
        (BASELINE, ((0.9, 0.3), (0.8, 0.2)))) for factor, (greedy, sampled) in zip(
            (0.25, 1.0), found, strict=True) for seed in (1000, 1001)]
    text = page_of(experiment, tmp_path / "out", tuned, factors={"rl": 0.25, BASELINE: 0.25})
    assert "| RL | **80.0 / 20.0** | 70.0 / 50.0 |" in text
    assert "1 of 3 arms would have another factor (× 0.25: 1, × 1: 2)." in text
    verdicts = text.partition("## What each arm used")[0]
    assert "There is no verdict by Pass@k" in verdicts and "By Pass@" not in verdicts
    lines = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert {r["metric"] for r in lines if r["verdict"]} == {"exact_match"}
    alike = page_of(experiment, tmp_path / "one")
    assert "There is no verdict by Pass@k" not in alike and "By Pass@8:" in alike
    rows = list(csv.DictReader((tmp_path / "out" / "tuning.csv").open()))
    assert {(r["setup"], r["sampled"]) for r in rows if r["chosen"] == "1"} == {
        ("rl", "20.00"), ("relift", "40.00"), (BASELINE, "30.00")}
    alike = [replace(t, sampled=0.0) for t in tuned]
    assert "would have another factor" not in page_of(experiment, tmp_path / "alike", alike)
    unprobed = page_of(experiment, tmp_path / "none", [replace(t, sampled=None) for t in tuned])
    assert "| RL | 80.0 | **70.0** |" in unprobed and "would have another factor" not in unprobed


def test_arms_may_differ_in_more_than_the_method(experiment, tmp_path):
    """A paper that drops the clip and the KL term changes GRPO, too: the page has a row for it."""
    for run in experiment.runs:
        run.config["settings"] = settings_to_dict(load_settings(
            "tiny", ["rl.learning_rate=1"] if run.setup == "rl" else
            ["rl.clip=false", "rl.beta=0", "relift.batch_size=7"] if run.setup == "relift" else [],
            smoke=False, setup=SETUPS[run.setup]))
    part = page_of(experiment, tmp_path / "out").partition("## What else differs")[2]
    assert "| ReLIFT | `rl.beta=0`, `rl.clip=false` |" in part and "| RL |" not in part


def test_older_records_are_not_said_to_count_what_they_lack(experiment, tmp_path):
    """Before, PEAR's behavior model and BRIDGE's copies were in no record."""
    arms = {name: tuple(replace(run, setup=name) for run in experiment.of("relift"))
            for name in ("pear", "bridge")}
    both = replace(experiment, runs=experiment.runs + arms["pear"] + arms["bridge"])
    text = page_of(both, tmp_path / "old")
    assert "PEAR: what the model that wrote their demonstrations took is not in these" in text
    assert "BRIDGE: the updates of the adapter, and of the copy" in text and "not in these" in text
    new = replace(both, runs=tuple(replace(run, metrics=[
        line | {"updates/beside": 1} for line in run.metrics]) for run in both.runs))
    text = page_of(new, tmp_path / "new")
    assert "took in the run is counted" in text and "BRIDGE: updates after the + are" in text
    assert "not in these records" not in text


def test_transfer_has_a_zero_point_and_its_seeds(experiment, tmp_path):
    """The base model's score, and whether another seed is in the intervals."""
    alone = {"tiny_word": replace(experiment, runs=tuple(
        run for run in experiment.runs if run.seed == 0 and run.setup != "base"))}
    part = page_of(experiment, tmp_path / "out", alone=alone).partition("## Transfer")[2]
    assert "one seed, so that the intervals are over test problems alone" in part
    base, = (arm for arm in make_arms(experiment, BASELINE, {}) if arm.setup == "base")
    score = base.scores["tiny_symbolic", "exact_match"]
    row, = (line for line in part.splitlines() if line.startswith("| base model |"))
    assert row.endswith(f"| {100 * score.mean:.1f} [{100 * score.low:.1f}, "
                        f"{100 * score.high:.1f}] |")
    rows = list(csv.DictReader((tmp_path / "out" / "transfer.csv").open()))
    assert "base" not in {r["setup"] for r in rows}, "it was trained on nothing"


def test_what_an_arm_used_is_counted_from_its_records(experiment):
    """Rollouts are groups times their size; tokens and minutes are the manifest's."""
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


def test_who_does_not_beat_the_baseline_is_named(experiment, tmp_path):
    """By Holm's p and the sign: a significant loss must not look like a gain."""
    def difference(mean, p):
        return Difference(mean, mean - 0.1, mean + 0.1, p, 3, 60), p

    cases = {"better": [(0.2, 0.01), (0.0, 0.9)], "worse": [(-0.2, 0.01), (0.3, 0.05)],
             "not told apart": [(0.2, 0.2)], "better and worse": [(0.2, 0.01), (-0.2, 0.01)]}
    for words, found in cases.items():
        assert verdict([difference(*each) for each in found]) == words
    arms = make_arms(experiment, BASELINE, {})
    report_arms(tmp_path / "out", experiment, arms, BASELINE, [], {})
    text = (tmp_path / "out" / "comparison.md").read_text()
    by_exact_match = text.partition("By exact match:")[2].partition("By Pass@1:")[0].splitlines()
    assert "- Better than SFT + RL on a benchmark and on none worse: ReLIFT †." in by_exact_match
    assert "- Worse than SFT + RL on a benchmark and on none better: none." in by_exact_match
    assert "- Not shown to beat SFT + RL, nor to lose to it: RL †." in by_exact_match
    by_pass_at_8 = text.partition("By Pass@8:")[2].splitlines()
    assert "- Worse than SFT + RL on a benchmark and on none better: RL †." in by_pass_at_8
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert {r["verdict"] for r in rows if r["setup"] == "rl" and "lenient" not in r["metric"]} <= {
        "worse", "not told apart"}
    assert {r["verdict"] for r in rows if r["setup"] in (BASELINE, "base")} == {""}


def test_a_verdict_is_of_one_family(experiment):
    """Holm holds the level within a metric: best of three would be a false gain three times as
    often."""
    arm, = (arm for arm in make_arms(experiment, BASELINE, {}) if arm.setup == "relift")
    good, none = (Difference(0.2, 0.1, 0.3, 0.01, 3, 60), 0.01), (
        Difference(0.0, -0.1, 0.1, 0.9, 3, 60), 0.9)
    arm = replace(arm, differences={("tiny_word", "exact_match"): none,
                                    ("tiny_word", "pass@8"): good})
    assert arm.verdict("exact_match") == "not told apart" and arm.verdict("pass@8") == "better"
    row, = difference_rows(experiment, [arm], BASELINE)
    assert row[-1] == "not told apart"


def test_who_used_more_than_the_budget_is_marked(experiment, tmp_path):
    """In the text, the tables and the forest plot; twice the rollouts may be what wins."""
    arms = [replace(arm, used=replace(arm.used, rollouts=2 * arm.used.rollouts))
            if arm.setup == "rl" else arm for arm in make_arms(experiment, BASELINE, {})]
    base = next(arm.used for arm in arms if arm.setup == BASELINE)
    arms = [replace(arm, used=base) if arm.setup == "relift" else arm for arm in arms]
    assert beyond_budget(arms, BASELINE) == {"rl"}
    report_arms(tmp_path / "out", experiment, arms, BASELINE, [], {})
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "better: RL †." in text and "† used more than SFT + RL" in text
    assert "ReLIFT." in text and "ReLIFT †" not in text
    assert r"RL \textdagger{} &" in (tmp_path / "out" / "comparison.tex").read_text()
    assert "RL †" in svg_text(tmp_path / "out" / "figures" / "forest.svg")
    less = [replace(arm, used=replace(base, updates=base.updates / 2,
                                      updates_beside=base.updates)) if arm.setup == "relift"
            else arm for arm in arms]
    assert "relift" in beyond_budget(less, BASELINE), "what is trained beside the policy counts"
    report_arms(tmp_path / "less", experiment, less, BASELINE, [], {})
    assert "had ReLIFT: what they lose may be lost by that" in (
        tmp_path / "less" / "comparison.md").read_text()
    assert "what they lose" not in text


def svg_text(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("weights", "drawn"), [
    ((0.5, 0.5), True), ((1.0, 0.25), True), ((1.0, 1.0), False), ((1.0, 0.0), False)])
def test_the_weight_of_sft_is_drawn_where_losses_are_mixed(experiment, weights, drawn):
    """lambda over time is the diagnostic of the combined loss, which has no column of its own."""
    runs = tuple(replace(run, setup="combined", metrics=[
        line | {"lambda/sft": weights[place % 2]} for place, line in enumerate(run.metrics)])
        for run in experiment.of("rl"))
    figure = draw_diagnostics(replace(experiment, runs=runs), "combined")
    assert (figure is not None) == drawn
    if drawn:
        assert [panel.get_title(loc="left") for panel in figure.axes] == [
            "λ, weight of the SFT loss"]


def test_a_constant_is_drawn_as_one():
    """Rounding of a share in fp32 must not fill a panel; and each column says what its x is."""
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
    assert [name for name, panel in panels.items() if panel.get_xlabel() == "epoch"] == [
        "frozen", "taught", "token share"]


def test_long_titles_of_panels_are_broken(experiment):
    """Above one of three panels in a row there is room for some 27 letters."""
    run = replace(experiment.of("rl")[0], setup="switching")
    figure = draw_pass_at_k(replace(experiment, runs=(run, *experiment.of(BASELINE))), BASELINE)
    title, = (panel.get_title(loc="left") for panel in figure.axes
              if "switched" in panel.get_title(loc="left"))
    assert "\n" in title and title.replace("\n", " ") == SETUPS["switching"].title


def test_the_files_hold_every_arm(experiment, tmp_path):
    """Tables and pictures, a diagnostic picture for a method with columns of its own."""
    arms = make_arms(experiment, BASELINE, {})
    files, table = report_arms(tmp_path / "out", experiment, arms, BASELINE, [], {})
    names = {path.name for path in files}
    assert {"forest.svg", "forest.png", "pass_at_k.svg", "diagnostics_relift.svg"} <= names
    assert "diagnostics_staged.svg" not in names and "tuning.csv" not in names
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert {(r["setup"], r["benchmark"], r["metric"]) for r in rows} == {
        (setup, benchmark, metric) for setup in ("base", "rl", BASELINE, "relift")
        for benchmark in ("tiny_word", "tiny_symbolic")
        for metric in ("exact_match", "exact_match_lenient", "pass@1", "pass@8")}
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert all(SETUPS[arm.setup].title in text and SETUPS[arm.setup].title in table
               for arm in arms)
    assert "Nothing was tuned" in text
    latex = (tmp_path / "out" / "comparison.tex").read_text()
    widths = [latex.count(rf"\begin{{tabular}}{{l{'r' * columns}}}") for columns in (4, 3)]
    assert widths == [2, 2], "narrow enough for a page: one a benchmark"
