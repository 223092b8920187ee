"""Problems: the two real benchmarks from a folder or the hub, the parts, the prompt."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from facts import lines_with
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridrl_lib.config.sections import DataSettings
from hybridrl_lib.policy.prompts import (
    INSTRUCTION,
    encode_prompt,
    pad_token_id,
    prompt_text,
    stop_token_ids,
)
from hybridrl_lib.problems import gsm8k, math500
from hybridrl_lib.problems.benchmarks import BENCHMARKS, get_benchmark
from hybridrl_lib.problems.problem import BenchmarkData, Problem, solution_steps
from hybridrl_lib.problems.splits import in_turn, load_parts, normalized, shuffled, split_benchmark
from hybridrl_lib.system.errors import UsageError, UserError

FIXTURE = Path(__file__).parents[1] / "data"
FULL_DATA = os.environ.get("HYBRIDRL_DATA_DIR")
REAL = ("gsm8k", "math500")
SHUFFLED_0 = [8, 7, 9, 6, 2, 4, 5, 0, 3, 1]  # ids of made/0 ... made/9 at split seed 0


@pytest.fixture
def data_folder(tmp_path, monkeypatch) -> Path:
    """A copy of the invented rows, named by HYBRIDRL_DATA_DIR."""
    folder = tmp_path / "data"
    shutil.copytree(FIXTURE, folder)
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def no_folder(monkeypatch):
    """HYBRIDRL_DATA_DIR is not set."""
    monkeypatch.delenv("HYBRIDRL_DATA_DIR", raising=False)


def change_row(file: Path, number: int, **columns) -> None:
    """Overwrites columns of row `number`; a column set to None is removed."""
    lines = file.read_text().splitlines()
    row = {**json.loads(lines[number]), **columns}
    lines[number] = json.dumps({key: value for key, value in row.items() if value is not None})
    file.write_text("\n".join(lines) + "\n")


def part_ids(parts) -> dict[str, list[str]]:
    return {part: [p.id for p in getattr(parts, part)] for part in ("train", "validation", "test")}


def test_rows_become_problems(data_folder):
    """One format of answers, no calculator notes, figures kept, the source's number of steps."""
    problems = {problem.id: problem for problem in get_benchmark("gsm8k").load().problems}
    choirs = problems["gsm8k/train/4"]
    assert choirs.answer == "1260"
    assert choirs.solution == ("There are 24+31+29 = 84 singers.\nThey sell 84*15 = 1,260 tickets."
                               "\nThe answer is \\boxed{1260}.")
    assert problems["gsm8k/train/8"].answer == "-7"
    for problem in problems.values():
        assert "<<" not in problem.solution and "####" not in problem.solution
        assert "\n\n" not in problem.solution
    assert len(problems) == 22 and "gsm8k/test/5" in problems
    problems = {problem.id: problem for problem in get_benchmark("math500").load().problems}
    triangle = problems["math500/test/geometry/9005.json"]
    assert (triangle.level, triangle.subject, triangle.answer) == (2, "Geometry", "15")
    assert "[asy]" in triangle.question and "[asy]" in triangle.solution
    dice = problems["math500/test/counting_and_probability/9011.json"]
    assert dice.solution.count("\\boxed") == 2
    assert len(problems) == 12
    problems = {p.id: p for name in REAL for p in BENCHMARKS[name].load().problems}
    assert solution_steps(problems["gsm8k/train/0"]) == 2
    assert solution_steps(problems["gsm8k/train/7"]) == 3  # a blank line is not a step
    assert solution_steps(problems["gsm8k/train/10"]) == 5
    assert solution_steps(problems["math500/test/geometry/9005.json"]) == 2  # nor is a figure


