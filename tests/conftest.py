"""What all tests share: no network, no results in the checkout, and small random models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402


def pytest_configure(config):
    """Only `pytest -m gpu` sees a GPU: accelerate keeps the first device that a process uses, and
    the numbers in other tests hold on a CPU."""
    if not config.pluginmanager.hasplugin("xdist"):
        config.addinivalue_line("markers", "xdist_group: tests that must not run side by side")
    if config.getoption("markexpr").strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Tests that need a pretrained model or a GPU run only where there is one."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        for item in on_gpu if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU and pytest -m gpu"))
    if not os.environ.get("HYBRIDRL_TEST_MODEL"):
        for item in items:
            if item.get_closest_marker("real_model"):
                item.add_marker(pytest.mark.skip(reason="HYBRIDRL_TEST_MODEL is not set"))


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """New results go to a folder of the test; returns it."""
    monkeypatch.setenv("HYBRIDRL_RESULTS_DIR", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Folders of a random `qwen2` and a random `llama` model with the project's tokenizer.

    Sets torch to one thread: results of a CPU depend on the number of threads.
    """
    import torch
    from small_models import write_model

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, name) for name in ("qwen2", "llama")}


@pytest.fixture(scope="session")
def make_policy(model_folders):
    """make_policy(architecture="qwen2", **model settings) -> a fresh `Policy` on the CPU."""
    from hybridrl_lib.config.sections import ModelSettings
    from hybridrl_lib.policy.loading import load_policy

    def make(architecture="qwen2", **settings):
        return load_policy(ModelSettings(path=str(model_folders[architecture]), device="cpu",
                                         precision="fp32", **settings))

    return make


@pytest.fixture()
def policy(make_policy):
    """A fresh random Qwen2 policy."""
    return make_policy()


@pytest.fixture()
def make_trainer(make_policy, tmp_path):
    """`small_training.make_trainer` with a fresh policy and a run folder unless they are given."""
    from small_training import make_trainer as make

    def build(setup="rl", *overrides, policy=None, folder="run", **arguments):
        return make(setup, *overrides, policy=policy or make_policy(), folder=tmp_path / folder,
                    **arguments)

    return build
