"""No code comes in with a model, data, settings or a checkpoint: each attack is tried.

The payloads of `hostile.py` would create a file if they were run. What SECURITY.md promises about
them names this file.
"""

import json
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hostile import Pickled, python_code, template_escapes

from hybridrl_lib.cli import explain
from hybridrl_lib.config import presets as config
from hybridrl_lib.config.presets import load_settings, settings_from_dict
from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.problems import gsm8k, math500
from hybridrl_lib.problems.source import load_rows
from hybridrl_lib.records.files import sha256_of
from hybridrl_lib.rewards.verifier import Verifier
from hybridrl_lib.system.errors import UserError
from hybridrl_lib.system.paths import tiny_model_folder
from hybridrl_lib.training.checkpoints import CHECKSUMS, read_checksums

ROOT = Path(__file__).parents[2]


@pytest.fixture()
def trace(tmp_path):
    """A file that no attack may create."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "the payload was run"


@pytest.fixture()
def folder(model_folders, tmp_path):
    """A model folder of the test's own, whole and harmless so far."""
    return Path(shutil.copytree(model_folders["qwen2"], tmp_path / "model"))


def change(path: Path, **entries) -> None:
    """Sets entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def load(path: Path):
    return load_policy(ModelSettings(path=str(path), device="cpu"))


def sentence_of(path: Path) -> str:
    """What a user reads who names this model: one sentence."""
    with pytest.raises(UserError) as caught:
        load(path)
    code, sentence = explain(caught.value)
    assert code == 1 and sentence.endswith(".") and "\n" not in str(caught.value)
    return sentence


# Models -----------------------------------------------------------------------------------------


def test_the_payloads_work(tmp_path):
    """Without this every test below could pass because its attack is a dud."""
    pickle.loads(pickle.dumps(Pickled(tmp_path / "pickle"))).close()
    exec(python_code(tmp_path / "code"))
    torch.save(Pickled(tmp_path / "torch"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False).close()
    assert all((tmp_path / name).exists() for name in ("pickle", "code", "torch"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pkl", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused(folder, trace, name):
    """A pickle runs what it likes: a folder with nothing else is refused, whatever its name."""
    (folder / "model.safetensors").unlink()
    torch.save(Pickled(trace), folder / name)
    assert "safetensors" in sentence_of(folder)


def test_pickles_beside_safetensors_are_not_opened(folder, trace):
    """Many real folders hold both kinds: the safe one is read, the other left alone."""
    torch.save(Pickled(trace), folder / "pytorch_model.bin")
    (folder / "vocab.pkl").write_bytes(pickle.dumps(Pickled(trace)))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Pickled(trace)))
    load(folder)


@pytest.mark.parametrize("shard", ["evil.bin", "../evil.safetensors", "/tmp/evil.safetensors"])
def test_an_index_names_safetensors_of_its_own_folder_only(folder, trace, shard):
    """The list of shards is a file too: it cannot point to a pickle or out of the folder."""
    (folder / "model.safetensors").unlink()
    torch.save(Pickled(trace), folder / "evil.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {"model.norm.weight": shard}}))
    assert "files of the same folder" in sentence_of(folder)


def test_config_cannot_name_a_pickle(folder, trace):
    """transformers_weights in config.json picks the file of the weights."""
    torch.save(Pickled(trace), folder / "evil.bin")
    change(folder / "config.json", transformers_weights="evil.bin")
    assert "safetensors" in sentence_of(folder)


def test_an_adapter_does_not_redirect_the_model(folder, trace, tmp_path):
    """adapter_config.json would have another model loaded, and an adapter that may be a pickle."""
    (folder / "adapter_config.json").write_text(json.dumps(
        {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}))
    torch.save(Pickled(trace), folder / "adapter_model.bin")
    assert "adapter" in sentence_of(folder)


CODE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model",
        "AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"]}


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_config_is_not_run(folder, trace, known):
    """auto_map names classes in the folder: a known architecture is loaded without them, another
    one is refused in a sentence."""
    (folder / "mine.py").write_text(python_code(trace))
    change(folder / "config.json", auto_map=CODE, **({} if known else {"model_type": "mine"}))
    if known:
        load(folder)
    else:
        assert "trust_remote_code" not in sentence_of(folder), "an option that there is not"


@pytest.mark.parametrize("named", ["Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_code_beside_a_tokenizer_is_not_run(folder, trace, named):
    """The same for auto_map in tokenizer_config.json, with a class that there is or is not."""
    (folder / "mine.py").write_text(python_code(trace))
    change(folder / "tokenizer_config.json", auto_map=CODE, tokenizer_class=named)
    try:
        load(folder)
    except UserError:
        sentence_of(folder)


@pytest.mark.parametrize("kind", template_escapes(Path("x")))
def test_chat_templates_stay_in_their_sandbox(folder, trace, kind):
    """A chat template is a program: one that reaches for more is refused when it is loaded."""
    (folder / "chat_template.jinja").write_text(template_escapes(trace)[kind])
    try:
        policy = load(folder)
    except UserError:
        assert "chat template" in sentence_of(folder)
    else:  # Jinja put nothing in the place of what it would not give
        assert "class" not in policy.tokenizer.decode(policy.encode_prompt("1 + 1"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation",
                                 "_attn_implementation_internal"])
def test_kernels_of_a_config_are_not_fetched(folder, key):
    """A config may name code on the hub, and trust_remote_code does not keep it out."""
    change(folder / "config.json", text_config={key: "kernels-community/mine"})
    assert "kernels-community/mine" in sentence_of(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json",
                                  "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"{", b'{"model_type": 3}', b""])
def test_broken_files_of_a_model(folder, name, content):
    """Nonsense in any file of a model folder: a sentence or a policy, never a traceback."""
    (folder / name).write_bytes(content)
    try:
        load(folder)
    except UserError:
        assert "model" in sentence_of(folder)


# GGUF -------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(tensors: int, entries: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


MALFORMED = {
    "empty": b"",
    "web page": b"<html>not found</html>" * 9,
    "cut off": header(1, 1)[:9],
    "big-endian version": header(1, 1, version=3 << 24),
    "version of the future": header(0, 0, version=99),
    "no entries at all": header(0, 0),
    "more entries than bytes": header(1, 2**62),
    "more tensors than bytes": header(2**62, 0),
    "endless text": header(0, 1) + struct.pack("<Q", 2**62) + b"x" * 64,
    "unknown type": header(0, 1) + text(b"general.architecture") + struct.pack("<I", 99),
    "endless list": header(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 4, 2**62),
    "lists in lists": header(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1) * 5_000,
    "no text of UTF-8": header(0, 1) + text(b"\xff\xfe") + struct.pack("<I", 8) + text(b"\xff"),
    "unknown architecture": (header(0, 1) + text(b"general.architecture")
                             + struct.pack("<I", 8) + text(b"__import__('os')")),
    "tensor behind the end": (header(1, 0) + text(b"token_embd.weight")
                              + struct.pack("<IQIQ", 1, 2**40, 0, 2**50)),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_gguf(tmp_path, kind):
    """Sizes and types in a GGUF file are anyone's: one sentence, no memory for 2^62 entries."""
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(MALFORMED[kind])
    assert "model.gguf" in sentence_of(file)