def test_generated_benchmarks_are_the_same_every_time():
    """A generated benchmark is frozen: same problems, same revision, a box in every solution."""
    for name, count in (("tiny_word", 480), ("tiny_symbolic", 320)):
        first, second = BENCHMARKS[name].load(), BENCHMARKS[name].load()
        assert first == second and first.revision.startswith("generated sha256 ")
        assert len(first.problems) == count
        assert all(rf"\boxed{{{p.answer}}}" in p.solution for p in first.problems)
        assert {p.benchmark for p in first.problems} == {name}
    parts = load_parts(DataSettings())
    assert len(parts.train) >= 400 and len(parts.test) >= 320 and len(parts.validation) >= 32
    assert set(parts.counts) == set(parts.revisions) == {"tiny_word", "tiny_symbolic"}
    assert parts.dropped_duplicates == {"tiny_word": 0, "tiny_symbolic": 0}


def one_sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_a_missing_folder_or_file_is_named_with_its_variable(data_folder, monkeypatch):
    """After a mistyped folder, the error names the files that it should have."""
    (data_folder / "math500" / "test.jsonl").unlink()
    with pytest.raises(UserError) as caught:
        BENCHMARKS["math500"].load()
    message = one_sentence(caught)
    assert "math500/test.jsonl" in message and "HYBRIDRL_DATA_DIR" in message
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(data_folder / "nowhere"))
    with pytest.raises(UserError) as caught:
        BENCHMARKS["gsm8k"].load()
    message = one_sentence(caught)
    assert "nowhere" in message and "gsm8k/train.jsonl" in message
    with pytest.raises(UsageError, match="'gsm8k'"):
        get_benchmark("gsm8")


def refused(name: str, file: Path, *facts) -> None:
    """Loading a benchmark must fail with one sentence that names the file and the facts."""
    with pytest.raises(UserError) as caught:
        BENCHMARKS[name].load()
        pytest.fail(f"{facts} was accepted")
    message = one_sentence(caught)
    assert str(file) in message and lines_with(message, *facts)


def test_a_row_without_a_usable_answer_is_named(data_folder):
    """A broken row, line, or file stops the run with its place and is never skipped."""
    for name, row, cases in (
            ("gsm8k", 2, [({"answer": None}, "answer"), ({"answer": "  "}, "answer"), (
                {"answer": "2+2 = <<2+2=4>>4"}, "####"), ({"answer": "<<2+2=4>>"}, "####"),
                          ({"answer": "2+2 = 4\n####"}, "####"), ({"question": 7}, "question")]),
            ("math500", 0, [({"answer": None}, "answer"), ({"solution": "It is 24."}, "boxed"),
                            ({"level": "hard"}, "level"), ({"unique_id": None}, "unique_id")])):
        file = data_folder / name / "test.jsonl"
        before = file.read_text()
        for columns, fact in cases:
            change_row(file, row, **columns)
            refused(name, file, row + 1, fact)
            file.write_text(before)
        BENCHMARKS[name].load()
    file = data_folder / "gsm8k" / "train.jsonl"
    before = file.read_bytes()
    for line in ('{"question": "How', "[1, 2]", "\udcff"):
        file.write_bytes(before + line.encode(errors="surrogateescape"))
        refused("gsm8k", file, 17)
    file.write_text("\n")
    refused("gsm8k", file)


def test_repeated_id_is_refused(data_folder):
    """A repeated id would mix up two problems; a gold that cannot be parsed gives wrong rewards."""
    change_row(data_folder / "math500" / "test.jsonl", 3, unique_id="test/prealgebra/9001.json")
    with pytest.raises(UserError, match="math500/test/prealgebra/9001.json"):
        load_parts(DataSettings(benchmarks=("math500",)))
    change_row(data_folder / "math500" / "test.jsonl", 3, answer="\\frac{",
               unique_id="test/number_theory/9004.json")
    with pytest.raises(UserError) as caught:
        load_parts(DataSettings(benchmarks=("math500",)))
    assert "math500/test/number_theory/9004.json" in one_sentence(caught)


