"""Demonstrations that a model wrote: sampled from it, verified, and scored under it."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import ModelSettings, Settings
from .errors import UserError
from .evaluation import verdicts_of
from .judging import rewards_of
from .methods.method import Progress, Stage, Weights
from .packing import PromptCompletion
from .policy import Policy, load_policy, load_tokenizer
from .problems import Problem
from .records import seed_of
from .rewards import Verifier
from .rollouts import sample
from .steps import Step
from .updates import Learner, Totals

OF_THIS_RUN = "sft"  # in place of a model's path: the run's own model after SFT


@dataclass(frozen=True)
class Demonstration:
    """An answer and what the model that wrote it thought of every token of it.

    Attributes:
        sequence: T token ids after their prompt, EOS at the end.
        behaviour: log pi_beta of every token at temperature 1, (T,) nats.
    """

    sequence: PromptCompletion
    behaviour: Tensor


@dataclass(frozen=True)
class Taught:
    """What a behaviour model's own SFT took, which is part of what its demonstrations cost.

    Attributes:
        updates: optimiser updates.
        tokens: of reference solutions in them, epochs counted.
    """

    updates: int = 0
    tokens: int = 0


def behaviour_policy(source: str, student: Policy, problems: Sequence[Problem],
                     settings: Settings, epochs: int, learning_rate: float,
                     seed: int) -> tuple[Policy, Taught]:
    """The model that writes the demonstrations, and what its SFT took in this run.

    Args:
        source: a model folder, GGUF file or hub name; `sft` for the run's base model after some
            epochs of plain SFT on the reference solutions.
        student: the policy that will learn from it.
        problems: for `sft`, what it is trained on.
        epochs, learning_rate: for `sft`, how long, and the rate that AdamW's falls from linearly.
        seed: for `sft`, of the order of the problems.

    Raises:
        UserError: it cannot be loaded, or ends answers with another token than the student.
    """
    if source == OF_THIS_RUN:
        policy = load_policy(settings.model)
        return policy, _fine_tune(policy, problems, settings, epochs, learning_rate, seed)
    with _called_behaviour():
        policy = load_policy(_named(source, settings))
    if policy.eos_id != student.eos_id:
        raise _other_tokenizer(source, student)
    return policy, Taught()


def refuse_other_tokenizer(source: str, student: Policy, problems: Sequence[Problem],
                           settings: Settings) -> None:
    """Refuses a model that cannot write demonstrations, before its weights are fetched or read.

    Raises:
        UserError: there is none of that name, or it has another tokenizer than the student.
    """
    with _called_behaviour():
        tokenizer = load_tokenizer(_named(source, settings))
    if tokenizer.get_vocab() != student.tokenizer.get_vocab() or any(
            tokenizer(p.solution, add_special_tokens=False)["input_ids"]
            != student.encode_completion(p.solution)[:-1] for p in problems):
        raise _other_tokenizer(source, student)


def _other_tokenizer(source: str, student: Policy) -> UserError:
    return UserError(f"The model {source} has another tokenizer than {student.name}, so neither "
                     "can score the other's tokens; choose one of the same family for "
                     "pear.behaviour.")


def _named(source: str, settings: Settings) -> ModelSettings:
    """How a model that writes demonstrations is loaded."""
    return replace(settings.model, path=source, revision=None, adapter="none",
                   gradient_checkpointing=False)


@contextmanager
def _called_behaviour() -> Iterator[None]:
    """What is said of model.path is said of the setting that names the model here."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace("model.path", "pear.behaviour")) from error


def _fine_tune(policy: Policy, problems: Sequence[Problem], settings: Settings, epochs: int,
               learning_rate: float, seed: int) -> Taught:
    """Plain SFT: every epoch in an order of its own."""
    learner, size = Learner(policy, settings), settings.sft.batch_size
    learner.new_optimizer()
    step = Step(Progress(Stage("sft", epochs), 0, 1), settings, learner, Weights(1.0, 0.0), 0.0,
                {}, {})
    batches: list[list[Problem]] = []
    for epoch in range(epochs):
        order = list(problems)
        random.Random(seed_of(seed, "behaviour order", epoch)).shuffle(order)
        batches += [order[start:start + size] for start in range(0, len(order), size)]
    tokens = 0
    for place, batch in enumerate(batches):
        update = step.update(batch)
        learner.apply(update, learning_rate * (1 - place / len(batches)), Totals())
        tokens += sum(len(s.completion) for s in update.sequences)
    return Taught(len(batches), tokens)


def sample_demonstrations(policy: Policy, student: Policy, problems: Sequence[Problem],
                          verifier: Verifier, settings: Settings, samples: int, seed: int,
                          ) -> tuple[dict[str, Demonstration], int]:
    """The first answer of a model to each problem that earns RL's reward, among so many sampled at
    temperature 1.

    Both models read the student's prompt, token for token.

    Returns:
        {id of the problem: its demonstration}, without those that no answer solved; and how many
        tokens were sampled.
    """
    groups = sample(policy, [student.encode_prompt(p.question) for p in problems],
                    samples=samples, max_new_tokens=settings.rl.max_new_tokens, temperature=1.0,
                    seed=seed_of(seed, "behaviour"), batch_size=settings.evaluation.batch_size)
    rewards = rewards_of([p for p in problems for _ in range(samples)],
                         [c.text for group in groups for c in group.completions],
                         verdicts_of(problems, groups, verifier), settings.rl.reward)
    found: dict[str, PromptCompletion] = {}
    for problem, group, mine in zip(problems, groups, rewards.view(-1, samples), strict=True):
        for completion, reward in zip(group.completions, mine.tolist(), strict=True):
            if reward > 0 and completion.finished:
                found.setdefault(problem.id, PromptCompletion(group.prompt_ids,
                                                              completion.token_ids))
    scores = Learner(policy, settings).scores(list(found.values()), temperature=1.0)
    tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    return {name: Demonstration(sequence, score.to(student.device))
            for (name, sequence), score in zip(found.items(), scores, strict=True)}, tokens


# For a checkpoint: strings and counts in JSON, tokens and log-probabilities in tensors ------------

Sizes = list[tuple[str, int, int]]


def sizes_of(demonstrations: dict[str, Demonstration]) -> Sizes:
    """Of every demonstration the id of its problem, and how many tokens its two parts have."""
    return [(name, len(one.sequence.prompt), len(one.sequence.completion))
            for name, one in demonstrations.items()]


def tensors_of(demonstrations: dict[str, Demonstration]) -> dict[str, Tensor]:
    """All their tokens, and the log-probabilities of their completions, one after the other."""
    if not demonstrations:
        return {}
    every = demonstrations.values()
    return {"tokens": torch.tensor([token for one in every for token in
                                    (*one.sequence.prompt, *one.sequence.completion)]),
            "behaviour": torch.cat([one.behaviour for one in every])}


def demonstrations_of(sizes: Sizes, tensors: dict[str, Tensor],
                      device: torch.device | str) -> dict[str, Demonstration]:
    """What `sizes_of` and `tensors_of` were made from."""
    if not sizes:
        return {}
    tokens = iter(tensors["tokens"].tolist())
    scores = tensors["behaviour"].to(device).split([length for _, _, length in sizes])
    return {name: Demonstration(PromptCompletion([next(tokens) for _ in range(prompt)],
                                                 [next(tokens) for _ in range(completion)]), score)
            for (name, prompt, completion), score in zip(sizes, scores, strict=True)}
