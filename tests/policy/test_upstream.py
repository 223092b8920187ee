"""What the library calls in other packages still exists, by the names it uses.

Every call in the code whose function can be found through an import is looked up in the installed
package, and its keyword arguments are compared with the function's signature. So a release that
renames an argument fails here with the argument's name, and not in the middle of a run.
"""

import ast
import builtins
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridrl_lib.policy.loading import _load_model

ROOT = Path(__file__).parents[2] / "hybridrl_lib"
FILES = sorted(ROOT.rglob("*.py"))
NOT_INSTALLED = {"vllm", "ray", "google"}  # optional: looked up where they are installed

# Methods of objects, which no import leads to: what is called by name, and with **arguments. An
# argument that such a function takes by **kwargs must occur in its text, as a word.
METHODS = {
    "transformers.PreTrainedModel.from_pretrained": (
        "dtype", "attn_implementation", "output_loading_info", "use_safetensors", "gguf_file",
        "trust_remote_code"),
    "transformers.AutoTokenizer.from_pretrained": ("trust_remote_code", "gguf_file"),
    "transformers.PreTrainedModel.save_pretrained": ("state_dict",),
    "transformers.PreTrainedModel.gradient_checkpointing_enable": (),
    "transformers.PreTrainedModel.set_attn_implementation": (),
    "transformers.PreTrainedModel.get_decoder": (),
    "transformers.PreTrainedTokenizerBase.__call__": ("add_special_tokens",),
    "transformers.PreTrainedTokenizerBase.apply_chat_template": (
        "add_generation_prompt", "continue_final_message", "tokenize", "return_dict"),
    "transformers.PreTrainedTokenizerBase.decode": ("skip_special_tokens",),
    "transformers.PreTrainedTokenizerBase.batch_decode": ("skip_special_tokens",),
    "transformers.PreTrainedTokenizerBase.convert_tokens_to_ids": (),
    "transformers.PreTrainedTokenizerBase.convert_ids_to_tokens": (),
    "transformers.Qwen2Model.forward": (
        "input_ids", "position_ids", "attention_mask", "use_cache", "past_key_values"),
    "transformers.DynamicCache.__init__": ("config",),
    "transformers.DynamicCache.batch_repeat_interleave": (),
    "transformers.DynamicCache.batch_select_indices": (),
    "transformers.DynamicCache.get_seq_length": (),
    "peft.PeftModel.save_pretrained": ("save_embedding_layers", "state_dict"),
    "peft.PeftModel.disable_adapter": (),
    "peft.tuners.lora.LoraModel.merge_and_unload": (),
    "peft.tuners.lora.LoraModel.unload": (),
    "peft.tuners.lora.Linear.get_delta_weight": (),
    "accelerate.Accelerator.prepare": (),
    "accelerate.Accelerator.backward": (),
    "accelerate.Accelerator.clip_grad_norm_": (),
    "accelerate.state.AcceleratorState._reset_state": ("reset_partial_state",),
}
# These also have **arguments, for custom engines and formats; what is used here has a name.
NAME_WHAT_THEY_TAKE = {"datasets", "papermill"}


def imported(tree: ast.AST, path: Path) -> dict[str, object]:
    """{name in the file: what it stands for}, of imports from other packages.

    Raises:
        AssertionError: a package no longer has what is imported from it.
    """
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            pairs = [(alias.asname or alias.name.partition(".")[0],
                      alias.name if alias.asname else alias.name.partition(".")[0], None)
                     for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            pairs = [(alias.asname or alias.name, node.module, alias.name) for alias in node.names]
        else:
            continue
        for name, module, attribute in pairs:
            try:
                home = importlib.import_module(module)
            except ModuleNotFoundError:
                if module.partition(".")[0] in NOT_INSTALLED:
                    continue
                raise
            if attribute and not hasattr(home, attribute):
                try:
                    found[name] = importlib.import_module(f"{module}.{attribute}")
                except ModuleNotFoundError:
                    raise AssertionError(f"{where(path, node)}: {module} has no {attribute}; it "
                                         "was renamed or removed.") from None
            else:
                found[name] = getattr(home, attribute) if attribute else home
    return found


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT.parent)}:{node.lineno}"


def called(node: ast.expr, known: dict[str, object], place: str) -> object | None:
    """What a call's function is, if imports lead to it."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = called(node.value, known, place)
        if owner is None or not (inspect.ismodule(owner) or inspect.isclass(owner)):
            return None
        assert hasattr(owner, node.attr), (
            f"{place}: {owner.__name__} has no {node.attr}; it was renamed or removed.")
        return getattr(owner, node.attr)
    return None


def missing_arguments(function: object, names: list[str]) -> list[str] | None:
    """The names that a function does not take; None if it does not say what it takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in functions of C++
        return None
    home = (getattr(function, "__module__", None) or "").partition(".")[0]
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and home not in NAME_WHAT_THEY_TAKE:
        return None
    taken = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    return [name for name in names if name not in taken]