def test_hub_is_read_at_a_pinned_revision(no_folder, monkeypatch):
    """The hub's rows must give the folder's problems, and a moving branch must not change them."""
    asked = []

    def load_dataset(path, name, *, split, revision):
        asked.append((path, name, split, revision))
        file = FIXTURE / {"openai/gsm8k": "gsm8k"}.get(path, "math500") / f"{split}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    from_hub = {name: BENCHMARKS[name].load() for name in REAL}
    assert asked == [("openai/gsm8k", "main", "train", gsm8k.SOURCE.revision),
                     ("openai/gsm8k", "main", "test", gsm8k.SOURCE.revision),
                     ("HuggingFaceH4/MATH-500", None, "test", math500.SOURCE.revision)]
    assert all(len(revision) == 40 for *_, revision in asked)
    monkeypatch.setenv("HYBRIDRL_DATA_DIR", str(FIXTURE))
    for name in REAL:
        from_folder = BENCHMARKS[name].load()
        assert from_hub[name].problems == from_folder.problems
        assert from_hub[name].revision.startswith("hub ")
        assert from_folder.revision.startswith("sha256 ")
    monkeypatch.delenv("HYBRIDRL_DATA_DIR")
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nwith a second line")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        BENCHMARKS["gsm8k"].load()
    message = one_sentence(caught)
    assert "HYBRIDRL_DATA_DIR" in message and "Couldn't reach the Hub" in message


@st.composite
def benchmark_data(draw) -> BenchmarkData:
    """A benchmark with repeated questions (in different case and spacing), maybe a test file."""
    questions = draw(st.lists(st.integers(0, 25), min_size=1, max_size=60))
    test_ids = draw(st.sets(st.integers(0, len(questions) - 1), max_size=len(questions)))
    problems = []
    for number, question in enumerate(questions):
        text = draw(st.sampled_from(["What is {}?", "what  is {}?", " WHAT is\n{}? "]))
        problems.append(Problem(f"made/{number}", text.format(question), "\\boxed{1}", "1", "made"))
    return BenchmarkData(tuple(problems), "made", frozenset(f"made/{n}" for n in test_ids))


@settings(deadline=None)
@given(loaded=benchmark_data(), seed=st.integers(0, 10**9), train=st.floats(0.05, 0.95),
       validation=st.floats(0.05, 0.95), split=st.sampled_from(["paper", "official"]))
def test_no_question_is_in_two_parts(loaded, seed, train, validation, split):
    """A test question that was trained on would make every number of Table 2 wrong."""
    data = DataSettings(split=split, split_seed=seed, train_fraction=train,
                        validation_fraction=validation)
    parts = split_benchmark(loaded, data)
    problems = [problem for part in parts.values() for problem in part]
    assert max(Counter(normalized(p.question) for p in problems).values()) == 1
    assert len(problems) == len({normalized(p.question) for p in loaded.problems})
    if split == "official" and loaded.official_test:
        assert {p.id for p in parts["test"]} <= loaded.official_test
        for part in ("train", "validation"):
            assert not {p.id for p in parts[part]} & loaded.official_test
    else:
        assert len(parts["test"]) == len(problems) - round(train * len(problems))


def test_duplicates_are_dropped_and_counted(data_folder):
    """Of two equal questions the later one is dropped and counted, also across benchmarks."""
    lines = (data_folder / "gsm8k" / "train.jsonl").read_text().splitlines()
    repeated = json.loads(lines[0])["question"]
    change_row(data_folder / "gsm8k" / "test.jsonl", 0, question=f"  {repeated.upper()}")
    change_row(data_folder / "math500" / "test.jsonl", 0, problem=repeated)
    parts = load_parts(DataSettings(benchmarks=REAL))
    assert parts.dropped_duplicates == {"gsm8k": 1, "math500": 1}
    everywhere = sum(part_ids(parts).values(), [])
    assert "gsm8k/train/0" in everywhere and "gsm8k/test/0" not in everywhere
    official = load_parts(DataSettings(benchmarks=REAL, split="official"))
    assert "gsm8k/test/0" in part_ids(official)["test"]  # the official test stays whole
    assert "gsm8k/train/0" not in sum(part_ids(official).values(), [])