def test_code_beside_a_gguf_file_is_not_run(tmp_path, trace):
    """The folder of a GGUF file is a folder of downloads: nothing else in it is believed."""
    pytest.importorskip("gguf")
    (tmp_path / "mine.py").write_text(python_code(trace))
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"auto_map": CODE, "model_type": "mine",
                                                 "tokenizer_class": "Tokenizer"}))
    (tmp_path / "model.gguf").write_bytes(MALFORMED["no entries at all"])
    sentence_of(tmp_path / "model.gguf")


# Checkpoints ------------------------------------------------------------------------------------


def forge(trainer, name: str, write) -> Path:
    """Replaces a file of the newest checkpoint, and its checksum with it, as an attacker would."""
    _, checkpoint = trainer.checkpoints.found()[0]
    write(checkpoint / name)
    checksums = read_checksums(checkpoint)
    checksums["files"][name] = sha256_of(checkpoint / name)
    (checkpoint / CHECKSUMS).write_text(json.dumps(checksums))
    return checkpoint


def test_a_pickle_in_a_checkpoint_is_not_run(make_trainer, trace):
    """optimizer.pt is torch's format, which is a pickle: it is read as tensors only, and whatever
    is no checkpoint of this project is a sentence."""
    trainer = make_trainer("sft", "training.checkpoint_every=2")
    trainer.train()
    forge(trainer, "optimizer.pt", lambda path: torch.save(Pickled(trace), path))
    with pytest.raises(UserError, match="optimizer.pt .*more than tensors") as caught:
        make_trainer("sft", "training.checkpoint_every=2").train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["optimizer.pt", "state.json", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04]"])
def test_forged_checkpoint(make_trainer, name, content):
    """A checkpoint that its checksums call whole and nobody can read is named, with what to do."""
    trainer = make_trainer("sft", "training.checkpoint_every=2")
    trainer.train()
    checkpoint = forge(trainer, name, lambda path: path.write_bytes(content))
    with pytest.raises(UserError, match=f"checkpoint {checkpoint.name}"):
        make_trainer("sft", "training.checkpoint_every=2").train()


# YAML -------------------------------------------------------------------------------------------


def yaml_attack(trace: Path) -> str:
    return f"!!python/object/apply:os.system ['touch {trace}']"


