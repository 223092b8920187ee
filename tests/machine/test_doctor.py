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


@pytest.mark.parametrize("preset", preset_names())
def test_a_gpu_box_runs_everything(preset):
    """No preset is refused where nothing is missing."""
    assert problems(preset, GPU_BOX) == ""


def test_a_laptop_without_network_runs_tiny():
    """The default preset needs neither GPU nor hub, and the others say what they lack."""
    assert problems("tiny", LAPTOP) == ""
    assert "model.path" in problems("smollm2", LAPTOP)
    assert "HYBRIDRL_DATA_DIR" in problems("smollm2", LAPTOP)
    assert "GPU with 18 GiB" in problems("paper", LAPTOP)


def test_a_data_folder_stands_in_for_the_hub():
    """With the folder set, only the model is still missing."""
    found = problems("smollm2", replace(LAPTOP, data=""))
    assert "HYBRIDRL_DATA_DIR" not in found and "model.path" in found


def test_a_model_fetched_before_needs_no_hub(monkeypatch):
    """A warm hub cache counts as having the model."""
    monkeypatch.setattr(doctor, "in_hub_cache", lambda *_: True)
    assert problems("smollm2", replace(LAPTOP, data="")) == ""


def test_too_small_a_gpu_is_named():
    """A T4 is told to be enough for colab and not for paper."""
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
    """`--preset` judges that one alone, and an unknown one is wrong use."""
    topics = [topic for topic, _, _ in doctor.report("tiny")]
    assert [topic for topic in topics if topic.startswith("preset")] == ["preset tiny"]
    assert {"needs memory", "  SFT update", "  evaluation"} <= set(topics)
    with pytest.raises(UsageError, match="paper"):
        doctor.report("papre")


def test_colab_says_what_it_needs_and_how_long_it_takes(monkeypatch):
    """Memory by phase against the device, minutes of the six setups, both marked as estimates."""
    for machine, advice in ((replace(GPU_BOX, gpu_memory=14.6, precision="fp32"), ""),
                            (replace(GPU_BOX, gpu_memory=2.5, precision="fp32"), "This run needs")):
        monkeypatch.setattr(doctor, "look", lambda m=machine: m)
        rows = {topic: (value, said) for topic, value, said in doctor.report("colab")}
        assert rows["needs memory"][0].startswith("estimated 9.9 GiB of the GPU")
        assert advice in rows["needs memory"][1] and bool(advice) == bool(rows["needs memory"][1])
        assert "weights 1.9" in rows["  SFT update"][0]
        assert rows["time rl"][0].startswith("estimated ") and "min on a T4" in rows["time rl"][0]
        assert "assumed" in rows["time rests on"][0]
        assert sum(name.startswith("time ") for name in rows) == 8, "base, six setups, assumptions"


def test_setups_that_need_more_than_the_preset_are_named(monkeypatch):
    """A T4 is enough for colab and not for BRIDGE at it; the six setups are not in that list."""
    monkeypatch.setattr(doctor, "look", lambda: replace(GPU_BOX, gpu_memory=14.6, precision="fp32"))
    rows = {name: row for row in doctor.report("colab") for name in row[0].strip().split(", ")}
    for name, needed in (("bridge", 18.8), ("bridge_one_step", 20.7)):  # a third gradient
        assert f"at the least {needed} GiB" in rows[name][1]
        assert f"This run needs about {needed} GiB" in rows[name][2]
    assert {"bridge_without_gain", "bridge_joint", "bridge_without_adapter"} <= set(rows)
    assert not set(paper_setups()) & set(rows)


def test_render_shows_value_and_advice(monkeypatch):
    """What is wrong stands beside what to do about it."""
    monkeypatch.setattr(doctor, "look", lambda: LAPTOP)
    text = doctor.render()
    assert "preset tiny" in text and "-> " in text and "HYBRIDRL_DATA_DIR" in text


def test_data_folder_is_checked_file_by_file(monkeypatch, tmp_path):
    """A folder that lacks one file is not called good."""
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(tmp_path))
    for name in ("gsm8k/train", "gsm8k/test", "math500/test"):
        assert f"{name}.jsonl" in doctor.folder_problem()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    assert doctor.folder_problem() == ""


@pytest.mark.parametrize("installed", ["0.0.1", None])
def test_old_and_missing_packages_are_named(monkeypatch, installed):
    """A version below our floor gets advice, as a missing package does."""
    def version(name: str) -> str:
        if installed is None:
            raise doctor.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch>=2.8"])
    assert "make env" in doctor.package_row("torch")[2]


class TestHub:
    """The question to the hub: always answered, soon."""

    @pytest.fixture(autouse=True)
    def real_question(self, monkeypatch, no_network):
        """Puts the real function back, against addresses of this machine only."""
        monkeypatch.undo()
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def test_a_hub_that_refuses(self, monkeypatch):
        """A closed port is reported with its address."""
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        assert "http://127.0.0.1:9" in doctor.hub_problem()

    def test_a_hub_that_never_answers(self, monkeypatch):
        """A lookup that hangs does not hang the doctor."""
        monkeypatch.setattr(hub, "ask", lambda *_: time.sleep(0.5))
        assert "no answer" in doctor.hub_problem(seconds=0.05)

    def test_offline_by_choice(self, monkeypatch):
        """HF_HUB_OFFLINE is named as the reason, and nothing is asked."""
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert "HF_HUB_OFFLINE" in doctor.hub_problem()

    def test_a_file_path_is_in_no_cache(self):
        """A path where a hub name should be is simply not cached."""
        assert not doctor.in_hub_cache("/no/such/model.gguf")