def calls(path: Path) -> Iterator[tuple[str, object, list[str]]]:
    """(place, function of another package, keyword arguments) of every call in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = imported(tree, path)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = called(node.func, known, where(path, node))
        home = (getattr(function, "__module__", None) or "").partition(".")[0]
        if function is None or home in ("hybridrl_lib", builtins.__name__):
            continue
        yield where(path, node), function, [k.arg for k in node.keywords if k.arg]


def wrong_calls(paths) -> list[str]:
    """`place: function: arguments` of every call that does not fit; or a name that is gone."""
    found = []
    for path in paths:
        try:
            for place, function, names in calls(path):
                if wrong := missing_arguments(function, names):
                    found.append(f"{place}: {function.__module__}.{function.__qualname__}: "
                                 f"{', '.join(wrong)}")
        except AssertionError as error:
            found.append(str(error))
    return found


def test_every_call_of_another_package_fits_its_signature():
    """Keyword arguments exist in the installed release; and the test sees calls of all packages."""
    assert not wrong_calls(FILES)
    checked = {function.__module__.partition(".")[0] for path in FILES
               for _, function, names in calls(path)
               if names and missing_arguments(function, names) is not None}
    assert {"accelerate", "datasets", "math_verify", "papermill", "peft", "torch",
            "transformers"} <= checked


def looked_up(path: str) -> object:
    """What `package.module.Class.method` names.

    Raises:
        AssertionError: a part of it is gone.
    """
    parts = path.split(".")
    known = next(n for n in range(len(parts), 0, -1) if is_module(".".join(parts[:n])))
    found = importlib.import_module(".".join(parts[:known]))
    for name in parts[known:]:
        assert hasattr(found, name), f"{path}: there is no {name}; it was renamed or removed."
        found = getattr(found, name)
    return found


def is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:  # what is before the last dot is none
        return False


def not_taken(function: object, names: tuple[str, ...]) -> list[str]:
    """The names that a function neither has in its signature nor speaks of."""
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    text = f"{inspect.getdoc(function)}\n{inspect.getsource(function)}" if open_ended else ""
    return [name for name in names if name not in parameters
            and not re.search(rf"""["'`]{name}["'`]""", text)]


def test_every_method_takes_what_it_is_given():
    """By its signature or, with **kwargs, by its text."""
    wrong = {path: missing for path, names in METHODS.items()
             if (missing := not_taken(looked_up(path), names))}
    assert not wrong


def test_no_argument_of_these_methods_is_missing():
    """A new argument of such a call must be added above."""
    listed: dict[str, set[str]] = {}
    for path, names in METHODS.items():
        listed.setdefault(path.rpartition(".")[2], set()).update(names)
    seen = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and (
                    node.func.attr in listed) and not path.match("rewards/*"):
                names = {k.arg for k in node.keywords if k.arg}
                assert names <= listed[node.func.attr], f"{where(path, node)}: {names}"
                seen |= names
    assert {"dtype", "return_dict", "skip_special_tokens"} <= seen


def test_a_method_that_has_changed_is_named(monkeypatch):
    """Even if **kwargs would hide the argument."""
    def from_pretrained(path, **kwargs):
        """Takes `attn_implementation`."""

    assert not_taken(from_pretrained, ("attn_implementation", "dtype")) == ["dtype"]
    monkeypatch.delattr(transformers.PreTrainedTokenizerBase, "apply_chat_template")
    with pytest.raises(AssertionError, match="apply_chat_template"):
        looked_up("transformers.PreTrainedTokenizerBase.apply_chat_template")


def test_what_the_arguments_ask_for_is_done(model_folders, tmp_path):
    """A known name may still be ignored: a bf16 folder is loaded as fp32 with the attention that
    was asked for, a prompt is text, and clipping returns the norm before."""
    half = AutoModelForCausalLM.from_pretrained(model_folders["qwen2"]).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    model = _load_model(str(tmp_path), {}, "half")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b.float()) for a, b in zip(model.parameters(), half.parameters(),
                                                         strict=True))
    tokenizer = AutoTokenizer.from_pretrained(model_folders["qwen2"])
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "1"}], add_generation_prompt=True,
        continue_final_message=False, tokenize=False, return_dict=False) == "<1>"
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    accelerator = Accelerator(cpu=True)
    accelerator.backward((weight * weight.detach()).sum())
    assert float(accelerator.clip_grad_norm_([weight], 1.0)) == 5.0
    assert float(weight.grad.norm()) == pytest.approx(1.0)


def test_a_changed_signature_is_named(monkeypatch):
    """An argument that is gone and a name that is gone are both named, with file and line."""
    path = ROOT / "policy" / "loading.py"
    assert not wrong_calls([path])
    with monkeypatch.context() as patch:
        patch.setattr(peft, "LoraConfig", type("LoraConfig", (), {
            "__init__": lambda self, r, target_modules: None, "__module__": "peft"}))
        wrong, = wrong_calls([path])
        assert re.search(r"loading.py:\d+: peft.LoraConfig: lora_alpha, lora_dropout", wrong)
    monkeypatch.delattr(peft, "get_peft_model")
    wrong, = wrong_calls([path])
    assert "get_peft_model" in wrong
