"""The benchmarks run and compare equal work. Times are not asserted."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from facts import lines_with
from torch.utils.flop_counter import FlopCounterMode

from hybridrl_lib.experiments.compare import choose_arms
from hybridrl_lib.policy.products import Linear
from hybridrl_lib.system.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
PUBLISHED = sorted(ROOT.glob("results/published/bench/*.json"))
SMALL = ["--prompts", "2", "--samples", "3", "--max-new-tokens", "6", "--pairs", "2",
         "--threads", "1"]


@pytest.fixture()
def script(monkeypatch):
    """script(name) -> the module of a script, which finds its neighbors as when it is run."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture()
def measure(model_folders, script, capsys, tmp_path):
    """measure(name, *options) -> the record in the last line of what a script prints."""
    def run(name, *options, model=True, process=False):
        path = tmp_path / "new" / "record.json"
        given = ["--model", str(model_folders["qwen2"]), *SMALL] if model else []
        words = [*given, *options, "--json", str(path)]
        if process:
            done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *words],
                                  capture_output=True, text=True, cwd=ROOT, timeout=600,
                                  env={**os.environ, "PYTHONPATH": str(ROOT)})
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        else:
            script(name).main(words)
            printed = capsys.readouterr().out
        record = json.loads(printed.splitlines()[-1])
        assert record == json.loads(path.read_text(encoding="utf-8"))
        assert record["benchmark"] == name
        if model:
            assert record["prompts"] == 2 and record["threads"] == 1
        if "ratio" in record:
            assert len(record["ratio"]) == 2
            assert min(record["ratio"]) <= record["ratio_median"] <= max(record["ratio"])
        return record

    return run


def test_against_generate_runs(measure):
    """Both samplers run on what was asked; both packings give the same gradient."""
    record = measure("against_generate")
    assert record["decoder"] == "own" and record["ratio_best"] > 0
    for side in ("ours", "generate"):
        assert len(record["seconds"][side]) == len(record["tokens_per_second"][side]) == 2
        assert all(6 <= tokens <= 36 for tokens in record["tokens"][side])
    record = measure("packing")
    assert 0 <= record["gradient_difference"] < 1e-4 * record["gradient_largest"]
    assert record["positions_ratio"] > 1
    assert len(record["seconds"]["packed"]) == len(record["seconds"]["one_row_each"]) == 2


def test_against_trl_runs(measure):
    """Both sides take whole steps with equal tokens, after their gradients were compared."""
    record = measure("against_trl", "--lengths", "fixed", "--groups", "signal")
    assert record["check"]["gradient_distance"] <= record["check"]["gradient_tolerance"] <= 1e-4
    assert record["settings"]["trl"]["loss_type"] == "grpo"
    for side in ("ours", "trl"):
        assert record["tokens"][side] == [36, 36]
        for part in ("seconds", "seconds_sampling", "seconds_update"):
            assert len(record[part][side]) == 2
    assert record["ratio_best"] > 0 and record["tuning"]["ours_seconds_by_tokens"]


@pytest.mark.slow
def test_ceiling_scaling_and_overhead_run(measure):
    """Parts of a ceiling, points of their own processes, and stages against the plain loop."""
    record = measure("ceiling", process=True)
    assert set(record["product_gflops"]) == {"fp32", "bf16"} and record["copy_gb_per_second"] > 0
    for part in ("sampling", "update", "update_products"):
        assert len(record[part]["share"]) == 2 and min(record[part]["share"]) > 0
    shares = record["update_kernels"]
    assert 0 < shares["products"] < sum(shares.values()) < 1 and 0 < shares["attention"]
    record = measure("scaling", "--smallest", "--repeats", "1", "--threads", "1", model=False,
                     process=True)
    samples = record["points"]["samples"]
    assert [(p["part"], p["samples"]) for p in samples] == [
        ("sampling", 2), ("update", 2), ("sampling", 3), ("update", 3)]
    assert all(p["seconds"] > 0 and p["peak_mib"] >= p["resting_mib"] > 0 for p in samples)
    assert record["vocabulary_peak_ratio"] >= 1
    record = measure("overhead", "--setups", "combined", "switching", "--problems", "20",
                     "--epochs", "4", model=False, process=True)
    assert set(record["overhead"]["combined"]) == {"rl"}
    assert record["plain_milliseconds"]["rl"] > 0
    assert all(-1 < share < 1 for found in record["overhead"].values() for share in found.values())


