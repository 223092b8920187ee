"""The policy: loading and refusing, the reference, adapters, precision, saving."""

import copy
import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import distance
from transformers import AutoModelForCausalLM
from transformers import modeling_gguf_pytorch_utils as reader
from transformers.utils.logging import disable_progress_bar

from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.policy.device import choose_device, choose_precision
from hybridrl_lib.policy.loading import _load_tokenizer, load_policy
from hybridrl_lib.policy.packing import PromptCompletion, pack
from hybridrl_lib.policy.prompts import prompt_text
from hybridrl_lib.policy.sampling import sample
from hybridrl_lib.system.errors import UserError


def packed_for(policy):
    batch, = pack([PromptCompletion([5, 6, 7], [8, 9, 10, policy.eos_id]),
                   PromptCompletion([5, 6, 7], [11, policy.eos_id])], 1000, policy.pad_id)
    return batch


def scores_of(policy, model=None):
    with torch.no_grad():
        return policy.score(packed_for(policy), model=model)[0]


def move(policy, size=0.05, seed=5):
    """Changes every weight that training would change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(size * torch.randn(weight.shape, generator=generator))


def gradient_of(policy):
    policy.model.zero_grad()
    scores, entropies = policy.score(packed_for(policy))
    (scores.sum() + 0.1 * entropies.sum()).backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad])


def copy_of(folder, target, without=(), **config):
    """A copy of a model folder with files left out and entries of config.json changed."""
    shutil.copytree(folder, target)
    for name in without:
        (target / name).unlink()
    if config:
        path = target / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


# The reference ------------------------------------------------------------------------------------


def test_the_reference_stays_when_the_policy_moves(policy):
    """The KL anchor is a frozen copy: an update changes the policy and not the reference."""
    before = scores_of(policy)
    policy.keep_reference()
    move(policy)
    with policy.reference() as reference:
        assert torch.equal(scores_of(policy, reference), before)
        assert not any(p.requires_grad for p in reference.parameters())
    assert (scores_of(policy) - before).abs().max() > 0.01


def test_with_an_adapter_the_reference_is_the_model_without_it(make_policy):
    """Nothing is copied, and the adapter is on again after the block."""
    base = scores_of(make_policy())
    policy = make_policy(adapter="lora")
    torch.testing.assert_close(scores_of(policy), base), "a fresh adapter adds nothing"
    policy.keep_reference()
    move(policy)
    moved = scores_of(policy)
    with policy.reference() as reference:
        torch.testing.assert_close(scores_of(policy, reference), base)
    assert (moved - base).abs().max() > 0.01
    assert torch.equal(scores_of(policy), moved)


def test_a_reference_that_was_not_kept_is_an_error(policy):
    """Better no KL than one to a policy that has moved."""
    with pytest.raises(RuntimeError, match="keep_reference"), policy.reference():
        pass


# Adapters -----------------------------------------------------------------------------------------


def test_merged_adapter_equals_unmerged(make_policy):
    """In fp32 the adapter outside of the weights and inside them is the same model."""
    for architecture in ("qwen2", "llama"):
        policy = make_policy(architecture, adapter="lora")
        move(policy)
        merged = copy.deepcopy(policy.model).merge_and_unload()
        torch.testing.assert_close(scores_of(policy, merged), scores_of(policy), atol=1e-5,
                                   rtol=1e-5)


def test_only_the_adapter_is_trained(make_policy):
    """LoRA moves its own weights and no others."""
    policy = make_policy(adapter="lora", lora_rank=2)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert sum(p.numel() for p in policy.model.parameters() if p.requires_grad) < (
        0.2 * policy.parameter_count())


def test_an_adapter_starts_from_the_same_weights_every_time(make_policy):
    """One seed repeats, with LoRA too, whatever random numbers were drawn before."""
    torch.manual_seed(1)
    one = make_policy(adapter="lora")
    torch.rand(7)
    before = torch.get_rng_state()
    two = make_policy(adapter="lora")
    assert torch.equal(torch.get_rng_state(), before), "and loading draws none"
    for (name, first), (_, second) in zip(one.model.named_parameters(),
                                          two.model.named_parameters(), strict=True):
        assert torch.equal(first, second), name


def test_adapter_targets(make_policy):
    """A layer that this architecture lacks is ignored, unless none is left. Adapters on words are
    refused: scores and sampler read these weights directly, so they would have no effect."""
    make_policy(adapter="lora", lora_targets=("q_proj", "c_attn"))
    with pytest.raises(UserError, match="lora_targets"):
        make_policy(adapter="lora", lora_targets=("c_attn",))
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(UserError, match=target):
            make_policy(adapter="lora", lora_targets=("q_proj", target))


# Gradient checkpointing ---------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient(make_policy):
    """It trades time for memory and nothing else; sampling leaves it on."""
    for adapter in ("none", "lora"):
        plain, saving = (make_policy(adapter=adapter, gradient_checkpointing=on)
                         for on in (False, True))
        assert torch.equal(scores_of(plain), scores_of(saving))
        assert distance(gradient_of(saving), gradient_of(plain)) < 1e-6
        sample(saving, [[5, 6]], samples=2, max_new_tokens=3, temperature=1.0)
        assert saving.model.training


def test_dropout_is_off(model_folders, tmp_path):
    """The sampled and the trained policy are the same: no dropout in any pass."""
    folder = copy_of(model_folders["qwen2"], tmp_path / "model", attention_dropout=0.5)
    policy = load_policy(ModelSettings(path=str(folder), device="cpu"))
    packed = packed_for(policy)
    assert torch.equal(policy.score(packed)[0], policy.score(packed)[0])
    with pytest.raises(UserError, match="dropout"):
        load_policy(ModelSettings(path=str(folder), device="cpu", gradient_checkpointing=True))


# Text ---------------------------------------------------------------------------------------------


def test_a_demonstration_ends_with_one_eos(policy):
    """SFT teaches to stop: the solution, then EOS, once, and only there."""
    ids = policy.encode_completion(r"First 2 + 3 = 5. So \boxed{5}.")
    assert ids[-1] == policy.eos_id and ids.count(policy.eos_id) == 1
    assert policy.decode(ids) == r"First 2 + 3 = 5. So \boxed{5}."


def test_prompt_and_completion_join_without_a_seam(policy):
    """The tokens of prompt and solution are those of the whole text: no token spans both."""
    question, solution = "How many?", r"First 2 + 3 = 5. So \boxed{5}."
    whole = policy.tokenizer(prompt_text(policy.tokenizer, question) + solution,
                             add_special_tokens=False)["input_ids"]
    assert policy.encode_prompt(question) + policy.encode_completion(solution)[:-1] == whole


# Precision and device -----------------------------------------------------------------------------


def test_precision_follows_the_device(monkeypatch):
    """fp32 on a CPU, bf16 where the GPU has it, fp32 on a T4 (no bf16); a choice is kept."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_precision("auto", cpu) == "fp32"
    assert choose_precision("fp16", cpu) == "fp16"
    for capability, precision in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choose_precision("auto", gpu) == precision
        if capability < (8, 0):  # torch would imitate it, slower than fp32
            with pytest.raises(UserError, match="8.0.*7.5"):
                choose_precision("bf16", gpu)
        else:
            assert choose_precision("bf16", gpu) == "bf16"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    """model.device=cuda on a machine without one is an error, not a fallback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="model.device"):
        choose_device("cuda")


def test_bf16_keeps_weights_and_scores_in_fp32(model_folders):
    """Low precision is for the matrix products: weights, log-probabilities, entropies are fp32."""
    policies = [load_policy(ModelSettings(path=str(model_folders["qwen2"]), device="cpu",
                                          precision=precision)) for precision in ("fp32", "bf16")]
    exact, rough = (scores_of(policy) for policy in policies)
    assert all(p.dtype == torch.float32 for p in policies[1].model.parameters())
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.2
    gradient_of(policies[1])
    group, = sample(policies[1], [[5, 6, 7]], samples=4, max_new_tokens=6, temperature=1.0)
    batch, = pack([PromptCompletion([5, 6, 7], c.token_ids) for c in group.completions], 1000)
    with torch.no_grad():
        trained = policies[1].score(batch)[0]
    sampled = torch.tensor([x for c in group.completions for x in c.log_probabilities])
    assert (trained - sampled).abs().max() < 0.2


# Disk ---------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same_policy(policy, tmp_path):
    """A trained model is an ordinary model folder, safetensors only."""
    move(policy)
    policy.save(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    again = load_policy(ModelSettings(path=str(tmp_path / "saved"), device="cpu"))
    assert torch.equal(scores_of(again), scores_of(policy))
    assert (again.stop_ids, again.pad_id) == (policy.stop_ids, policy.pad_id)


def test_a_policy_knows_what_it_was_loaded_from(policy, model_folders):
    """For the manifest: the folder's name, without a path of this machine, and a checksum."""
    weights = (model_folders["qwen2"] / "model.safetensors").read_bytes()
    assert policy.sha256 == hashlib.sha256(weights).hexdigest()
    assert policy.name == "qwen2"


