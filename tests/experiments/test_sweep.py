"""`hybridrl sweep`: which runs a parameter means, its table and its figure."""

import csv
import sys
from dataclasses import replace

import pytest
from made_up_runs import make_up_runs

from hybridrl_lib.cli import main
from hybridrl_lib.config.presets import describe, get_setup, load_settings, preset_names
from hybridrl_lib.experiments import sweep as module
from hybridrl_lib.experiments.plan import Plan
from hybridrl_lib.experiments.sweep import SWEEPS, as_settings, place, sweep
from hybridrl_lib.methods.registry import make_method
from hybridrl_lib.report.loading import load_experiment
from hybridrl_lib.report.scores import score
from hybridrl_lib.report.statistics import holm, paired_difference
from hybridrl_lib.system.errors import UsageError, UserError


@pytest.fixture()
def started(monkeypatch):
    """The commands that are started; each leaves a made-up record instead of training."""
    return make_up_runs(monkeypatch, module)


def plan_of(parameter, preset="tiny"):
    return Plan(preset, (), (get_setup(SWEEPS[parameter].setup),), (0,), (1.0,), "sw", (), 1)


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("parameter", [name for name in SWEEPS if name != "base"])
def test_every_parameter_can_be_swept_in_every_preset(parameter, preset):
    """Each of its values changes its settings and nothing else, and the method takes them."""
    chosen, plan = SWEEPS[parameter], plan_of(parameter, preset)
    arm, seen = plan.arms[0], set()
    for value in chosen.values:
        texts = as_settings(plan, chosen, value)
        settings = load_settings(preset, texts, smoke=False, setup=arm)
        assert make_method(arm, settings).stages
        keys = [text.partition("=")[0] for text in texts]
        assert set(keys) == set(chosen.keys or ("sft.learning_rate", "rl.learning_rate"))
        flat = {key: shown for key, shown, _ in describe(settings)}
        seen.add(tuple(flat[key] for key in keys))
    assert len(seen) == len(chosen.values) == len({place(plan, value) for value in chosen.values})


def test_a_sweep_runs_each_value_and_shows_it(started, results):
    """Every value in an experiment of its own, every seed; table, data and figure."""
    lines = []
    files = sweep("beta", ("0", "0.1"), seeds=(0, 1), jobs=2, experiment="sw", say=lines.append)
    assert {(c[c.index("--experiment") + 1], c[c.index("--seed") + 1], c[-1]) for c in started} == {
        (f"sw-{value}", str(seed), f"rl.beta={value}") for value in ("0", "0.1")
        for seed in (0, 1)}
    assert {c[1] for c in started} == {"sft_then_rl"}
    assert {path.name for path in files} == {"sweep.csv", "sweep.md", "sweep.svg", "sweep.png"}
    rows = list(csv.DictReader((results / "sw" / "sweep.csv").open()))
    assert {(r["value"], r["benchmark"], r["metric"], r["seeds"]) for r in rows} == {
        (value, benchmark, metric, "2") for value in ("0", "0.1")
        for benchmark in ("tiny_word", "tiny_symbolic") for metric in ("exact_match", "pass@1")}
    assert "rollouts" in "\n".join(lines)
    started.clear()
    sweep("beta", ("0", "0.1"), seeds=(0, 1), jobs=2, experiment="sw", say=lines.append)
    assert "4 of 4 runs are finished already" in "\n".join(lines)


