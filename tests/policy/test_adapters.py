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
    """A few per cent of the model, in safetensors, with the tokenizer beside it."""
    policy, folder = adapter
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_an_adapter_folder_loads_on_its_base(adapter, make_policy):
    """model.path=<adapter folder>: rank, alpha and base are what the folder says."""
    policy, folder = adapter
    again = load(folder)
    torch.testing.assert_close(scores_of(again), scores_of(policy), atol=1e-5, rtol=1e-5)
    assert (scores_of(again) - scores_of(make_policy())).abs().max() > 0.01
    assert again.name == "adapter" and again.sha256 not in ("", policy.sha256)
    assert not any("lora" in name for name, _ in again.model.named_parameters())


def test_a_run_goes_on_from_an_adapter_with_another_one(adapter, tmp_path):
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


@pytest.mark.parametrize(("entries", "words"), [
    ({"base_model_name_or_path": None}, "does not say which model"),
    ({"base_model_name_or_path": "/no/such/model"}, "/no/such/model"),
    ({"base_model_name_or_path": "~/no/such/model"}, "is not there"),
    ({"peft_type": "PREFIX_TUNING"}, "peft_type"),
    ({"use_dora": True}, "use_dora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"target_modules": "(a+)+$"}, "target_modules"),
    ({"r": 10**9}, "target_modules, r or lora_alpha"),
    ({"r": 4}, "cannot be added"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),  # it changes the base weights too
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"an_option_of_tomorrow": "on"}, "an_option_of_tomorrow"),
    ({"target_modules": ["q_proj", "lm_head"]}, "embeddings"),
    ({"target_modules": ["q_proj"]}, "cannot be added"),
])
def test_an_adapter_that_cannot_be_used_is_one_sentence(adapter, entries, words):
    """Another kind of adapter, another model's, or one whose base is not there."""
    change(adapter[1], **entries)
    with pytest.raises(UserError, match="(?s)") as caught:
        load(adapter[1])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_commit_of_a_hub_model_stays_with_its_adapter(adapter):
    """A pinned base is loaded again, and not the newest of its name."""
    policy, folder = adapter
    remember_base(policy.model, "someone/model", "c0ffee")
    policy.save(folder)
    assert unfold(str(folder)) == ([folder], "someone/model", "c0ffee")


def test_a_configuration_nested_without_end_is_one_sentence(adapter):
    (adapter[1] / "adapter_config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="adapter_config.json of .* cannot be read"):
        load(adapter[1])


def test_an_adapter_of_itself_is_refused(adapter):
    """A folder that names itself would be looked into for ever."""
    change(adapter[1], base_model_name_or_path=str(adapter[1]))
    with pytest.raises(UserError, match="of itself"):
        load(adapter[1])


def test_no_pickle_of_an_adapter_is_opened(adapter, tmp_path):
    """PEFT falls back to adapter_model.bin; here safetensors are read, or nothing."""
    folder, ran = adapter[1], tmp_path / "ran"
    torch.save(Pickled(ran), folder / "adapter_model.bin")
    load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="only safetensors"):
        load(folder)
    assert not ran.exists()


def test_weights_of_another_model_are_refused(adapter):
    """An adapter of other sizes must not be half added."""
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight":
               torch.zeros(3, 5)}, adapter[1] / "adapter_model.safetensors")
    with pytest.raises(UserError, match="cannot be added"):
        load(adapter[1])


def test_merging_what_is_no_adapter(policy, tmp_path, adapter):
    """A run with whole weights, an empty folder, and a folder that is already there."""
    policy.save(tmp_path / "run" / "checkpoint" / "final")
    (tmp_path / "empty").mkdir()
    for folder, out, words in ((tmp_path / "run", "new", "whole already"),
                               (tmp_path / "empty", "new", "no adapter"),
                               (adapter[1], "empty", "already there")):
        with pytest.raises(UserError, match=words):
            merge(folder, tmp_path / out)


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