def test_code_in_a_model_folder_is_not_run(model_folders, tmp_path):
    """trust_remote_code is off: a folder that needs its own code is refused, the code not run."""
    folder = copy_of(model_folders["qwen2"], tmp_path / "model", model_type="mine",
                     auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"})
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(UserError):
        load_policy(ModelSettings(path=str(folder), device="cpu"))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(policy, model_folders, tmp_path):
    """A pickle can run anything: a folder with pytorch_model.bin alone is refused."""
    folder = copy_of(model_folders["qwen2"], tmp_path / "model", without=["model.safetensors"])
    torch.save(policy.model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_policy(ModelSettings(path=str(folder), device="cpu"))


def broken_folders(model_folders, root):
    """{folder: the fact that its error names}."""
    good = model_folders["qwen2"]
    (root / "empty").mkdir()
    (root / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x10")
    weights = copy_of(good, root / "cut weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    no_eos = copy_of(good, root / "no eos") / "tokenizer_config.json"
    content = json.loads(no_eos.read_text())
    content.pop("eos_token")
    no_eos.write_text(json.dumps(content))
    return {
        root / "empty": "config.json", root / "nowhere": "model.path",
        copy_of(good, root / "bare", ["tokenizer.json", "tokenizer_config.json"]): "tokenizer",
        no_eos.parent: "eos_token", root / "cut weights": "safetensors",
        root / "cut.gguf": "cut.gguf", root / "nowhere.gguf": "nowhere.gguf",
        "nobody/nothing": "nobody/nothing",
        # a model with another output layer would be loaded with random numbers in its place
        copy_of(good, root / "classifier", architectures=["Qwen2ForSequenceClassification"]):
            "Qwen2ForSequenceClassification",
        copy_of(good, root / "t5", model_type="t5", architectures=["T5ForConditionalGeneration"]):
            "T5ForConditionalGeneration",
        copy_of(good, root / "other", model_type="mine"): "'mine'",
    }


def test_models_that_cannot_be_loaded(model_folders, tmp_path):
    """Each is an error in one line that names the model or what is wrong with it."""
    wrong = []
    for path, fact in broken_folders(model_folders, tmp_path).items():
        try:
            load_policy(ModelSettings(path=str(path), device="cpu"))
        except UserError as error:
            if fact in str(error) and "\n" not in str(error):
                continue
            wrong.append((path, fact, str(error)))
        else:
            wrong.append((path, "loaded"))
    assert not wrong


def test_weights_that_are_missing_are_not_made_up(model_folders, tmp_path):
    """transformers fills them with random numbers and a warning, and continues."""
    folder = copy_of(model_folders["llama"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert gone is not None
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load_policy(ModelSettings(path=str(folder), device="cpu"))


def test_no_bar_of_a_gguf_file_where_bars_are_off(model_folders, monkeypatch, capsys):
    """It filled logs with hundreds of lines: transformers' switch does not reach this bar."""
    disable_progress_bar()
    load = AutoModelForCausalLM.from_pretrained

    def load_with_bar(*arguments, **options):
        assert list(reader.tqdm(range(3), desc="Converting")) == [0, 1, 2]
        return load(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_with_bar)
    load_policy(ModelSettings(path=str(model_folders["qwen2"]), device="cpu"))
    assert "Converting" not in capsys.readouterr().err


def test_a_missing_chat_template_is_noted(model_folders):
    """The user may have chosen a base model, or lost the template: both get plain text. For the
    shipped model it is expected."""
    said = []
    load_policy(ModelSettings(path=str(model_folders["qwen2"]), device="cpu"), said.append)
    assert len(said) == 1 and "qwen2" in said[0] and "chat template" in said[0]
    load_policy(ModelSettings(path="tiny", device="cpu"), said.append)
    assert len(said) == 1


@pytest.mark.real_model
def test_the_sampler_computes_a_pretrained_model():
    """On real weights: log-probabilities as trained (1e-3 nats, fp32), greedy as generate()."""
    policy = load_policy(ModelSettings(path=os.environ["HYBRIDRL_TEST_MODEL"], device="cpu",
                                       precision="fp32"))
    prompts = [policy.encode_prompt(q) for q in ("What is 3 + 4?", "Ann has 3 apples and eats one. "
                                                 "How many apples does she have now?")]
    groups = sample(policy, prompts, samples=2, max_new_tokens=12, temperature=1.0)
    batch = pack([PromptCompletion(g.prompt_ids, c.token_ids)
                  for g in groups for c in g.completions], 4096)
    with torch.no_grad():
        trained = torch.cat([policy.score(packed)[0] for packed in batch])
    order = torch.cat([packed.sequence for packed in batch]).unique_consecutive().tolist()
    completions = [c for g in groups for c in g.completions]
    sampled = torch.tensor([x for i in order for x in completions[i].log_probabilities])
    torch.testing.assert_close(sampled, trained, atol=1e-3, rtol=1e-3)
    for prompt, group in zip(prompts, sample(policy, prompts, samples=1, max_new_tokens=12,
                                             temperature=0.0), strict=True):
        theirs = policy.model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
            do_sample=False, max_new_tokens=12, repetition_penalty=1.0,
            pad_token_id=policy.pad_id, eos_token_id=list(policy.stop_ids))
        assert group.completions[0].token_ids == theirs[0, len(prompt):].tolist()


def test_padding_that_ends_answers_is_noted(model_folders, tmp_path, caplog):
    """Where a run says everything else, with the model's name; not by logging."""
    folder = copy_of(model_folders["qwen2"], tmp_path / "endless")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("unk_token")
    text = (folder / "tokenizer.json").read_text().replace(config["pad_token"], "<|nothing|>")
    (folder / "tokenizer.json").write_text(text)
    config["pad_token"] = config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    said = []
    policy = load_policy(ModelSettings(path=str(folder), device="cpu"), said.append)
    assert policy.pad_id == policy.eos_id
    assert "endless" in said[-1] and "padding" in said[-1] and len(said) == 2
    assert not [record for record in caplog.records if record.name.startswith("hybridrl_lib")]


def test_no_eos_says_what_helps_there(monkeypatch):
    """A GGUF file has no tokenizer_config.json, and a hub model must be downloaded to edit it."""
    loaded = type("Tokenizer", (), {"__call__": lambda self, text: {"input_ids": [1]},
                                    "eos_token_id": None})()
    monkeypatch.setattr("hybridrl_lib.policy.loading.AutoTokenizer.from_pretrained",
                        lambda *a, **more: loaded)
    said = []
    for path, arguments in (("model.gguf", {"gguf_file": "model.gguf"}), ("someone/model", {}),
                            (".", {})):
        with pytest.raises(UserError, match=path.replace(".", r"\.")) as caught:
            _load_tokenizer("nowhere", arguments, path)
        said.append(("tokenizer_config.json" in str(caught.value), str(caught.value)))
    assert [named for named, _ in said] == [False, True, True]
    assert len({sentence for _, sentence in said}) == 3
