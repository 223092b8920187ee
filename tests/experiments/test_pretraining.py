"""How the tiny base model is trained: its corpus, its tokenizer, and that it can be repeated."""

import json
import random
import re
from dataclasses import asdict, replace
from itertools import islice

import pytest
import torch

from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.experiments.pretraining import (
    UNKNOWN,
    World,
    batches,
    corpus,
    make_tokenizer,
    pretrain,
    write_document,
)
from hybridrl_lib.policy.loading import load_policy
from hybridrl_lib.policy.prompts import prompt_text
from hybridrl_lib.problems import tiny
from hybridrl_lib.rewards.answers import extract_boxes
from hybridrl_lib.rewards.verifier import Verifier
from hybridrl_lib.system.paths import tiny_model_folder

SMALL = World(layers=1, width=16, heads=2, key_value_heads=1, feed_forward=16, steps=3,
              batch_size=8, warmup=2)
CLEAN = World(sloppy=0.0, misconception=0.0, boxed_A=1.0, boxed_B=1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def problems():
    return [*tiny.load_tiny_word(), *tiny.load_tiny_symbolic()]


def documents(count, seed=0):
    return list(islice(corpus(World(), seed), count))


def test_the_corpus_never_touches_the_held_out_seventh(problems):
    """No benchmark question is read in pretraining: all of them are held out, no document is."""
    questions = {question for question, _ in documents(8000)}
    assert not any(tiny.is_held_out(question) for question in questions)
    assert all(tiny.is_held_out(problem.question) for problem in problems)
    assert not questions & {problem.question for problem in problems}
    for draw in (tiny.draw_word, tiny.draw_symbolic):
        drawn = [draw(random.Random(seed)) for seed in range(3000)]
        for phrasing in "AB":
            mine = [tiny.is_held_out(e.question) for e in drawn if e.phrasing == phrasing]
            assert 1 / 7 - 0.04 < sum(mine) / len(mine) < 1 / 7 + 0.04
    assert documents(50) == documents(50) != documents(50, seed=1)


def verdicts(world, count=2000):
    """(fraction of correct answers, fraction with a box) of a world's documents."""
    source, golds, texts = random.Random(0), [], []
    for _ in range(count):
        draw = tiny.draw_word if source.random() < world.word_share else tiny.draw_symbolic
        exercise = draw(source)
        golds.append(exercise.answer)
        texts.append(write_document(exercise, world, source))
    with Verifier() as verifier:
        judged = verifier.verify(golds, texts, [True] * len(texts))
    boxed = [bool(extract_boxes(text)) for text in texts]
    return sum(v.strict for v in judged) / len(texts), sum(boxed) / len(texts)


def test_a_world_without_slips_is_correct_everywhere():
    """The generator is correct without slips; each choice of the world does what its name says."""
    assert verdicts(CLEAN) == (1.0, 1.0)
    right, _ = verdicts(replace(CLEAN, sloppy=1.0))
    assert right < 0.35, "a slip in an earlier line of symbolic working leaves the answer right"
    right, _ = verdicts(replace(CLEAN, misconception=1.0, word_share=0.0))
    assert 0.70 < right < 0.80, "one template of four is about fractions"
    _, boxed = verdicts(replace(CLEAN, boxed_A=1.0, boxed_B=0.0))
    assert 0.5 < boxed < 0.65, "phrasing A boxes, B only in its box_only endings"


def test_tokenizer(tokenizer, problems):
    """Every text is decoded unchanged; EOS, padding, and unknown differ; documents end with EOS."""
    texts = [prompt_text(tokenizer, p.question) for p in problems]
    texts += [p.solution for p in problems]
    texts += [solution for _, solution in documents(2000, seed=3)]
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert unknown not in ids, text
        assert tokenizer.decode(ids) == text
    ids = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    assert len(ids) == 3 and None not in ids
    assert not ids & set(tokenizer("First 1 + 2 = 3.")["input_ids"])
    ids = next(batches(tokenizer, SMALL, seed=0))
    assert len(ids) == SMALL.batch_size
    for row in ids.tolist():
        end = row.index(tokenizer.eos_token_id)
        assert tokenizer.pad_token_id not in row[:end]
        assert set(row[end + 1:]) <= {tokenizer.pad_token_id}


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_three_steps_of_pretraining_repeat_bit_for_bit(tmp_path, problems):
    """The same bytes by seed, an ordinary model folder with its world, and a loss that falls."""
    one = files_of(pretrain(tmp_path / "one", 0, SMALL, report=lambda line: None))
    threads = torch.get_num_threads()
    torch.rand(3)
    torch.set_num_threads(2)
    two = files_of(pretrain(tmp_path / "two", 0, SMALL, report=lambda line: None))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert one == two
    other = files_of(pretrain(tmp_path / "other", 1, SMALL, report=lambda line: None))
    assert other["model.safetensors"] != one["model.safetensors"]
    folder = tmp_path / "one"
    policy = load_policy(ModelSettings(path=str(folder), device="cpu"))
    assert policy.model.config.model_type == "qwen2"
    assert len(policy.tokenizer) == policy.model.config.vocab_size
    ids = policy.encode_completion(problems[0].solution)
    assert ids[-1] == policy.eos_id and policy.decode(ids) == problems[0].solution
    assert json.loads((folder / "world.json").read_text()) == {"seed": 0, **asdict(SMALL)}
    assert (folder / "README.md").read_text().startswith("---\n")
    lines = []
    world = replace(SMALL, steps=60, width=32, learning_rate=1e-2)
    pretrain(tmp_path / "tiny", 0, world, report=lines.append)
    loss = float(re.search(r"loss (\d+\.\d+)", lines[-1])[1])
    assert loss < 3.0, "a uniform guess costs 4.6 nats"


def test_the_shipped_model_is_the_one_the_command_makes(tokenizer, problems):
    """World and tokenizer of the shipped folder are those of the code."""
    folder = tiny_model_folder()
    made_from = json.loads((folder / "world.json").read_text())
    assert made_from == {"seed": made_from["seed"], **asdict(World())}
    shipped = load_policy(ModelSettings(path="tiny", device="cpu")).tokenizer
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert "tiny-v1" in (folder / "README.md").read_text()
    policy = load_policy(ModelSettings(path="tiny", device="cpu"))
    unknown = policy.tokenizer.unk_token_id
    for problem in problems:
        ids = policy.encode_prompt(problem.question) + policy.encode_completion(problem.solution)
        assert unknown not in ids, problem.id
    assert policy.parameter_count() < 2_000_000
