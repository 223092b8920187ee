"""Adapter folders: loaded on their base, refused where they would load anything else, merged."""

import json

import pytest
import torch
from hostile import Pickled
from safetensors.torch import save_file
from test_policy import move, scores_of

from hybridrl_lib.cli import main
from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.experiments.merge import merge
from hybridrl_lib.experiments.run import run
from hybridrl_lib.policy.adapters import remember_base, unfold
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.policy.sampling import sample
from hybridrl_lib.system.errors import UserError


def load(folder, **settings):
    return load_policy(ModelSettings(path=str(folder), device="cpu", precision="fp32", **settings))


@pytest.fixture
def adapter(make_policy, tmp_path):
    """A LoRA policy that has moved, and the folder it was saved to."""
    policy = make_policy(adapter="lora", lora_rank=3, lora_alpha=7.0)
    move(policy)
    policy.save(tmp_path / "adapter")
    return policy, tmp_path / "adapter"


def change(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_an_adapter_is_saved_alone(adapter):
    """A few percent of the model, in safetensors, with the tokenizer."""
    policy, folder = adapter
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_an_adapter_folder_loads_on_its_base(adapter, make_policy):
    """model.path=<adapter folder>: rank, alpha, and base are what the folder says."""
    policy, folder = adapter
    again = load(folder)
    torch.testing.assert_close(scores_of(again), scores_of(policy), atol=1e-5, rtol=1e-5)
    assert (scores_of(again) - scores_of(make_policy())).abs().max() > 0.01
    assert again.name == "adapter" and again.sha256 not in ("", policy.sha256)
    assert not any("lora" in name for name, _ in again.model.named_parameters())


def test_a_run_continues_from_an_adapter_with_another_one(adapter, tmp_path):
    """LoRA after LoRA: the reference is the model as loaded, and what is saved loads again."""
    policy, folder = adapter
    second = load(folder, adapter="lora")
    with second.reference() as reference:
        torch.testing.assert_close(scores_of(second, reference), scores_of(policy), atol=1e-5,
                                   rtol=1e-5)
    move(second, seed=8)
    second.save(tmp_path / "second")
    torch.testing.assert_close(scores_of(load(tmp_path / "second")), scores_of(second), atol=1e-5,
                               rtol=1e-5)


def test_merged_is_unmerged(adapter, tmp_path):
    """The folder that `hybridrl merge` writes is an ordinary model with the same answers."""
    policy, folder = adapter
    assert main(["merge", str(folder), str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole" / "config.json").is_file()
    whole = load(tmp_path / "whole")
    torch.testing.assert_close(scores_of(whole), scores_of(policy), atol=1e-5, rtol=1e-5)
    answers = [sample(p, [[5, 6, 7]], samples=4, max_new_tokens=8, temperature=1.0, seed=3)
               for p in (whole, policy)]
    assert [c.token_ids for c in answers[0][0].completions] == [
        c.token_ids for c in answers[1][0].completions]


def test_an_adapter_that_cannot_be_used_is_refused(adapter):
    """Another kind of adapter, another model's, or one whose base is missing: an error in one
    line that names the entry of adapter_config.json, or what is missing."""
    _, folder = adapter
    path, wrong = folder / "adapter_config.json", []
    good, weights = path.read_text(), "adapter_model.safetensors"
    for entries, fact in (
            ({"base_model_name_or_path": None}, "adapter_config.json"),
            ({"base_model_name_or_path": "/no/such/model"}, "/no/such/model"),
            ({"base_model_name_or_path": "~/no/such/model"}, "~/no/such/model"),
            ({"peft_type": "PREFIX_TUNING"}, "peft_type"),
            ({"use_dora": True}, "use_dora"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"target_modules": "(a+)+$"}, "target_modules"),
            ({"r": 10**9}, "r or lora_alpha"),
            ({"r": 4}, str(folder)),
            ({"init_lora_weights": "pissa"}, "init_lora_weights"),  # it changes base weights too
            ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
            ({"use_qalora": True}, "use_qalora"),
            ({"an_option_of_tomorrow": "on"}, "an_option_of_tomorrow"),
            ({"target_modules": ["q_proj", "lm_head"]}, "embeddings"),
            ({"target_modules": ["q_proj"]}, str(folder)),
            # an adapter of itself would be followed forever
            ({"base_model_name_or_path": str(folder)}, str(folder))):
        path.write_text(json.dumps(json.loads(good) | entries))
        try:
            load(folder)
        except UserError as error:
            if fact in str(error) and "\n" not in str(error):
                continue
            wrong.append((entries, fact, str(error)))
        else:
            wrong.append((entries, "loaded"))
    assert not wrong
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match="adapter_config.json"):
        load(folder)
    path.write_text(good)
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight":
               torch.zeros(3, 5)}, folder / weights)  # another model's sizes
    with pytest.raises(UserError, match="adapter"):
        load(folder)


