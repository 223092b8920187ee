"""The benchmarks run and compare like with like. What they time is not asserted."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from hybridrl_lib.packing import PromptCompletion, pack

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--prompts", "2", "--samples", "3", "--max-new-tokens", "6", "--pairs", "2",
         "--threads", "1"]


@pytest.fixture()
def script(monkeypatch):
    """script(name) -> the module of a script, which finds its neighbours as when it is run."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture()
def measure(script, capsys, model_folders, tmp_path):
    """measure(name, *options) -> the last line of what a benchmark of a random model prints."""
    def run(name, *options):
        path = tmp_path / "new" / "record.json"
        script(name).main(["--model", str(model_folders["qwen2"]), "--json", str(path),
                              *SMALL, *options])
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record == json.loads(path.read_text(encoding="utf-8"))
        assert record["benchmark"] == name and record["prompts"] == 2 and record["threads"] == 1
        assert len(record["ratio"]) == 2
        assert min(record["ratio"]) <= record["ratio_median"] <= max(record["ratio"])
        return record

    return run


def test_against_generate_runs(measure):
    """Both samplers run, and their tokens are within what was asked of them."""
    record = measure("against_generate")
    assert record["decoder"] == "own"
    for side in ("ours", "generate"):
        assert len(record["seconds"][side]) == len(record["tokens_per_second"][side]) == 2
        assert all(6 <= tokens <= 36 for tokens in record["tokens"][side])


def test_packing_runs(measure):
    """Both packings run, and give the same gradient from fewer positions."""
    record = measure("packing")
    assert 0 <= record["gradient_difference"] < 1e-4 * record["gradient_largest"]
    assert record["positions_ratio"] > 1
    assert len(record["seconds"]["packed"]) == len(record["seconds"]["one_row_each"]) == 2


def test_verdicts_runs(script, capsys, tmp_path):
    """Its pairs are judged as they were made, none comes twice, and the line holds both kinds."""
    verdicts = script("verdicts")
    for pairs in (verdicts.numeric_pairs(500, seed=3), verdicts.symbolic_pairs(500, seed=3)):
        assert len(set(pairs)) == 500
    path = tmp_path / "record.json"
    verdicts.main(["--numeric", "40", "--symbolic", "14", "--workers", "1", "--rounds", "2",
                   "--json", str(path)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads(path.read_text(encoding="utf-8"))
    for kind in ("numeric", "symbolic"):
        assert len(record[kind]["per_second"]) == len(record[kind]["per_processor_second"]) == 2


def test_generate_draws_from_the_same_distribution(script, policy):
    """generate gets no repetition penalty or top-k from the model's folder, and our stop tokens."""
    policy.model.generation_config.update(repetition_penalty=1.5, top_k=20, top_p=0.5)
    prompts, draws = [[5, 6, 7], [8, 9, 10, 11]], 20_000
    generate = script("against_generate").Generate(policy, prompts, draws, 1)
    for prompt, tokens in zip(prompts, generate(0).reshape(len(prompts), draws), strict=True):
        with torch.no_grad():
            p = policy.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        seen = torch.bincount(tokens, minlength=len(p)) / draws
        assert float((seen - p).abs().sum()) / 2 < 0.03  # total variation
    assert set(generate.model.generation_config.eos_token_id) == set(policy.stop_ids)


def test_generate_is_charged_for_its_tokens_alone(script, policy):
    """A stop token counts once; the padding after it and another stop token there do not."""
    generate = script("against_generate").Generate(policy, [[5]], 3, 4)
    stop, pad = policy.stop_ids[0], policy.pad_id
    ids = torch.tensor([[7, stop, pad, pad], [7, 8, 9, 7], [stop, stop, 7, stop]])
    assert generate.count(ids) == 2 + 4 + 1


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_rows_of_their_own_hold_every_token(script, policy, budget):
    """The other side of the packing benchmark scores the same tokens, in its budget."""
    sequences = [PromptCompletion([5, 6, 7], [8, 9, 10]), PromptCompletion([5, 6, 7], [11]),
                 PromptCompletion([12], [13, 14, 15, 16, 17])]
    rows = script("packing").one_row_each(sequences, budget, policy.pad_id)
    assert all(len(m.input_ids) == 1 or m.input_ids.numel() <= budget for m in rows)

    def scores(micro_batches):
        found = {}
        with torch.no_grad():
            for micro_batch in micro_batches:
                values, _ = policy.score(micro_batch)
                for index in micro_batch.sequence.unique().tolist():
                    found[index] = values[micro_batch.sequence == index]
        return torch.cat([found[index] for index in range(len(sequences))])

    torch.testing.assert_close(scores(rows), scores(pack(sequences, budget, policy.pad_id)),
                               atol=1e-5, rtol=1e-5)


def test_order_within_pairs_alternates(script):
    """Neither side always runs first, each is warmed up once, and results are not mixed up."""
    calls = []
    pairs = script("common").alternate(lambda n: calls.append(f"a{n}") or f"a{n}",
                                          lambda n: calls.append(f"b{n}") or f"b{n}", 3)
    assert calls == ["a0", "b0", "a1", "b1", "b2", "a2", "a3", "b3"]
    assert [(a, b) for (_, a), (_, b) in pairs] == [(f"a{n}", f"b{n}") for n in (1, 2, 3)]


def test_too_many_prompts_is_one_sentence(script, capsys, model_folders):
    """What cannot be measured is refused in words, with a nonzero exit code."""
    arguments = ["--model", str(model_folders["qwen2"]), "--prompts", "100000"]
    code = script("common").run(lambda: script("packing").main(arguments))
    assert code == 1 and "lower --prompts" in capsys.readouterr().err
