"""Models from a hub, which stands on this machine: fetched, continued, refused in one sentence."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_stand_in import COMMIT, Hub, running

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LOADER = """
import json, sys
from hybridrl_lib.config import ModelSettings
from hybridrl_lib.errors import UserError
from hybridrl_lib.policy import load_policy
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
    """A process that loads models by name from the stand-in, with a cache of its own."""

    def __init__(self, hub: Hub, home: Path, **variables: str):
        environment = {key: value for key, value in os.environ.items()
                       if not key.startswith("HF_")}
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

    def parts(self) -> list[Path]:
        return [*self.home.glob("hub/*/blobs/*.part")]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def hub():
    with running(Hub()) as hub:
        yield hub


@pytest.fixture()
def good(hub, model_folders, tmp_path):
    """The name of a sound model, which nobody has fetched before."""
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
    """The commit that was loaded is known, also where the newest was asked for; a saved adapter
    names the model and no folder of this machine; what is not needed is not fetched."""
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
    assert len(hub.ranges) == 1, "weights are fetched once"
    assert f"no revision {'f' * 40}" in loader.refused(good, revision="f" * 40)


def test_headless_downloads_say_plain_lines(loader, good):
    """Nobody watches: lines instead of a bar, which would fill a log."""
    said = loader.load(good)["said"]
    assert [line.split(f" {good}")[0] for line in said[-2:]] == ["fetching", "fetched"]
    assert "MB" in said[-1]


def test_a_lost_connection_is_gone_on_with(hub, loader, good):
    """Half a download is kept within a process."""
    hub.fault = "cut"
    assert "error" not in loader.load(good)
    assert hub.ranges[0] is None and len(hub.ranges) == 2 and hub.ranges[1].startswith("bytes=")
    assert not loader.parts()


def test_a_connection_that_goes_silent_is_given_up(hub, good, tmp_path):
    """Protects against a wait without an end: after a time-out it is tried again, then said."""
    hub.fault = "stall"
    loader = Loader(hub, tmp_path / "silent", HF_HUB_DOWNLOAD_TIMEOUT="1")
    try:
        assert "goes on where it broke off" in loader.refused(good)
    finally:
        loader.kill()


def test_a_download_that_broke_off_is_gone_on_with(hub, good, loader, tmp_path, model_folders):
    """A process is killed in mid-download: the next one fetches the rest, no more."""
    hub.fault = "stall"
    first = Loader(hub, tmp_path / "home")
    first.ask(good)
    size = (model_folders["qwen2"] / "model.safetensors").stat().st_size
    for _ in range(1200):  # a minute or more
        if [part for part in first.parts() if part.stat().st_size >= size // 2]:
            break
        time.sleep(0.05)
    first.kill()
    assert [part.stat().st_size for part in first.parts()] == [size // 2]
    hub.fault = "drop"
    second = Loader(hub, tmp_path / "home")
    sentence = second.refused(good)
    assert "goes on where it broke off" in sentence and "could not be fetched" in sentence
    hub.fault = ""
    loaded = second.load(good)
    second.kill()
    assert hub.ranges[-1] == f"bytes={size // 2}-"
    assert loaded["sha256"] == sha256_of(model_folders["qwen2"]) and not second.parts()


def test_a_damaged_download_is_not_used(hub, loader, good):
    """The hub's checksum is compared: what came wrong is thrown away and fetched again."""
    hub.fault = "wrong"
    assert "damaged" in loader.refused(good)
    assert not loader.parts()
    hub.fault = ""
    assert "error" not in loader.load(good)


def test_without_a_hub_its_cache_is_used(hub, loader, good, tmp_path, model_folders):
    """HF_HUB_OFFLINE and a hub that does not answer: what was fetched is read, nothing is asked."""
    loader.load(good)
    before = len(hub.requests)
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        offline = Loader(hub, loader.home, **variables)
        assert offline.load(good)["sha256"] == sha256_of(model_folders["qwen2"])
        why = "HF_HUB_OFFLINE" if "HF_HUB_OFFLINE" in variables else "127.0.0.1:9"
        sentence = offline.refused("someone/else")
        assert why in sentence and "not whole, in the hub's cache" in sentence
        offline.kill()
    assert len(hub.requests) == before


def test_what_the_hub_refuses_is_one_sentence(hub, loader, good):
    """Gated, missing and misspelled models each have their own way out."""
    hub.gated.add(good)
    gated = loader.refused(good)
    assert "is gated" in gated and "hf auth login" in gated and "HF_TOKEN" in gated
    hub.gated.clear()
    assert "has no model nobody/nothing" in loader.refused("nobody/nothing")
    assert "owner/name" in loader.refused("no such/folder/of mine")


def test_a_wrong_architecture_is_refused_before_its_weights_are_fetched(
        hub, loader, good, model_folders, tmp_path):
    """Gigabytes later would be late, and transformers would make up the output layer."""
    for number, (words, config) in enumerate({
            "'Qwen2ForTokenClassification'": {"architectures": ["Qwen2ForTokenClassification"]},
            "'BertForMaskedLM'": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "'t5'": {"model_type": "t5", "architectures": None},
            "architecture 'mine', which transformers": {"model_type": "mine"}}.items()):
        name = f"{good}-{number}"
        hub.models[name] = copy_of(model_folders["qwen2"], tmp_path / str(number), **config)
        sentence = loader.refused(name)
        assert words in sentence and "causal language model" in sentence
    assert not hub.ranges