def test_values_are_paired_with_the_presets_own(started, results):
    """Two values on the same problems are told apart by their difference, not by their intervals;
    Holm's family is one metric over values and benchmarks."""
    sweep("beta", ("0", "0.02", "0.1"), seeds=(0, 1), jobs=2, experiment="sw",
          settings=("training.epochs=2",), say=lambda line: None)
    text = (results / "sw" / "sweep.md").read_text()
    assert "## Difference to 0.02\n" in text and "| 0.02 |" not in text.partition("## Diff")[2]
    experiments = {value: load_experiment(results / f"sw-{value}") for value in (
        "0", "0.02", "0.1")}
    rows = list(csv.DictReader((results / "sw" / "sweep.csv").open()))
    for metric in ("exact_match", "pass@1"):
        mine = [r for r in rows if r["metric"] == metric and r["value"] != "0.02"]
        wanted = [paired_difference(*(score(experiments[value], "sft_then_rl", r["benchmark"],
                                            metric).values for value in (r["value"], "0.02")))
                  for r in mine]
        assert [float(r["difference"]) for r in mine] == pytest.approx(
            [100 * d.mean for d in wanted], abs=0.01)
        assert [float(r["p_holm"]) for r in mine] == pytest.approx(
            holm(d.p_value for d in wanted), abs=1e-6)
    assert all(r["difference"] == "" for r in rows if r["value"] == "0.02")


def test_other_problems_are_not_paired(started, results):
    """Another split tests other problems."""
    sweep("split", ("0", "1"), jobs=2, experiment="sw", say=lambda line: None)
    eval_file = results / "sw-1" / "sft_then_rl" / "seed-0" / "eval.jsonl"
    eval_file.write_text(eval_file.read_text().replace('"id": "', '"id": "other-'))
    sweep("split", ("0", "1"), jobs=2, experiment="sw", say=lambda line: None)
    assert "## Difference" not in (results / "sw" / "sweep.md").read_text()


def test_values_that_multiply_are_of_the_presets_own():
    assert as_settings(plan_of("learning_rate"), SWEEPS["learning_rate"], "2") == (
        "sft.learning_rate=0.0004", "rl.learning_rate=0.0003")


def test_another_setup_is_another_sweep(started, results):
    """One must not take the place of the other's table."""
    for setup in (None, "rl"):
        sweep("beta", ("0",), jobs=1, setup=setup, say=lambda line: None)
    for folder, setup in (("tiny-sweep-beta", "sft_then_rl"), ("tiny-sweep-beta-rl", "rl")):
        rows = list(csv.DictReader((results / folder / "sweep.csv").open()))
        assert {row["setup"] for row in rows} == {setup}


def test_a_value_without_a_run_of_this_sweep_is_left_out(started, results, monkeypatch):
    """Its folder may hold other seeds, which are not asked for."""
    sweep("beta", ("0",), jobs=1, seeds=(3,), experiment="sw", say=lambda line: None)
    begin = module.run_job
    monkeypatch.setattr(module, "run_job", lambda plan, arm, seed, experiment, texts: replace(
        begin(plan, arm, seed, experiment, texts), **({} if experiment == "sw-0.1" else {
            "command": (sys.executable, "-c", "raise SystemExit('no')")})))
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        sweep("beta", ("0", "0.1"), jobs=1, experiment="sw", say=lambda line: None)
    rows = csv.DictReader((results / "sw" / "sweep.csv").open())
    assert {row["value"] for row in rows} == {"0.1"}


@pytest.mark.parametrize(("arguments", "words"), [
    (("base", ("a/model", "b/model")), "a/model and b/model would share a folder"),
    (("betta",), "did you mean .beta"), (("base",), "give them with --values"),
    (("beta", ("much",)), "rl.beta cannot be"), (("gamma", ("much",)), "no factor"),
    (("updates_per_rollout", ("3",)), "must divide"),
    (("learning_rate", ("0",)), "above 0")])
def test_what_cannot_be_swept_is_one_sentence(arguments, words):
    """Before any run is started."""
    with pytest.raises(UsageError, match=words):
        sweep(*arguments, jobs=1)


def test_the_command_line(monkeypatch):
    """Options reach `sweep` as they are meant."""
    seen = []
    monkeypatch.setattr(module, "sweep", lambda *arguments, **named: seen.append(
        (*arguments, named)))
    assert main(["sweep", "--parameter", "lambda", "--values", "0,1", "--seeds", "2",
                 "--setup", "combined", "--executor", "ray"]) == 0
    assert seen == [("lambda", ("0", "1"), "tiny", (0, 1), "combined", None, None, [],
                     {"executor": "ray"})]