def test_the_bound_is_what_the_numbers_say(script):
    """Protects the reason given for a bar that was missed."""
    ceiling = {"model": "m", "precision": "fp32", "product_gflops": {"fp32": 400.0},
               "update": {"share_median": 0.2},
               "update_products": {"gflops": [100.0, 100.0, 300.0]},
               "update_kernels": {"products": 0.4, "attention": 0.1, "activation": 0.0}}
    step = {"model": "m", "precision": "fp32", "groups": "all",
            "seconds": {"ours": [1.5], "trl": [4.0]},
            "seconds_sampling": {"ours": [0.5]}, "seconds_update": {"ours": [1.0]}}
    half = step | {"groups": "signal", "seconds_update": {"ours": [0.6]}}
    text = script("page").bounds_text([ceiling], [step, half, step | {"model": "other"}])
    assert lines_with(" ".join(text.split()), "0.25", "0.40", "4.0", "5.0")
    assert script("page").bounds_text([{"model": "m"}], []) == ""
    calls = []
    pairs = script("common").alternate(lambda n: calls.append(f"a{n}") or f"a{n}",
                                          lambda n: calls.append(f"b{n}") or f"b{n}", 3)
    assert calls == ["a0", "b0", "a1", "b1", "b2", "a2", "a3", "b3"]
    assert [(a, b) for (_, a), (_, b) in pairs] == [(f"a{n}", f"b{n}") for n in (1, 2, 3)]


def test_verdicts_runs(script, measure, capsys, model_folders):
    """Its pairs are judged as they were made, none is repeated, and the line has both kinds."""
    verdicts = script("verdicts")
    for pairs in (verdicts.numeric_pairs(500, seed=3), verdicts.symbolic_pairs(500, seed=3)):
        assert len(set(pairs)) == 500
    record = measure("verdicts", "--numeric", "40", "--symbolic", "14", "--workers", "1",
                     "--rounds", "2", model=False)
    for kind in ("numeric", "symbolic"):
        assert len(record[kind]["per_second"]) == len(record[kind]["per_processor_second"]) == 2
    arguments = ["--model", str(model_folders["qwen2"]), "--prompts", "100000"]
    code = script("common").run(lambda: script("packing").main(arguments))
    assert code == 1 and "--prompts" in capsys.readouterr().err


@pytest.fixture()
def sides(script, policy):
    """sides(groups with a signal) -> our step, TRL's, and completions of different lengths."""
    def make(which="all"):
        questions = ["1 + 1", "How many are 12 - 3?", "2 * 3", "5 - 4"]
        ours = script("grpo_step").GRPOStep(policy, questions, samples=4, max_new_tokens=12,
                                            which=which)
        trl = script("trl_step").TRLStep(policy, questions, ours.settings, which, rows=4)
        groups = ours.sample(seed=1)
        assert len({len(c.token_ids) for g in groups for c in g.completions}) > 3
        return ours, trl, groups

    return make


def test_both_sides_compute_the_same(script, sides):
    """Equal loss, gradient, and clipping; unequal settings are refused; TRL has none of ours."""
    for which in ("all", "signal"):
        found = script("against_trl").compare(*sides(which))
        assert found["gradient_distance"] < 1e-4 and found["gradient_norm_ours"] > 1e-3, which
    for name, value in (("loss_type", "dapo"), ("scale_rewards", "none"), ("entropy_coef", 0.05)):
        ours, trl, groups = sides()
        setattr(trl.trainer, name, value)
        trl.trainer._entropy_bonus_enabled = name == "entropy_coef"
        with pytest.raises(RuntimeError, match="distance"):
            script("against_trl").compare(ours, trl, groups)
            pytest.fail(f"{name}={value} was accepted")
    _, trl, _ = sides()
    assert not any(isinstance(module, Linear) for module in trl.model.modules())
    assert trl.model.config._attn_implementation == "sdpa"


def test_trl_samples_from_the_same_distribution(script, policy):
    """The model's own top-k and penalty reach neither side; tokens up to the stop are counted."""
    policy.model.generation_config.update(repetition_penalty=1.5, top_k=20, top_p=0.5)
    policy.stop_ids = (policy.model.config.vocab_size,)
    ours = script("grpo_step").GRPOStep(policy, ["1 + 1", "2 * 3"], samples=4, max_new_tokens=9)
    trl = script("trl_step").TRLStep(policy, ours.questions, ours.settings, "all", rows=8)
    config = trl.trainer.generation_config
    assert (config.top_k, config.top_p, config.temperature) == (0, 1.0, 1.0)
    assert config.repetition_penalty in (None, 1.0)
    assert trl(seed=0).tokens == ours(seed=0).tokens == 2 * 4 * 9
    policy.model.generation_config.update(repetition_penalty=1.5, top_k=20, top_p=0.5)
    prompts, draws = [[5, 6, 7], [8, 9, 10, 11]], 20_000
    generate = script("against_generate").Generate(policy, prompts, draws, 1)
    for prompt, tokens in zip(prompts, generate(0).reshape(len(prompts), draws), strict=True):
        with torch.no_grad():
            p = policy.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        seen = torch.bincount(tokens, minlength=len(p)) / draws
        assert float((seen - p).abs().sum()) / 2 < 0.03  # total variation
    assert set(generate.model.generation_config.eos_token_id) == set(policy.stop_ids)
    generate = script("against_generate").Generate(policy, [[5]], 3, 4)
    stop, pad = policy.stop_ids[0], policy.pad_id
    ids = torch.tensor([[7, stop, pad, pad], [7, 8, 9, 7], [stop, stop, 7, stop]])
    assert generate.count(ids) == 2 + 4 + 1