def test_parts_of_real_rows(data_folder):
    """The official test file, one benchmark alone, limits as prefixes, filters spare the test."""
    parts = load_parts(DataSettings(benchmarks=REAL, split="official"))
    test = part_ids(parts)["test"]
    assert {i for i in test if i.startswith("gsm8k")} == {f"gsm8k/test/{n}" for n in range(6)}
    assert len(set(sum(part_ids(parts).values(), []))) == 34
    assert parts.counts["gsm8k"] == {"train": 14, "validation": 2, "test": 6}
    assert parts.counts["math500"] == {"train": 6, "validation": 1, "test": 5}
    pooled = load_parts(DataSettings(benchmarks=REAL))
    assert [p for p in pooled.test if p.benchmark == "math500"] == [
        p for p in parts.test if p.benchmark == "math500"]
    alone = load_parts(DataSettings(benchmarks=("math500",)))
    both = load_parts(DataSettings(benchmarks=REAL))
    for part in ("train", "validation", "test"):
        assert getattr(alone, part) == tuple(
            p for p in getattr(both, part) if p.benchmark == "math500")
    data = DataSettings(benchmarks=REAL, max_solution_steps=3)
    small = load_parts(replace(data, train_limits=(3, 0), test_limits=(2, 1)))
    large = load_parts(replace(data, train_limits=(7, 4), test_limits=(4, 3)))
    assert small.train == large.train[:3] and len(large.train) == 11
    assert small.test[:2] == large.test[:2] and small.test[2] == large.test[4]
    assert small.counts["math500"]["train"] == 0
    assert large.validation == small.validation
    data = DataSettings(benchmarks=REAL)
    every, easy = load_parts(data), load_parts(replace(data, max_solution_steps=2, max_level=3))
    assert easy.test == every.test
    for part in ("train", "validation"):
        kept = [p for p in getattr(every, part)
                if solution_steps(p) <= 2 and (p.level is None or p.level <= 3)]
        assert list(getattr(easy, part)) == kept
    assert len(easy.train) < len(every.train)
    for file in (data_folder / "gsm8k").iterdir():
        for number in range(len(file.read_text().splitlines())):
            change_row(file, number, answer="one\ntwo\n#### 2")
    with pytest.raises(UserError, match="max_solution_steps"):
        load_parts(DataSettings(benchmarks=("gsm8k",), max_solution_steps=1))


def test_split_never_changes():
    """The order is the same everywhere; the first validation problems are of all benchmarks."""
    problems = [Problem(f"made/{n}", str(n), "", "", "made") for n in range(10)]
    assert [int(p.id[5:]) for p in shuffled(problems, 0)] == SHUFFLED_0
    assert shuffled(reversed(problems), 0) == shuffled(problems, 0)
    assert shuffled(problems, 1) != shuffled(problems, 0)
    names = ["a", "a", "a", "b", "c", "c"]
    problems = [SimpleNamespace(benchmark=name, id=i) for i, name in enumerate(names)]
    assert [problem.id for problem in in_turn(problems)] == [0, 3, 4, 1, 5, 2]
    assert in_turn([]) == []


