"""Models from a hub on this machine: downloaded, read from the cache, refused in one sentence."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_stand_in import COMMIT, Hub, running

pytestmark = pytest.mark.xdist_group("hub")
ROOT = Path(__file__).parents[2]
LOADER = """
import json, sys
from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.system.errors import UserError
for line in sys.stdin:
    said = []
    try:
        policy = load_policy(ModelSettings(device="cpu", **json.loads(line)), said.append)
        answer = {"name": policy.name, "revision": policy.revision, "sha256": policy.sha256,
                  "known_as": policy.model.name_or_path}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"said": said}), flush=True)
"""


class Loader:
    """A process that loads models by name from the stand-in, with its own cache."""

    def __init__(self, hub: Hub, home: Path, **variables: str):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment | {"HF_ENDPOINT": hub.address, "HF_HOME": str(home),
                               "HF_HUB_DISABLE_TELEMETRY": "1", **variables})

    def ask(self, path: str, **settings) -> None:
        self.process.stdin.write(json.dumps({"path": path, **settings}) + "\n")
        self.process.stdin.flush()

    def load(self, path: str, **settings) -> dict:
        self.ask(path, **settings)
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()[-3000:]
        return json.loads(line)

    def refused(self, path: str, **settings) -> str:
        sentence = self.load(path, **settings)["error"]
        assert "\n" not in sentence
        return sentence

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def hub():
    with running(Hub()) as hub:
        yield hub


@pytest.fixture()
def good(hub, model_folders, tmp_path):
    """The name of an intact model that was never downloaded."""
    name = f"someone/{tmp_path.name.strip('_')}"
    hub.models[name], hub.fault = model_folders["qwen2"], ""
    hub.ranges.clear()
    return name


@pytest.fixture(scope="module")
def loader(hub, tmp_path_factory):
    loader = Loader(hub, tmp_path_factory.mktemp("home"))
    yield loader
    loader.kill()


def copy_of(folder: Path, target: Path, **config) -> Path:
    shutil.copytree(folder, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


def sha256_of(folder: Path) -> str:
    import hashlib

    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_model_by_name_and_revision(hub, loader, good, model_folders):
    """The commit that was loaded is known even if the newest was requested."""
    for name in ("pytorch_model.bin", "onnx/model.onnx", "original/model.safetensors"):
        hub.models[good] = folder = model_folders["qwen2"].with_name("with_more")
        if not folder.exists():
            shutil.copytree(model_folders["qwen2"], folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"much")
    for revision in (None, "main", COMMIT):
        loaded = loader.load(good, revision=revision)
        assert loaded["revision"] == COMMIT and loaded["name"] == loaded["known_as"] == good
        assert loaded["sha256"] == sha256_of(folder)
    fetched = [path for path in hub.requests if good in path and "/resolve/" in path]
    assert not [path for path in fetched if path.endswith((".bin", ".onnx"))
                or "/original/" in path]
    assert len(hub.ranges) == 1, "weights are downloaded once"
    assert "f" * 40 in loader.refused(good, revision="f" * 40)


def test_a_lost_connection_is_retried(hub, loader, good, model_folders):
    """Half a download is completed within a process."""
    hub.fault = "cut"
    assert loader.load(good)["sha256"] == sha256_of(model_folders["qwen2"])
    assert len(hub.ranges) >= 2


@pytest.mark.slow
def test_a_silent_connection_times_out(hub, good, tmp_path, model_folders):
    """A silent hub is an error; what a killed process left is never used as a whole model."""
    hub.fault = "stall"
    loader = Loader(hub, tmp_path / "silent", HF_HUB_DOWNLOAD_TIMEOUT="1")
    try:
        assert good in loader.refused(good)
    finally:
        loader.kill()
    hub.fault = "stall"
    first = Loader(hub, tmp_path / "home")
    first.ask(good)
    until = time.monotonic() + 120
    while not hub.ranges:  # the request for weights
        assert time.monotonic() < until
        time.sleep(0.05)
    first.kill()
    hub.fault = "drop"
    second = Loader(hub, tmp_path / "home")
    assert good in second.refused(good)
    hub.fault = ""
    assert second.load(good)["sha256"] == sha256_of(model_folders["qwen2"])
    second.kill()


@pytest.mark.slow
def test_without_a_hub_its_cache_is_used(hub, loader, good, tmp_path, model_folders):
    """HF_HUB_OFFLINE and a hub that does not answer: the cache is read, and nothing is asked."""
    loader.load(good)
    before = len(hub.requests)
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        offline = Loader(hub, loader.home, **variables)
        assert offline.load(good)["sha256"] == sha256_of(model_folders["qwen2"])
        why = "HF_HUB_OFFLINE" if "HF_HUB_OFFLINE" in variables else "127.0.0.1:9"
        sentence = offline.refused("someone/else")
        assert why in sentence and "someone/else" in sentence
        offline.kill()
    assert len(hub.requests) == before


def test_what_the_hub_refuses_is_one_sentence(hub, loader, good, model_folders, tmp_path):
    """Gated, missing, misspelled, and other architectures are refused before weights come."""
    hub.gated.add(good)
    gated = loader.refused(good)
    assert good in gated and "hf auth login" in gated and "HF_TOKEN" in gated
    hub.gated.clear()
    missing = loader.refused("nobody/nothing")
    assert "nobody/nothing" in missing and "model.path" in missing
    assert "owner/name" in loader.refused("no such/folder/of mine")
    for number, (words, config) in enumerate({
            "'Qwen2ForTokenClassification'": {"architectures": ["Qwen2ForTokenClassification"]},
            "'BertForMaskedLM'": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "'t5'": {"model_type": "t5", "architectures": None},
            "'mine'": {"model_type": "mine"}}.items()):
        name = f"{good}-{number}"
        hub.models[name] = copy_of(model_folders["qwen2"], tmp_path / str(number), **config)
        sentence = loader.refused(name)
        assert words in sentence and name in sentence
    assert not hub.ranges