def test_operations_of_an_update_are_those_of_its_products(script, policy, monkeypatch):
    """The share of the ceiling counts what is computed: torch's own count of the products."""
    monkeypatch.setattr("hybridrl_lib.policy.products.ONE_DNN", False)  # torch counts its own alone
    for module in ("packing", "scoring"):  # without padding, which is not counted
        monkeypatch.setattr(f"hybridrl_lib.policy.{module}.TOKENS", 1)
    shapes = script("ceiling").Shapes(policy)
    shapes.attention = 0  # torch counts it with what the mask hides
    step = script("grpo_step").GRPOStep(policy, ["1 + 1"], samples=3, max_new_tokens=9)
    groups = step.sample(seed=0)
    with FlopCounterMode(display=False) as counter:
        step.update(groups)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if str(op).split(".")[1] in ("mm", "addmm"))
    assert shapes.update_operations(groups) == products > 0


def test_published_page_is_rebuilt_to_the_letter(script, tmp_path):
    """Pages follow from their records; memory is flat, overhead under 5%, and docs quote them."""
    assert PUBLISHED
    for path in PUBLISHED:
        found = json.loads(path.read_text(encoding="utf-8"))
        script("page").write_page(found, tmp_path / f"{path.stem}.md")
        for new in tmp_path.glob(f"{path.stem}*"):
            old = path.with_name(new.name)
            assert old.is_file(), new.name
            if new.suffix == ".md":
                text = new.read_text(encoding="utf-8")
                assert old.read_text(encoding="utf-8") == text
                assert "/work" not in text and "/home" not in path.read_text(encoding="utf-8")
    measured = [scaling for path in PUBLISHED if (scaling := json.loads(
        path.read_text(encoding="utf-8"))["cases"].get("scaling"))]
    assert measured
    for scaling in measured:
        assert [p["length"] for p in scaling["points"]["vocabulary"]] == [128, 256, 512, 1024]
        assert scaling["vocabulary_above_resting_ratio"] <= 1.3
    for path in PUBLISHED:
        found = json.loads(path.read_text(encoding="utf-8"))["cases"]["overhead_tiny"]["overhead"]
        assert set(found) == {arm.name for arm in choose_arms([])
                              if arm.stages and arm.method != "staged"}
        assert max(share for stages in found.values() for share in stages.values()) < 0.05
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = text.partition("<!-- table: speed -->\n")[2].partition("<!-- /table -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "**" in line]
    pages = "".join(path.with_suffix(".md").read_text(encoding="utf-8") for path in PUBLISHED)
    assert len(rows) >= 4 and all(row in pages for row in rows)


def test_scaling_is_drawn(script, tmp_path, monkeypatch):
    """Protects the page of a machine where scaling was measured: its figures are written."""
    points = {axis: [{"part": part, "samples": n, "length": n, "prompts": n, "parameters": n,
                      "vocabulary": 100, "micro_batch_tokens": 64, "seconds": n / 10,
                      "peak_mib": 400.0 + n, "resting_mib": 390.0}
                     for n in (4, 8) for part in ("sampling", "update")]
              for axis in ("samples", "length", "prompts", "model", "vocabulary")}
    record = {"benchmark": "scaling", "points": points, "vocabulary_peak_ratio": 1.1,
              "vocabulary_above_resting_ratio": 1.2, "precision": "fp32", "threads": 1,
              "base": {"prompts": 2, "samples": 2, "length": 4, "width": 32, "layers": 1}}
    page = tmp_path / "here.md"
    script("page").write_page({"device": "here", "cases": {"scaling": record}, "left_out": {}},
                              page)
    for name in ("seconds", "peak_mib", "vocabulary"):
        assert (tmp_path / f"here-{name}.png").stat().st_size > 5000
        assert f"here-{name}.png" in page.read_text(encoding="utf-8")
    suite = script("suite")
    records = json.loads(PUBLISHED[0].read_text(encoding="utf-8"))["cases"]

    def measure(case, threads):
        if case.script == "packing":
            raise subprocess.CalledProcessError(1, "packing")
        return records["generate_tiny"]

    monkeypatch.setattr(suite, "measure", measure)
    out = ["--out", str(tmp_path)]
    suite.main([*out, "--only", "generate_tiny"])
    monkeypatch.setattr(suite, "unfit", lambda case, _: "small" if case.gigabytes > 5 else None)
    with pytest.raises(UserError, match="packing_tiny"):
        suite.main([*out, "--only", "packing_tiny", "scaling", "verdicts"])
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert set(found["cases"]) == {"generate_tiny", "verdicts"}
    assert found["left_out"] == {"scaling": "small"}
    assert len(path.with_suffix(".md").read_text(encoding="utf-8")) > 500
    with pytest.raises(UserError, match="nonsense"):
        suite.main([*out, "--only", "nonsense"])
