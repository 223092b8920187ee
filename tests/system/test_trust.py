"""No code comes in with a model, data, settings, or a checkpoint: each attack is tried."""

import json
import pickle
import re
import shutil
import struct
from itertools import count
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
def new_folder(model_folders, tmp_path):
    """new_folder() -> another copy of a complete and harmless model folder."""
    numbers = count()
    return lambda: Path(shutil.copytree(model_folders["qwen2"],
                                        tmp_path / f"model-{next(numbers)}"))


@pytest.fixture()
def folder(new_folder):
    """One such folder."""
    return new_folder()


def change(path: Path, **entries) -> None:
    """Sets entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def load(path: Path):
    return load_policy(ModelSettings(path=str(path), device="cpu"))


def sentence_of(path: Path) -> str:
    """The one-sentence error for this model."""
    with pytest.raises(UserError) as caught:
        load(path)
        pytest.fail(f"{path} was loaded")
    code, sentence = explain(caught.value)
    assert code == 1 and sentence.endswith(".") and "\n" not in str(caught.value)
    return sentence


def test_the_payloads_work(tmp_path):
    """Without this, every test below could pass because its attack does nothing."""
    pickle.loads(pickle.dumps(Pickled(tmp_path / "pickle"))).close()
    exec(python_code(tmp_path / "code"))
    torch.save(Pickled(tmp_path / "torch"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False).close()
    assert all((tmp_path / name).exists() for name in ("pickle", "code", "torch"))


def test_pickled_weights_are_refused(new_folder, trace):
    """Folders that have only pickles, and configs that name the hub's code, are refused."""
    for name in ("pytorch_model.bin", "model.pkl", "model.pt", "model.ckpt"):
        folder = new_folder()
        (folder / "model.safetensors").unlink()
        torch.save(Pickled(trace), folder / name)
        assert "safetensors" in sentence_of(folder), name
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        folder = new_folder()
        change(folder / "config.json", text_config={key: "kernels-community/mine"})
        assert "kernels-community/mine" in sentence_of(folder), key


def test_pickles_next_to_safetensors_are_not_opened(folder, trace, tmp_path):
    """Pickles next to safetensors are ignored, whatever an adapter or a config says."""
    torch.save(Pickled(trace), folder / "pytorch_model.bin")
    (folder / "vocab.pkl").write_bytes(pickle.dumps(Pickled(trace)))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Pickled(trace)))
    load(folder)
    (folder / "adapter_config.json").write_text(json.dumps(
        {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}))
    torch.save(Pickled(trace), folder / "adapter_model.bin")
    assert "adapter" in sentence_of(folder)
    (folder / "adapter_config.json").unlink()
    torch.save(Pickled(trace), folder / "evil.bin")
    change(folder / "config.json", transformers_weights="evil.bin")
    assert "safetensors" in sentence_of(folder)


def test_an_index_names_safetensors_of_its_own_folder_only(folder, trace):
    """The list of shards is a file too: it cannot point to a pickle or out of the folder."""
    (folder / "model.safetensors").unlink()
    torch.save(Pickled(trace), folder / "evil.bin")
    for shard in ("evil.bin", "../evil.safetensors", "/tmp/evil.safetensors"):
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": {"model.norm.weight": shard}}))
        assert "model.safetensors.index.json" in sentence_of(folder), shard


CODE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model",
        "AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"]}


def test_code_next_to_a_config_is_not_run(folder, trace):
    """auto_map names classes in the folder."""
    (folder / "mine.py").write_text(python_code(trace))
    change(folder / "config.json", auto_map=CODE)
    load(folder)
    change(folder / "config.json", model_type="mine")
    assert "trust_remote_code" not in sentence_of(folder), "there is no such option here"


def test_code_next_to_a_tokenizer_is_not_run(folder, trace):
    """The same for auto_map in tokenizer_config.json, with known and unknown classes."""
    (folder / "mine.py").write_text(python_code(trace))
    for named in ("Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"):
        change(folder / "tokenizer_config.json", auto_map=CODE, tokenizer_class=named)
        try:
            load(folder)
        except UserError:
            sentence_of(folder)


def test_chat_templates_stay_in_their_sandbox(folder, trace):
    """A chat template is a program: one that reaches for more is refused when it is loaded."""
    for kind, template in template_escapes(trace).items():
        (folder / "chat_template.jinja").write_text(template)
        try:
            policy = load(folder)
        except UserError:
            assert "chat template" in sentence_of(folder), kind
        else:  # Jinja replaced what it refused by nothing
            assert "class" not in policy.tokenizer.decode(policy.encode_prompt("1 + 1")), kind


def test_broken_files_of_a_model(folder):
    """Nonsense in any file of a model folder: one sentence or a policy, never a traceback."""
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json",
                 "generation_config.json", "model.safetensors"):
        before = (folder / name).read_bytes() if (folder / name).exists() else b""
        for content in (b"[]", b"\xff\xfe", b"{", b'{"model_type": 3}', b""):
            (folder / name).write_bytes(content)
            try:
                load(folder)
            except UserError:
                assert folder.name in sentence_of(folder), (name, content)
        (folder / name).write_bytes(before)


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


def test_malformed_gguf(tmp_path, trace):
    """A GGUF file's sizes and types are anyone's, and nothing else in its folder is trusted."""
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    for kind, content in MALFORMED.items():
        file.write_bytes(content)
        assert "model.gguf" in sentence_of(file), kind
    pytest.importorskip("gguf")
    (tmp_path / "mine.py").write_text(python_code(trace))
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"auto_map": CODE, "model_type": "mine",
                                                 "tokenizer_class": "Tokenizer"}))
    (tmp_path / "model.gguf").write_bytes(MALFORMED["no entries at all"])
    sentence_of(tmp_path / "model.gguf")


