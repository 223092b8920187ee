"""Demonstrations that a model writes: sampled from it, verified, and scored under it (PEAR)."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config.sections import ModelSettings
from ..config.settings import Settings
from ..learning.judging import rewards_of, verdicts_of
from ..learning.learner import Learner
from ..learning.progress import Progress, Stage, Weights
from ..learning.step import Step
from ..learning.update import Totals
from ..policy.loading import load_policy, load_tokenizer
from ..policy.packing import PromptCompletion
from ..policy.policy import Policy
from ..policy.sampling import sample
from ..problems.problem import Problem
from ..rewards.verifier import Verifier
from ..system.errors import UserError
from ..system.seeds import seed_of

OF_THIS_RUN = "sft"  # in place of a model's path: the run's own model after SFT


@dataclass(frozen=True)
class Demonstration:
    """An answer with its log-probabilities under the model that wrote it.

    Attributes:
        sequence: T token ids after their prompt, EOS at the end.
        behavior: log pi_beta of every token at temperature 1, (T,) nats.
    """

    sequence: PromptCompletion
    behavior: Tensor


@dataclass(frozen=True)
class Taught:
    """What a behavior model's own SFT took, which is part of the cost of its demonstrations.

    Attributes:
        updates: optimizer updates.
        tokens: tokens of reference solutions in them, in all epochs.
    """

    updates: int = 0
    tokens: int = 0


def behavior_policy(source: str, student: Policy, problems: Sequence[Problem],
                     settings: Settings, epochs: int, learning_rate: float,
                     seed: int) -> tuple[Policy, Taught]:
    """The model that writes the demonstrations, and what its SFT took in this run.

    Args:
        source: a model folder, GGUF file, or hub name; `sft` for the run's base model after some
            epochs of plain SFT on the reference solutions.
        student: the policy that will learn from it.
        problems: for `sft`, the training problems.
        epochs, learning_rate: for `sft`; the learning rate decays linearly to 0.
        seed: for `sft`, of the order of the problems.

    Raises:
        UserError: it cannot be loaded, or its EOS token is not the student's.
    """
    if source == OF_THIS_RUN:
        policy = load_policy(settings.model)
        return policy, _fine_tune(policy, problems, settings, epochs, learning_rate, seed)
    with _called_behavior():
        policy = load_policy(_named(source, settings))
    if policy.eos_id != student.eos_id:
        raise _other_tokenizer(source, student)
    return policy, Taught()


def refuse_other_tokenizer(source: str, student: Policy, problems: Sequence[Problem],
                           settings: Settings) -> None:
    """Refuses a model that cannot write demonstrations, before its weights are fetched or read.

    Raises:
        UserError: it does not exist, or its tokenizer is not the student's.
    """
    with _called_behavior():
        tokenizer = load_tokenizer(_named(source, settings))
    if tokenizer.get_vocab() != student.tokenizer.get_vocab() or any(
            tokenizer(p.solution, add_special_tokens=False)["input_ids"]
            != student.encode_completion(p.solution)[:-1] for p in problems):
        raise _other_tokenizer(source, student)


def _other_tokenizer(source: str, student: Policy) -> UserError:
    return UserError(f"The model {source} and {student.name} have different tokenizers, so neither "
                     "can score the other's tokens; choose a model of the same family for "
                     "pear.behavior.")


def _named(source: str, settings: Settings) -> ModelSettings:
    """The settings to load a model that writes demonstrations."""
    return replace(settings.model, path=source, revision=None, adapter="none",
                   gradient_checkpointing=False)


@contextmanager
def _called_behavior() -> Iterator[None]:
    """Names pear.behavior instead of model.path in errors."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace("model.path", "pear.behavior")) from error


def _fine_tune(policy: Policy, problems: Sequence[Problem], settings: Settings, epochs: int,
               learning_rate: float, seed: int) -> Taught:
    """Plain SFT, with a new order of the problems in every epoch."""
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
        learner.accumulate(update, Totals())
        learner.step(learning_rate * (1 - place / len(batches)))
        tokens += sum(len(s.completion) for s in update.sequences)
    return Taught(len(batches), tokens)


def sample_demonstrations(policy: Policy, student: Policy, problems: Sequence[Problem],
                          verifier: Verifier, settings: Settings, samples: int, seed: int,
                          ) -> tuple[dict[str, Demonstration], int]:
    """The first answer of a model to each problem that earns RL's reward, at temperature 1.

    Both models read the student's prompt, token for token.

    Args:
        samples: answers sampled per problem.

    Returns:
        {id of the problem: its demonstration}, without problems that no answer solved; and the
        number of sampled tokens.
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


# For checkpoints: strings and counts in JSON, tokens and log-probabilities in tensors -------------

Sizes = list[tuple[str, int, int]]


def sizes_of(demonstrations: dict[str, Demonstration]) -> Sizes:
    """(id of the problem, prompt tokens, completion tokens) of every demonstration."""
    return [(name, len(one.sequence.prompt), len(one.sequence.completion))
            for name, one in demonstrations.items()]


def tensors_of(demonstrations: dict[str, Demonstration]) -> dict[str, Tensor]:
    """All tokens, and the log-probabilities of the completions, concatenated."""
    if not demonstrations:
        return {}
    every = demonstrations.values()
    return {"tokens": torch.tensor([token for one in every for token in
                                    (*one.sequence.prompt, *one.sequence.completion)]),
            "behavior": torch.cat([one.behavior for one in every])}


def demonstrations_from(sizes: Sizes, tensors: dict[str, Tensor],
                      device: torch.device | str) -> dict[str, Demonstration]:
    """The inverse of `sizes_of` and `tensors_of`."""
    if not sizes:
        return {}
    tokens = iter(tensors["tokens"].tolist())
    scores = tensors["behavior"].to(device).split([length for _, _, length in sizes])
    return {name: Demonstration(PromptCompletion([next(tokens) for _ in range(prompt)],
                                                 [next(tokens) for _ in range(completion)]), score)
            for (name, prompt, completion), score in zip(sizes, scores, strict=True)}