def test_the_commit_of_a_hub_model_stays_with_its_adapter(adapter):
    """A pinned base is loaded again, and not the newest of its name."""
    policy, folder = adapter
    remember_base(policy.model, "someone/model", "c0ffee")
    policy.save(folder)
    assert unfold(str(folder)) == ([folder], "someone/model", "c0ffee")


def test_no_pickle_of_an_adapter_is_opened(adapter, tmp_path):
    """PEFT falls back to adapter_model.bin; here safetensors are read, or nothing."""
    folder, ran = adapter[1], tmp_path / "ran"
    torch.save(Pickled(ran), folder / "adapter_model.bin")
    load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load(folder)
    assert not ran.exists()


def test_merging_what_is_not_an_adapter(policy, tmp_path, adapter):
    """A run with whole weights, an empty folder, and a folder that already exists."""
    policy.save(tmp_path / "run" / "checkpoint" / "final")
    (tmp_path / "empty").mkdir()
    for folder, out, fact in ((tmp_path / "run", "new", "run/checkpoint/final"),
                              (tmp_path / "empty", "new", "empty"),
                              (adapter[1], "empty", "empty")):
        with pytest.raises(UserError, match=fact):
            merge(folder, tmp_path / out)
    assert not (tmp_path / "new").exists() and not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_run_leaves_a_model_card_and_a_model_that_loads(results, monkeypatch, kind, tmp_path):
    """From the manifest: base, checksum, data, changed settings, scores, commit, license."""
    monkeypatch.setenv("HYBRIDRL_SMOKE", "1")
    folder = run("sft", "tiny", 0, "card", ("data.train_limits=[2]", "data.test_limits=[3]",
                                            "sft.learning_rate=3e-4", f"model.adapter={kind}",
                                            "evaluation.samples=0", "evaluation.train_samples=0",
                                            "probe.samples=2", "probe.prompts=1"))
    manifest, final = folder.read("manifest.json"), folder.path / "checkpoint" / "final"
    text = (final / "README.md").read_text(encoding="utf-8")
    for words in ("license: mit", manifest["model"]["sha256"], "tiny_word", "| 3 |",
                  "95 % interval", "sft.learning_rate: 0.0002 -> 0.0003", "seed 0",
                  manifest["git_commit"] or "unknown"):
        assert words in text, words
    assert ("library_name: peft" in text) == (kind == "lora")
    memory = manifest["memory"]
    assert memory["measured_peak"] > 0 and memory["estimated_peak"] > 0
    assert memory["micro_batch_tokens"] == 1024 and manifest["updates_not_finite"] == 0
    again = load(final)
    if kind == "lora":
        merge(folder.path, tmp_path / "whole")
        assert "library_name: transformers" in (tmp_path / "whole" / "README.md").read_text()
        assert json.loads((final / "adapter_config.json").read_text())[
            "base_model_name_or_path"] == "tiny"
        assert torch.equal(scores_of(load(tmp_path / "whole")), scores_of(again))