@pytest.mark.skipif(not FULL_DATA, reason="HYBRIDRL_DATA_DIR is not set")
def test_full_data():
    """Every row of the real data loads, and the paper's 60/40 gives the known sizes."""
    parts = load_parts(DataSettings(benchmarks=REAL))
    assert parts.counts == {"gsm8k": {"train": 4747, "validation": 528, "test": 3517},
                            "math500": {"train": 270, "validation": 30, "test": 200}}
    assert parts.dropped_duplicates == {"gsm8k": 0, "math500": 0}
    problems = parts.train + parts.validation + parts.test
    assert not any("<<" in p.solution for p in problems if p.benchmark == "gsm8k")
    assert all(p.answer.lstrip("-").isdigit() for p in problems if p.benchmark == "gsm8k")
    official = load_parts(DataSettings(benchmarks=REAL, split="official"))
    assert official.counts["gsm8k"] == {"train": 6726, "validation": 747, "test": 1319}


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tokenizer(*special: str, chat: bool = False, adds_begin: bool = False, **named):
    """A tokenizer of single characters with these special tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *special, *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.add_special_tokens(list(special))
    if adds_begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(w, words.index(w)) for w in ("<s>", "</s>")])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    made.chat_template = CHAT_TEMPLATE if chat else None
    return made


def test_prompts():
    """Plain text without tokens at its ends, except an automatic BOS; or the chat template."""
    tokenizer = make_tokenizer("</s>", eos_token="</s>")
    text = prompt_text(tokenizer, "What is 2+2?")
    assert text == f"Problem: What is 2+2?\n{INSTRUCTION}\nSolution:\n"
    assert tokenizer.decode(encode_prompt(tokenizer, "What is 2+2?")).replace(" ", "") == (
        text.replace(" ", ""))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    with_begin = make_tokenizer("<s>", "</s>", adds_begin=True, **names)
    ids = encode_prompt(with_begin, "1+1")
    assert ids.count(with_begin.bos_token_id) == 1 and ids[0] == with_begin.bos_token_id
    assert with_begin.eos_token_id not in ids
    without = make_tokenizer("<s>", "</s>", **names)
    assert encode_prompt(without, "1+1") == ids[1:]
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>", chat=True, eos_token="<|im_end|>")
    text = prompt_text(tokenizer, "What is 2+2?")
    assert text == (f"<|im_start|>user\nWhat is 2+2?\n{INSTRUCTION}<|im_end|>\n"
                    "<|im_start|>assistant\n")
    ids = encode_prompt(tokenizer, "What is 2+2?")
    assert isinstance(ids, list) and all(isinstance(i, int) for i in ids)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(start) == 2 and ids[0] == start


def test_stop_tokens_and_padding():
    """EOS and the end of a turn stop, never the unknown token; padding is another if possible."""
    tokenizer = make_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>", chat=True,
                               eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    end, turn_end = map(tokenizer.convert_tokens_to_ids, ("<|endoftext|>", "<|im_end|>"))
    assert stop_token_ids(tokenizer) == (end, turn_end)
    assert stop_token_ids(tokenizer, [turn_end, 77]) == (end, turn_end, 77)
    assert stop_token_ids(tokenizer, 0) == (end, turn_end, 0)
    assert stop_token_ids(make_tokenizer("</s>", eos_token="</s>", unk_token="<unk>")) == (1,)
    chat = make_tokenizer("</s>", chat=True, eos_token="</s>", unk_token="<unk>")
    assert stop_token_ids(chat) == (1,)
    with pytest.raises(UserError, match="tokenizer"):
        stop_token_ids(make_tokenizer("<s>"))
    own = make_tokenizer("<pad>", "</s>", eos_token="</s>", pad_token="<pad>")
    assert pad_token_id(own) == own.pad_token_id
    shared = make_tokenizer("<|fim_pad|>", "</s>", eos_token="</s>", pad_token="</s>")
    assert pad_token_id(shared) == shared.convert_tokens_to_ids("<|fim_pad|>")
    instruct = make_tokenizer("<|endoftext|>", "<|im_end|>", eos_token="<|im_end|>",
                              pad_token="<|endoftext|>", unk_token="<unk>")
    assert pad_token_id(instruct) == instruct.pad_token_id
    assert pad_token_id(instruct, [instruct.pad_token_id]) == instruct.unk_token_id
    alone = make_tokenizer("</s>", eos_token="</s>", pad_token="</s>")
    assert pad_token_id(alone) == alone.eos_token_id
