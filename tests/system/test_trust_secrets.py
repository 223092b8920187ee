"""Nothing that is written or committed names a key, a person's folder, or a machine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybridrl_lib.config.presets import load_settings
from hybridrl_lib.experiments.jobs import Job, Queue
from hybridrl_lib.experiments.process import start_here
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.system.errors import Stopped
from hybridrl_lib.system.paths import hide_home, without_home

ROOT = Path(__file__).parents[2]
SECRET, PERSON = "hf_CanarySecretOfTheEnvironment", "canary-person-of-this-machine"
KEYS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_KEY",
        "GITHUB_TOKEN", "HYBRIDRL_UNKNOWN")
# Folders of people and machines, and keys of well-known services.
PRIVATE = re.compile(
    rb"(?<![\w.:/$-])/(?:home|root|work|Users|mnt|scratch)/[\w.]|[A-Z]:\\Users\\|"
    rb"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|"
    rb"\bAKIA[0-9A-Z]{16}\b|\bxox[abp]-[0-9A-Za-z-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY")


def tracked() -> list[Path]:
    """The files of the repository."""
    try:
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True,
                               check=True).stdout.split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git is not available")


def test_nothing_committed_is_private():
    """Notebooks with outputs, published records, everything: no key and no person's folder."""
    files = [path for path in tracked() if ROOT / "tests" not in path.parents]  # have examples
    assert len(files) > 100
    found = [(str(path.relative_to(ROOT)), match.group()) for path in files
             for match in PRIVATE.finditer(path.read_bytes())]
    assert found == []
    for text in (b'"/home/ann/x"', b"/root/.cache", b"C:\\Users\\Ann", b"hf_" + b"a" * 34,
                 b"ghp_" + b"1" * 36, b"sk-" + b"a" * 40, b"-----BEGIN RSA PRIVATE KEY"):
        assert PRIVATE.search(text), text
    assert not PRIVATE.search(b"results/runs/home/x and https://example.org/home/x")


@pytest.fixture(scope="module")
def written(tmp_path_factory, model_folders):
    """What `hybridrl reproduce` leaves in a person's folder, with keys in the environment."""
    home = tmp_path_factory.mktemp("homes") / PERSON
    checkout = home / "work" / "checkout"
    for part in ("hybridrl_lib", "notebooks"):
        shutil.copytree(ROOT / part, checkout / part,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "pyproject.toml", checkout)
    shutil.copytree(model_folders["qwen2"], home / "models" / "small")
    done = subprocess.run(
        [sys.executable, "-m", "hybridrl_lib.cli", "reproduce", "--setups", "sft", "--set",
         f"model.path={home / 'models' / 'small'}"],
        cwd=checkout, capture_output=True, text=True, check=False, env={
            **os.environ, **dict.fromkeys(KEYS, SECRET), "HOME": str(home), "USER": PERSON,
            "LOGNAME": PERSON, "HOSTNAME": PERSON, "PYTHONPATH": str(checkout),
            "HYBRIDRL_SMOKE": "1", "HYBRIDRL_RESULTS_DIR": str(home / "results")})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return home / "results"


