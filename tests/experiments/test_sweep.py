"""`hybridrl sweep`: which runs a parameter stands for, its table, and its figure."""

import csv

import pytest
from facts import lines_with
from made_up_runs import make_up_runs

from hybridrl_lib.cli import main
from hybridrl_lib.config.presets import describe, get_setup, load_settings, preset_names
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
    monkeypatch.setattr("hybridrl_lib.report.sweeps.as_bytes", lambda figure, kind: b"")
    return make_up_runs(monkeypatch)


def plan_of(parameter, preset="tiny"):
    return Plan(preset, (), (get_setup(SWEEPS[parameter].setup),), (0,), (1.0,), "sw", (), 1)


def test_every_parameter_can_be_swept_in_every_preset():
    """Each value changes the parameter's settings and nothing else, and the method takes them."""
    wrong = []
    for parameter, chosen in SWEEPS.items():
        for preset in preset_names() if parameter != "base" else ():
            plan, seen = plan_of(parameter, preset), set()
            arm = plan.arms[0]
            before = dict(row[:2] for row in describe(load_settings(preset, smoke=False,
                                                                    setup=arm)))
            for value in chosen.values:
                texts = as_settings(plan, chosen, value)
                settings = load_settings(preset, texts, smoke=False, setup=arm)
                keys = {text.partition("=")[0] for text in texts}
                flat = dict(row[:2] for row in describe(settings))
                seen.add(tuple(flat[key] for key in sorted(keys)))
                if (not make_method(arm, settings).stages
                        or keys != set(chosen.keys or ("sft.learning_rate", "rl.learning_rate"))
                        or {key for key in flat if flat[key] != before[key]} - keys):
                    wrong.append((parameter, preset, value))
            if not len(seen) == len(chosen.values) == len(
                    {place(plan, value) for value in chosen.values}):
                wrong.append((parameter, preset, seen))
    assert not wrong


def test_a_sweep_runs_each_value_and_shows_it(started, results):
    """Every value in its own experiment, with every seed; table, data, and figure."""
    lines = []
    files = sweep("beta", ("0", "0.1"), seeds=(0, 1), jobs=2, experiment="sw", say=lines.append)
    assert {(c[c.index("--experiment") + 1], c[c.index("--seed") + 1], c[-1])
            for c in started.commands} == {(f"sw-{value}", str(seed), f"rl.beta={value}")
                                           for value in ("0", "0.1") for seed in (0, 1)}
    assert {c[1] for c in started.commands} == {"sft_then_rl"}
    assert {path.name for path in files} == {"sweep.csv", "sweep.md", "sweep.svg", "sweep.png"}
    rows = list(csv.DictReader((results / "sw" / "sweep.csv").open()))
    assert {(r["value"], r["benchmark"], r["metric"], r["seeds"]) for r in rows} == {
        (value, benchmark, metric, "2") for value in ("0", "0.1")
        for benchmark in ("tiny_word", "tiny_symbolic") for metric in ("exact_match", "pass@1")}
    assert lines_with("\n".join(lines), "0.1") and "[" in "\n".join(lines), "it is printed, too"
    started.commands.clear()
    sweep("beta", ("0", "0.1"), seeds=(0, 1), jobs=2, experiment="sw", say=lines.append)
    assert not started.commands, "what is finished is not run again"
    sweep("beta", ("0",), jobs=1, seeds=(3,), experiment="new", say=lambda line: None)
    started.fails["0 sft_then_rl seed 0"] = "no\n"
    with pytest.raises(UserError, match="0 sft_then_rl seed 0"):
        sweep("beta", ("0", "0.1"), jobs=1, experiment="new", say=lambda line: None)
    rows = csv.DictReader((results / "new" / "sweep.csv").open())
    assert {row["value"] for row in rows} == {"0.1"}


def test_values_are_paired_with_the_presets_own(started, results):
    """Two values on the same problems are compared by their difference."""
    sweep("beta", ("0", "0.02", "0.1"), seeds=(0, 1), jobs=2, experiment="sw",
          settings=("training.epochs=2",), say=lambda line: None)
    text = (results / "sw" / "sweep.md").read_text()
    scores, differences = (set(part.splitlines()) for part in text.split("\n## ")[:2])
    assert any(line.startswith("| 0.02 |") for line in scores)
    assert any(line.startswith("| 0.1 |") for line in differences)
    assert not any(line.startswith("| 0.02 |") for line in differences)
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
    sweep("split", ("0", "1"), jobs=2, experiment="other", say=lambda line: None)
    rows = list(csv.DictReader((results / "other" / "sweep.csv").open()))
    assert any(row["difference"] for row in rows)
    eval_file = results / "other-1" / "sft_then_rl" / "seed-0" / "eval.jsonl"
    eval_file.write_text(eval_file.read_text().replace('"id": "', '"id": "other-'))
    sweep("split", ("0", "1"), jobs=2, experiment="other", say=lambda line: None)
    rows = list(csv.DictReader((results / "other" / "sweep.csv").open()))
    assert rows and not any(row["difference"] for row in rows)
    for setup in (None, "rl"):
        sweep("beta", ("0",), jobs=1, setup=setup, say=lambda line: None)
    for folder, setup in (("tiny-sweep-beta", "sft_then_rl"), ("tiny-sweep-beta-rl", "rl")):
        rows = list(csv.DictReader((results / folder / "sweep.csv").open()))
        assert {row["setup"] for row in rows} == {setup}


def test_what_cannot_be_swept_is_refused_before_any_run():
    """The error names the value, option, or setting."""
    for arguments, fact in (
            (("base", ("a/model", "b/model")), "a/model and b/model"),
            (("betta",), "'beta'"), (("base",), "--values"),
            (("beta", ("much",)), "rl.beta .*'much'"), (("gamma", ("much",)), "'much'"),
            (("updates_per_rollout", ("3",)), "rl.updates_per_rollout .*'3'"),
            (("learning_rate", ("0",)), "learning_rate .*'0'")):
        with pytest.raises(UsageError, match=fact):
            sweep(*arguments, jobs=1)
            pytest.fail(f"{arguments} were accepted")
    assert as_settings(plan_of("learning_rate"), SWEEPS["learning_rate"], "2") == (
        "sft.learning_rate=0.0004", "rl.learning_rate=0.0003")


def test_the_command_line(monkeypatch):
    """Options reach `sweep` as they are meant."""
    seen = []
    monkeypatch.setattr("hybridrl_lib.experiments.sweep.sweep",
                        lambda *arguments, **named: seen.append((*arguments, named)))
    assert main(["sweep", "--parameter", "lambda", "--values", "0,1", "--seeds", "2",
                 "--setup", "combined", "--executor", "ray"]) == 0
    assert seen == [("lambda", ("0", "1"), "tiny", (0, 1), "combined", None, None, [],
                     {"executor": "ray"})]