def test_python_tags_in_settings_are_not_run(trace):
    """`--set` and a notebook's `settings` are read as YAML: only plain values are."""
    for key in ("rl.beta", "rl.group_size", "data.benchmarks", "training.epochs", "model.path",
                "model.revision", "model.gradient_checkpointing"):
        attack = f"{key}={yaml_attack(trace)}"
        if key in ("model.path", "model.revision"):  # texts, which are not read as YAML at all
            load_settings("tiny", [attack])
        else:
            with pytest.raises(UserError, match=key):
                load_settings("tiny", [attack])


def test_python_tags_in_a_preset_are_not_run(trace, tmp_path, monkeypatch):
    """A preset is a file that people pass on."""
    monkeypatch.setattr(config, "PRESET_FOLDER", tmp_path)
    config.read_preset.cache_clear()
    (tmp_path / "tiny.yaml").write_text(f"rl:\n  beta: {yaml_attack(trace)}\n")
    try:
        with pytest.raises(UserError, match="tiny.yaml"):
            load_settings("tiny")
    finally:
        config.read_preset.cache_clear()


def test_python_tags_in_a_record_are_not_run(trace):
    """The settings of somebody's config.json are data as well."""
    with pytest.raises(UserError, match="rl.beta"):
        settings_from_dict({"rl": {"beta": yaml_attack(trace)}})


# Data and answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [gsm8k.SOURCE, math500.SOURCE], ids=["gsm8k", "math500"])
def test_scripts_and_pickles_in_a_data_folder_are_not_read(tmp_path, monkeypatch, trace, source):
    """Only JSON lines are read, as text: a loading script or a pickle is no data set."""
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(tmp_path))
    (tmp_path / source.folder).mkdir()
    for name in (source.folder, "dataset", *source.splits):
        (tmp_path / source.folder / f"{name}.py").write_text(python_code(trace))
        (tmp_path / source.folder / f"{name}.pkl").write_bytes(pickle.dumps(Pickled(trace)))
    with pytest.raises(UserError, match="jsonl"):
        load_rows(source)
    for split in source.splits:
        (tmp_path / source.folder / f"{split}.jsonl").write_bytes(pickle.dumps(Pickled(trace)))
    with pytest.raises(UserError, match="JSON"):
        load_rows(source)


def test_a_folder_named_like_a_hub_data_set_is_not_run(tmp_path, monkeypatch, trace):
    """`datasets` looks for a folder openai/gsm8k where it stands before it asks the hub."""
    monkeypatch.delenv("HYBRIDRL_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / gsm8k.SOURCE.path
    folder.mkdir(parents=True)
    (folder / "gsm8k.py").write_text(python_code(trace))
    (folder / "train.pkl").write_bytes(pickle.dumps(Pickled(trace)))
    with pytest.raises(UserError):
        load_rows(gsm8k.SOURCE)


def test_an_answer_is_not_evaluated(trace):
    """A parser of formulas that calls eval() would run what a model answers."""
    code = f"__import__('pathlib').Path('{trace}').touch()"
    answers = [code, rf"\text{{{code}}}", f"open('{trace}','w')", rf"\frac{{{code}}}{{2}}",
               f"x.__class__.__base__.__subclasses__() + {code}", rf"\left\{{{code}\right\}}",
               rf"\mathrm{{{code}}}=5", f"5, {code}", f"[5, {code})"]
    with Verifier() as verifier:
        for gold in ("5", r"\frac{x}{2}"):
            texts = [rf"\boxed{{{answer}}}" for answer in answers] + answers
            verifier.verify([gold] * len(texts), texts, [True] * len(texts))
            assert verifier.counts["worker_restarts"] == 0, "each was parsed, to its end"


def test_the_shipped_model_holds_no_code():
    """What everybody loads first: JSON, text and safetensors."""
    assert {path.suffix for path in tiny_model_folder().rglob("*") if path.is_file()} <= {
        ".json", ".safetensors", ".md", ".jinja", ".txt"}


def test_every_reader_in_the_code_is_a_safe_one():
    """A new torch.load, YAML loader or eval() comes in with the safe choice, or not at all."""
    for path in (ROOT / "hybridrl_lib").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        for word in ("pickle", "yaml.load(", "yaml.unsafe_load", "yaml.full_load", "marshal",
                     "shelve", "joblib", "allow_pickle=True", "weights_only=False",
                     "trust_remote_code=True", "shell=True", "os.system"):
            assert f"import {word}" not in code and (word == "pickle" or word not in code), path
        for line in code.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, (path, line)


def test_every_test_that_is_promised_exists():
    """SECURITY.md names what holds its promises: a renamed test would leave it an empty word."""
    promised = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`(tests/\w+\.py)`", promised))
    own = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_trust*.py")}
    assert own < files and all((ROOT / name).is_file() for name in files)
    defined = {name for file in files for name in re.findall(
        r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)}
    names = set(re.findall(r"`(test_\w+)`", promised))
    assert len(names) > 5 and names <= defined
    for target in re.findall(r"`make ([\w-]+)`", promised):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), target