@pytest.mark.slow
@pytest.mark.xdist_group("papermill")
def test_a_new_record_has_no_key_and_no_folder_of_its_author(written):
    """What `hybridrl reproduce` leaves has no key, and `~` in place of the home folder."""
    files = [path for path in written.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert kinds >= {".json", ".jsonl", ".ipynb", ".log", ".md", ".csv", ".tex", ".svg", ".png",
                     ".safetensors"}
    assert {"config.json", "manifest.json", "report.md"} <= {path.name for path in files}
    leaks = [(str(path.relative_to(written)), word) for path in files
             for word in (SECRET, PERSON) if word.encode() in path.read_bytes()]
    assert leaks == []
    config = (written / "tiny-smoke" / "sft" / "seed-0" / "config.json").read_text()
    assert '"path": "~/models/small"' in config


def test_home_is_abbreviated_and_found_again(tmp_path, monkeypatch, model_folders):
    """A full path and one with `~` are the same setting, so a run resumes in both cases."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model_folders["qwen2"], tmp_path / "model")
    full, short = (load_settings("tiny", [f"model.path={path}", "model.device=cpu"])
                   for path in (tmp_path / "model", "~/model"))
    assert full == short and full.model.path == "~/model"
    assert load_policy(full.model).name == "model"
    for path in ("tiny", "Qwen/Qwen2.5-0.5B", "models/x", "/data/x", f"{tmp_path}x/model"):
        assert without_home(path) == path
    monkeypatch.setenv("HOME", "/")
    assert without_home("/data/x") == "/data/x"


def test_a_saved_model_does_not_say_where_its_base_was(tmp_path, monkeypatch, model_folders):
    """transformers and PEFT write the path that a model was loaded from into what they save."""
    monkeypatch.setenv("HOME", str(tmp_path / PERSON))
    shutil.copytree(model_folders["qwen2"], tmp_path / PERSON / "model")
    for adapter in ("none", "lora"):
        settings = load_settings("tiny", ["model.path=~/model", f"model.adapter={adapter}"])
        load_policy(settings.model).save(tmp_path / adapter)
        files = [path for path in (tmp_path / adapter).rglob("*") if path.is_file()]
        assert len(files) > 3
        assert [path.name for path in files if PERSON.encode() in path.read_bytes()] == []


def test_logs_and_notebooks_of_a_failure_do_not_name_the_home_folder(tmp_path, monkeypatch):
    """A traceback names files: in logs, notebooks, and reasons, after a failure or Ctrl-C."""
    home = tmp_path / PERSON
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    code = (f"print('loading', {str(home / 'a')!r})\nimport json, sys\n"
            "error = {'output_type': 'error', 'ename': 'OSError', 'evalue': 'no ' + sys.argv[1]}\n"
            "json.dump({'cells': [{'outputs': [error]}]}, open('out.ipynb', 'w'))\n"
            "raise OSError(sys.argv[1])")
    job = Job(name="failing", command=(sys.executable, "-c", code, str(home / "b")),
              folder=tmp_path, output=tmp_path / "out.ipynb", log=tmp_path / "out.log", weight=1.0)
    lines = []
    failures = Queue([job], 1, dict(os.environ), lines.append, start_here(0)).run()
    assert failures == {job: "OSError: no ~/b"}
    texts = [job.log.read_text(), job.output.read_text(), *lines]
    assert "Traceback" in texts[0] and "loading ~/a" in texts[0]
    assert not [text for text in texts if PERSON in text]
    job = Job(name="long", command=(sys.executable, "-uc", (
        f"import time; print({str(home / 'a')!r}); time.sleep(600)")), folder=tmp_path,
        output=tmp_path / "long.ipynb", log=tmp_path / "long.log", weight=1.0)
    start = start_here(0)

    def stop_once_it_has_printed(*arguments):
        process = start(*arguments)
        poll = process.poll

        def look():
            if job.log.stat().st_size and poll() is None:
                process.poll = poll
                raise KeyboardInterrupt
            return poll()

        process.poll = look
        return process

    with pytest.raises(Stopped):
        Queue([job], 1, dict(os.environ), print, stop_once_it_has_printed).run()
    assert job.log.read_text() == "~/a\n"


def test_only_the_home_folder_is_hidden(tmp_path, monkeypatch):
    """Folders with similar names, and pictures, are not changed."""
    monkeypatch.setenv("HOME", "/home/ann")
    picture = "iVBORw0KGgoAAAANSUhEUgAAAoAAAAHg/home/ann/CAYAAAA10"
    text = (f'"text": "see\\n/home/ann/x, file:///home/ann and /home/anna/x, /home/ann-b, \x1b[31m'
            f'/home/ann/y:3", "image/png": "{picture}"')
    file = tmp_path / "out.ipynb"
    file.write_text(text)
    hide_home(file)
    assert file.read_text() == (
        '"text": "see\\n~/x, file://~ and /home/anna/x, /home/ann-b, \x1b[31m'
        f'~/y:3", "image/png": "{picture}"')
    for nowhere in ("/", ""):
        monkeypatch.setenv("HOME", nowhere)
        file.write_text("/ is the root")
        hide_home(file)
        assert file.read_text() == "/ is the root"
    hide_home(tmp_path / "absent")