def forge(trainer, name: str, write) -> Path:
    """Replaces a file of the newest checkpoint and its checksum, as an attacker would."""
    _, checkpoint = trainer.checkpoints.found()[0]
    write(checkpoint / name)
    checksums = read_checksums(checkpoint)
    checksums["files"][name] = sha256_of(checkpoint / name)
    (checkpoint / CHECKSUMS).write_text(json.dumps(checksums))
    return checkpoint


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_forged_checkpoint(make_trainer, trace, tmp_path):
    """A pickle in a checkpoint is not run; what cannot be read is named, checksums or not."""
    trainer = make_trainer("sft", "training.checkpoint_every=2")
    trainer.train()
    _, checkpoint = trainer.checkpoints.found()[0]
    torch.save(Pickled(trace), tmp_path / "pickle")
    for name in ("optimizer.pt", "state.json", "weights.safetensors"):
        before = (checkpoint / name).read_bytes()
        for content in ((tmp_path / "pickle").read_bytes(), b"", b"{}", b"\x80\x04]"):
            forge(trainer, name, lambda path, content=content: path.write_bytes(content))
            with pytest.raises(UserError, match=checkpoint.name) as caught:
                make_trainer("sft", "training.checkpoint_every=2").train()
                pytest.fail(f"{name} with {content} was read")
            assert "\n" not in str(caught.value)
            assert content[:2] != b"PK" or name != "optimizer.pt" or name in str(caught.value)
        forge(trainer, name, lambda path, before=before: path.write_bytes(before))
    again = make_trainer("sft", "training.checkpoint_every=2")
    again.train()
    assert again.resumed_from, "the files that were put back are read"


def yaml_attack(trace: Path) -> str:
    return f"!!python/object/apply:os.system ['touch {trace}']"


def test_python_tags_in_settings_are_not_run(trace):
    """`--set` and a notebook's `settings` are read as YAML, but only plain values are accepted."""
    for key in ("rl.beta", "rl.group_size", "data.benchmarks", "training.epochs", "model.path",
                "model.revision", "model.gradient_checkpointing"):
        attack = f"{key}={yaml_attack(trace)}"
        if key in ("model.path", "model.revision"):  # texts, which are not read as YAML at all
            load_settings("tiny", [attack])
        else:
            with pytest.raises(UserError, match=key):
                load_settings("tiny", [attack])


def test_python_tags_in_a_preset_are_not_run(trace, tmp_path, monkeypatch):
    """A preset is a file that people share."""
    monkeypatch.setattr(config, "PRESET_FOLDER", tmp_path)
    config.read_preset.cache_clear()
    (tmp_path / "tiny.yaml").write_text(f"rl:\n  beta: {yaml_attack(trace)}\n")
    try:
        with pytest.raises(UserError, match="tiny.yaml"):
            load_settings("tiny")
    finally:
        config.read_preset.cache_clear()


def test_python_tags_in_a_record_are_not_run(trace):
    """The settings in somebody's config.json are data as well."""
    with pytest.raises(UserError, match="rl.beta"):
        settings_from_dict({"rl": {"beta": yaml_attack(trace)}})


def test_scripts_and_pickles_in_a_data_folder_are_not_read(tmp_path, monkeypatch, trace):
    """Only JSON lines are read, as text: a loading script or a pickle is not a data set."""
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(tmp_path))
    for source in (gsm8k.SOURCE, math500.SOURCE):
        folder = tmp_path / source.folder
        folder.mkdir()
        for name in (source.folder, "dataset", *source.splits):
            (folder / f"{name}.py").write_text(python_code(trace))
            (folder / f"{name}.pkl").write_bytes(pickle.dumps(Pickled(trace)))
        with pytest.raises(UserError, match="jsonl"):
            load_rows(source)
        for split in source.splits:
            (folder / f"{split}.jsonl").write_bytes(pickle.dumps(Pickled(trace)))
        with pytest.raises(UserError, match="JSON"):
            load_rows(source)
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
            assert verifier.counts["worker_restarts"] == 0, "each was parsed to its end"


def test_every_reader_in_the_code_is_a_safe_one():
    """A new torch.load or YAML loader has to be the safe one."""
    for path in (ROOT / "hybridrl_lib").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        for word in ("pickle", "yaml.load(", "yaml.unsafe_load", "yaml.full_load", "marshal",
                     "shelve", "joblib", "allow_pickle=True", "weights_only=False",
                     "trust_remote_code=True", "shell=True", "os.system"):
            assert f"import {word}" not in code and (word == "pickle" or word not in code), path
        for line in code.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, (path, line)
    assert {path.suffix for path in tiny_model_folder().rglob("*") if path.is_file()} <= {
        ".json", ".safetensors", ".md", ".jinja", ".txt"}


def test_every_test_that_is_promised_exists():
    """SECURITY.md names the tests of its promises: a renamed test would leave it empty."""
    promised = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`(tests/[\w/]+\.py)`", promised))
    own = {f"tests/system/{path.name}" for path in Path(__file__).parent.glob("test_trust*.py")}
    missing = sorted(own - files) + [name for name in files if not (ROOT / name).is_file()]
    assert own and not missing
    defined = {name for file in files for name in re.findall(
        r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)}
    names = set(re.findall(r"`(test_\w+)`", promised))
    assert len(names) > 5 and names <= defined
    for target in re.findall(r"`make ([\w-]+)`", promised):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), target
