"""`hybridrl doctor`: what it says follows from what the machine has."""

import time
from dataclasses import replace

import pytest

from hybridrl_lib.config.presets import load_settings, preset_names
from hybridrl_lib.machine import doctor
from hybridrl_lib.setups import paper_setups
from hybridrl_lib.system import hub
from hybridrl_lib.system.errors import UsageError

GPU_BOX = doctor.Machine(device="cuda", device_name="GPU", precision="bf16", gpu_memory=79.0,
                         memory=128.0, hub="", data="", tiny_model=True)
LAPTOP = replace(GPU_BOX, device="cpu", device_name="CPU", precision="fp32", gpu_memory=0.0,
                 memory=8.0, hub="no answer", data="not set")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The tests say themselves whether there is a hub, and nothing was fetched from it before."""
    monkeypatch.setattr(doctor, "hub_problem", lambda: "no answer")
    monkeypatch.setattr(doctor, "in_hub_cache", lambda *_: False)


def problems(preset: str, machine: doctor.Machine) -> str:
    return "; ".join(doctor.preset_problems(preset, load_settings(preset, smoke=False), machine))


def test_a_gpu_box_runs_everything():
    """No preset is refused where nothing is missing."""
    assert {preset: problems(preset, GPU_BOX) for preset in preset_names()} == dict.fromkeys(
        preset_names(), "")


def test_a_laptop_without_network_runs_tiny():
    """The default preset needs neither GPU nor hub, and the others say what they lack."""
    assert problems("tiny", LAPTOP) == ""
    assert "model.path" in problems("smollm2", LAPTOP)
    assert "HYBRIDRL_DATA_DIR" in problems("smollm2", LAPTOP)
    assert "18 GiB" in problems("paper", LAPTOP)


def test_folder_and_cache_stand_in_for_the_hub(monkeypatch):
    """With the data folder set, only the model is missing; with it in the hub cache, nothing."""
    found = problems("smollm2", replace(LAPTOP, data=""))
    assert "HYBRIDRL_DATA_DIR" not in found and "model.path" in found
    monkeypatch.setattr(doctor, "in_hub_cache", lambda *_: True)
    assert problems("smollm2", replace(LAPTOP, data="")) == ""


def test_too_small_a_gpu_is_named():
    """A T4 is enough for colab, and too small for paper."""
    t4 = replace(GPU_BOX, gpu_memory=14.6, memory=12.7)
    assert problems("colab", t4) == "" and "14.6 GiB" in problems("paper", t4)


def test_missing_tiny_model_and_torch_are_named():
    """A broken installation is reported, not crashed on."""
    broken = replace(LAPTOP, device="", tiny_model=False)
    assert "pretrain-tiny" in problems("tiny", broken) and "torch" in problems("tiny", broken)


def test_report_covers_what_a_user_asks_about():
    """Every topic is there once, with text in each column, and every preset is judged."""
    rows = doctor.report()
    topics = [topic for topic, _, _ in rows]
    assert len(topics) == len(set(topics))
    assert {"device", "precision", "memory", "tiny model", "data folder", "hub", "torch",
            "transformers", "datasets", "peft", "accelerate", "papermill"} <= set(topics)
    assert {f"preset {name}" for name in preset_names()} <= set(topics)
    assert all(isinstance(part, str) for row in rows for part in row)
    assert all(value for _, value, _ in rows)


def test_report_of_one_preset():
    """`--preset` judges only that one; an unknown one is an error that names the nearest."""
    topics = [topic for topic, _, _ in doctor.report("tiny")]
    assert [topic for topic in topics if topic.startswith("preset")] == ["preset tiny"]
    assert {"needs memory", "  SFT update", "  evaluation"} <= set(topics)
    with pytest.raises(UsageError, match="paper"):
        doctor.report("papre")


def test_colab_says_what_it_needs(monkeypatch):
    """Memory by phase against the device; advice only where it does not fit."""
    for memory, fits in ((14.6, True), (2.5, False)):
        machine = replace(GPU_BOX, gpu_memory=memory, precision="fp32")
        monkeypatch.setattr(doctor, "look", lambda m=machine: m)
        rows = {topic: (value, said) for topic, value, said in doctor.report("colab")}
        assert "9.9 GiB" in rows["needs memory"][0]
        assert (rows["needs memory"][1] == "") == fits
        assert fits or "2.9 GiB" in rows["needs memory"][1]
        assert "weights 1.9" in rows["  SFT update"][0]
        assert not any(name.startswith("time ") for name in rows), "minutes were never measured"


def test_setups_that_need_more_than_the_preset_are_named(monkeypatch):
    """A T4 is enough for colab, but not for BRIDGE; the paper's setups are not in that list."""
    monkeypatch.setattr(doctor, "look", lambda: replace(GPU_BOX, gpu_memory=14.6, precision="fp32"))
    rows = {name: row for row in doctor.report("colab") for name in row[0].strip().split(", ")}
    for name, needed in (("bridge", 18.8), ("bridge_one_step", 20.7)):  # a third gradient
        assert f"{needed} GiB" in rows[name][1] and f"{needed} GiB" in rows[name][2]
    assert {"bridge_without_gain", "bridge_joint", "bridge_without_adapter"} <= set(rows)
    assert not set(paper_setups()) & set(rows)


def test_render_shows_value_and_advice(monkeypatch):
    """Every topic with its value, and what to do about a problem."""
    monkeypatch.setattr(doctor, "look", lambda: LAPTOP)
    text = doctor.render()
    assert "preset tiny" in text and "HYBRIDRL_DATA_DIR" in text
    assert all(topic in text and value in text for topic, value, _ in doctor.report())


def test_data_folder_is_checked_file_by_file(monkeypatch, tmp_path):
    """A folder that lacks a file is not good, and the file is named."""
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(tmp_path))
    for name in ("gsm8k/train", "gsm8k/test", "math500/test"):
        assert f"{name}.jsonl" in doctor.folder_problem()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    assert doctor.folder_problem() == ""


def test_old_and_missing_packages_are_named(monkeypatch):
    """A version below our minimum gets advice, as does a missing package."""
    for installed in ("0.0.1", None):
        def version(name: str, installed=installed) -> str:
            if installed is None:
                raise doctor.metadata.PackageNotFoundError(name)
            return installed

        monkeypatch.setattr(doctor.metadata, "version", version)
        monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch>=2.8"])
        assert "make env" in doctor.package_row("torch")[2]


def test_the_question_to_the_hub_is_always_answered_soon(monkeypatch):
    """A closed port is named with its address, a lookup that hangs does not hang the doctor,
    HF_HUB_OFFLINE is named as the reason, and a path is not in the hub cache."""
    monkeypatch.undo()  # the real function again, with addresses of this machine only
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in doctor.hub_problem()
    with monkeypatch.context() as patch:
        patch.setattr(hub, "ask", lambda *_: time.sleep(0.5))
        assert doctor.hub_problem(seconds=0.05)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.hub_problem()
    assert not doctor.in_hub_cache("/no/such/model.gguf")
