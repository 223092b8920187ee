"""Algorithm 1 as one loop: problems -> rollouts -> rewards -> advantages -> loss -> update.

    L = lambda_SFT * L_SFT + lambda_RL * L_RL - gamma * H

A method says at every step what the two lambdas are. A step with lambda_SFT > 0 takes a batch of
demonstrations, a step with lambda_RL > 0 samples G answers to a batch of problems, and everything
else is the same for all methods.
"""

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Settings
from .errors import Stopped, UserError, reason
from .evaluation import accuracy, evaluate, verdicts_of
from .health import Health, replay
from .interrupt import Interrupt
from .methods import Method, Progress, Stage
from .objectives import group_advantages, k3, token_weights
from .packing import PromptCompletion
from .policy import Policy
from .problems import Problem, ProblemParts, in_turn
from .progress import Observer, Stopwatch
from .records import RunFolder, seed_of, to_json, write_whole
from .rewards import Verifier
from .rollouts import Group, sample
from .updates import Learner, Totals, Update


class Trainer:
    """Trains one policy by one method and keeps its record.

    Args:
        policy: the model; its weights now are the base of every KL in the record.
        method: decides stages and lambdas.
        parts: training, validation and test problems.
        settings: all settings of the run.
        with_entropy: whether gamma of the stage is in the loss.
        seed: order of the problems and all sampling.
        folder: where logs and checkpoints go.
        verifier: gives the verdicts; the reward is 1 for a strictly right answer, else 0.
        observer: told what happens.
        clock: runs since the run began; a new one unless given.
    """

    def __init__(self, policy: Policy, method: Method, parts: ProblemParts, settings: Settings, *,
                 with_entropy: bool, seed: int, folder: RunFolder, verifier: Verifier,
                 observer: Observer, clock: Stopwatch | None = None):
        self.policy, self.method, self.parts, self.settings = policy, method, parts, settings
        self.with_entropy, self.seed, self.folder = with_entropy, seed, folder
        self.verifier, self.observer = verifier, observer
        self.clock = clock or Stopwatch()
        self.learner = Learner(policy, settings)
        self.step = self.stage_index = self.stage_step = 0
        self.tokens = {"demonstrations": 0, "rollouts": 0}
        self.best = {"strict": -1.0, "step": 0}
        self.best_weights: dict[str, Tensor] | None = None
        self.resumed_from: list[int] = []
        self.health = Health()
        self.probe_problems = in_turn(parts.validation)[:settings.probe.prompts]
        policy.keep_reference()

    # 1. The loop -------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs all stages from where the last checkpoint left off.

        Raises:
            Stopped: by Ctrl-C, after a checkpoint.
            UserError: the loss stopped being finite.
        """
        self._resume()
        self.health = replay(*map(self.folder.lines, ("metrics.jsonl", "probe.jsonl")))
        if self.step == 0 and not self.folder.lines("probe.jsonl"):
            self._probe(self.method.stages[0].name if self.method.stages else "base")
        stages = self.method.stages
        with Interrupt() as interrupt:
            for index in range(self.stage_index, len(stages)):
                stage = stages[index]
                if index != self.stage_index:
                    self.stage_index, self.stage_step = index, 0
                    self.learner.optimizer = None  # a stage starts with a fresh one, and warm-up
                steps = self.steps_of(stage)
                if self.learner.optimizer is None:
                    self.learner.new_optimizer()
                while self.stage_step < steps:
                    self._one_step(Progress(stage, self.stage_step, steps))
                    self._after_step(stage, steps, last=index + 1 == len(stages)
                                     and self.stage_step == steps)
                    if interrupt.asked:
                        self._save_checkpoint()
                        raise Stopped(f"Stopped by you after step {self.step}; the checkpoint is "
                                      "written, and the same command goes on from there.")

    def steps_of(self, stage: Stage) -> int:
        return stage.epochs * self.steps_per_epoch(stage)

    def steps_per_epoch(self, stage: Stage) -> int:
        return max(1, math.ceil(len(self.parts.train) / self._batch_size(stage)))

    def total_steps(self) -> int:
        return sum(self.steps_of(stage) for stage in self.method.stages)

    def _batch_size(self, stage: Stage) -> int:
        return (self.settings.sft.batch_size if stage.name == "sft"
                else self.settings.rl.prompts_per_step)

    def _batch(self, stage: Stage, step: int, kind: str, size: int) -> list[Problem]:
        """The problems of a step: every epoch has its own order, from the seed alone."""
        per_epoch = self.steps_per_epoch(stage)
        epoch, place = divmod(step, per_epoch)
        order = list(range(len(self.parts.train)))
        random.Random(seed_of(self.seed, kind, self.stage_index, epoch)).shuffle(order)
        return [self.parts.train[i] for i in order[place * size:(place + 1) * size]]

    def _epoch(self) -> float:
        """Passes over the training problems so far, all stages together."""
        before = sum(stage.epochs for stage in self.method.stages[:self.stage_index])
        stage = self.method.stages[self.stage_index] if self.method.stages else None
        return before + (self.stage_step / self.steps_per_epoch(stage) if stage else 0)

    # 2. One step -------------------------------------------------------------------------------

    def _one_step(self, progress: Progress) -> None:
        settings, began = self.settings, time.perf_counter()
        weights, stage = self.method.weights(progress), progress.stage
        learning_rate = self._learning_rate(progress)
        gamma = getattr(settings, stage.name).gamma if self.with_entropy else 0.0
        row = {"step": self.step + 1, "stage": stage.name,
               "epoch": round(self._epoch() + 1 / self.steps_per_epoch(stage), 6),
               "lambda/sft": weights.sft, "lambda/rl": weights.rl, "gamma": gamma,
               "learning_rate": learning_rate}
        size = self._batch_size(stage)
        count = settings.rl.updates_per_rollout if weights.rl > 0 else 1

        demonstrations = (self._batch(stage, progress.step, "demonstrations", size)
                          if weights.sft > 0 else [])
        rollouts = None
        if weights.rl > 0:
            rollouts = self._roll_out(self._batch(stage, progress.step, "prompts", size), row)
        sampled_at = time.perf_counter()

        updates = [self._make_update(demonstrations[i::count], rollouts, i, count, weights, gamma)
                   for i in range(count)]
        if rollouts and (self.learner.needs_reference or
                         self.step % settings.rl.reference_every == 0):
            self._score_reference(updates, rollouts, row)

        totals, norms = Totals(), []
        for index, update in enumerate(updates):
            if not norms and self.learner.has_gradient(update).any():
                self._score_old(updates[index + 1:])
            norm = self.learner.apply(update, learning_rate, totals)
            if norm is not None:
                norms.append(norm)
        finite = [norm for norm in norms if math.isfinite(norm)]
        self.step += 1
        self.stage_step += 1
        measured = ("loss/sft", "loss/rl", "kl/old", "clip_ratio")
        for name in measured if rollouts else (*measured, "entropy"):
            if name in totals.sums:
                value = totals.mean(name)
                if name.startswith("loss/"):  # the loss itself, without its lambda
                    share = weights.sft if name == "loss/sft" else weights.rl
                    value = totals.sums[name] / (count * share)
                if value is not None and math.isfinite(value):  # JSON has no NaN: absent instead
                    row[name] = value
        if finite or not norms:
            row["grad_norm"] = sum(finite) / max(1, len(finite))
        row["updates"] = len(finite)
        if len(norms) > len(finite):
            row["updates_not_finite"] = len(norms) - len(finite)
        row["tokens"] = sum(self.tokens.values())
        now = time.perf_counter()
        row["seconds/sampling"] = round(sampled_at - began, 4)
        row["seconds/update"] = round(now - sampled_at, 4)
        row["seconds/step"] = round(now - began, 4)
        begun = self.health.see(row)
        if self.health.active:
            row["warnings"] = sorted(self.health.active)
        self.folder.append("metrics.jsonl", row)
        for alarm in begun:
            self.observer.on_warning(alarm.name, str(alarm))
        self.observer.on_step(row, self.total_steps())

    def _learning_rate(self, progress: Progress) -> float:
        """A linear decay from the peak to a fraction of it, times a linear warm-up from 0 to 1."""
        training = self.settings.training
        peak = getattr(self.settings, progress.stage.name).learning_rate
        warm = min(1.0, (progress.step + 1) / max(1, training.warmup_steps))
        left = 1 - progress.step / max(1, progress.steps)
        floor = training.final_learning_rate_fraction
        return peak * warm * (floor + (1 - floor) * left)

    # 3. Rollouts, rewards, advantages ----------------------------------------------------------

    def _roll_out(self, problems: list[Problem], row: dict) -> list[tuple[Group, Tensor, Tensor]]:
        """Samples G answers a problem and judges them: [(group, rewards (G,), advantages (G,))]."""
        rl = self.settings.rl
        groups = sample(
            self.policy, [self.policy.encode_prompt(p.question) for p in problems],
            samples=rl.group_size, max_new_tokens=rl.max_new_tokens, temperature=rl.temperature,
            seed=seed_of(self.seed, "rollouts", self.step),
            batch_size=self.settings.evaluation.batch_size)
        verdicts = verdicts_of(problems, groups, self.verifier)
        rewards = torch.tensor([float(v.strict) for v in verdicts]).view(-1, rl.group_size)
        advantages = group_advantages(rewards, rl.advantage_scale)
        row |= reward_metrics(groups, rewards)
        reasons = [v.reason for v in verdicts]
        row["verdicts"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        self.tokens["rollouts"] += sum(len(c.token_ids) for g in groups for c in g.completions)
        if self.step % self.settings.training.samples_every == 0:
            self._log_samples(problems[0], groups[0], rewards[0])
        return list(zip(groups, rewards, advantages, strict=True))

    def _log_samples(self, problem: Problem, group: Group, rewards: Tensor) -> None:
        for completion, reward in list(zip(group.completions, rewards.tolist(), strict=True))[:2]:
            row = {"step": self.step + 1, "id": problem.id, "prompt": problem.question,
                   "completion": completion.text, "finished": completion.finished,
                   "reward": reward, "gold": problem.answer}
            self.folder.append("samples.jsonl", row)
            self.observer.on_sample(row)

    # 4. The weights of the loss ----------------------------------------------------------------

    def _make_update(self, demonstrations: Sequence[Problem], rollouts, index: int, count: int,
                     weights, gamma: float) -> Update:
        """Mini-batch `index` of `count`: whole groups, with every token's weight in the loss."""
        settings = self.settings
        taught = [PromptCompletion(self.policy.encode_prompt(p.question),
                                   self.policy.encode_completion(p.solution))
                  for p in demonstrations]
        groups = rollouts[index::count] if rollouts else []
        sampled = [PromptCompletion(group.prompt_ids, completion.token_ids)
                   for group, _, _ in groups for completion in group.completions]
        self.tokens["demonstrations"] += sum(len(s.completion) for s in taught)

        def spread(sequences, normalisation, factor):
            lengths = torch.tensor([len(s.completion) for s in sequences])
            if not sequences or factor == 0:
                return torch.zeros(len(sequences))
            return factor * token_weights(lengths, normalisation, settings.rl.max_new_tokens)

        none_taught, none_sampled = torch.zeros(len(taught)), torch.zeros(len(sampled))
        return Update(
            sequences=taught + sampled,
            sft=torch.cat([spread(taught, settings.sft.loss_normalisation, weights.sft),
                           none_sampled]),
            rl=torch.cat([none_taught,
                          spread(sampled, settings.rl.loss_normalisation, weights.rl)]),
            entropy=spread(taught + sampled, settings.sft.loss_normalisation, gamma),
            advantages=torch.cat([none_taught, *(advantages for _, _, advantages in groups)]),
            temperature=torch.cat([none_taught + 1, none_sampled + settings.rl.temperature]))

    def _score_old(self, updates: list[Update]) -> None:
        """log pi_old for the mini-batches that come after the first one that moves the policy.

        The training model gives it, not the sampler. Up to that mini-batch none is needed: the
        log-probabilities at hand are the old ones.
        """
        for update in updates:
            update.old = self.learner.scores(update.sequences)

    def _score_reference(self, updates: list[Update], rollouts, row: dict) -> None:
        """log pi_reference of every token, and its k3 divergence from the policy that sampled.

        In fp32 the sampler's own log-probabilities serve for that policy; in half precision they
        differ from the training model's by more than a small divergence, and are computed again.
        """
        total, tokens = 0.0, 0
        for index, update in enumerate(updates):
            with self.policy.reference() as model:
                update.reference = self.learner.scores(update.sequences, model)
            sampled = [c for group, _, _ in rollouts[index::len(updates)]
                       for c in group.completions]
            first = len(update.sequences) - len(sampled)
            theirs = update.reference[first:]
            mine = ([torch.tensor(c.log_probabilities) for c in sampled]
                    if self.policy.precision == "fp32"
                    else self.learner.scores(update.sequences[first:]))
            for now, reference in zip(mine, theirs, strict=True):
                total += float(k3(now.to(reference.device), reference).sum())
                tokens += len(now)
        row["kl/reference"] = total / max(1, tokens)

    # 5. Between steps --------------------------------------------------------------------------

    def _after_step(self, stage: Stage, steps: int, last: bool) -> None:
        settings = self.settings
        per_epoch = self.steps_per_epoch(stage)
        if self.step % settings.probe.every == 0 or last:
            self._probe(stage.name)
        every = per_epoch * settings.training.validate_every
        if self.stage_step % every == 0 or self.stage_step == steps:
            self._validate()
        if self.step % settings.training.checkpoint_every == 0 or self.stage_step == steps:
            self._save_checkpoint()

    def _probe(self, stage_name: str) -> None:
        """The same validation prompts, sampled by every setup: what the joint figures show."""
        probe, problems = self.settings.probe, self.probe_problems
        if not problems:
            return
        groups = sample(
            self.policy, [self.policy.encode_prompt(p.question) for p in problems],
            samples=probe.samples, max_new_tokens=self.settings.rl.max_new_tokens,
            temperature=self.settings.rl.temperature, seed=seed_of(self.seed, "probe", self.step),
            batch_size=self.settings.evaluation.batch_size)
        verdicts = verdicts_of(problems, groups, self.verifier)
        rewards = torch.tensor([float(v.strict) for v in verdicts]).view(-1, probe.samples)
        sequences = [PromptCompletion(g.prompt_ids, c.token_ids)
                     for g in groups for c in g.completions]
        mine = torch.cat(self.learner.scores(sequences))
        with self.policy.reference() as model:
            base = torch.cat(self.learner.scores(sequences, model))
        row = {"step": self.step, "stage": stage_name, "epoch": round(self._epoch(), 6),
               **reward_metrics(groups, rewards), "kl/base": float(k3(mine, base).mean())}
        row["groups_with_signal"] = 1 - row["frac_reward_zero_std"]
        self.folder.append("probe.jsonl", row)
        self.health.see_probe(row)
        self.observer.on_probe(row)

    def _validate(self) -> None:
        """Exact match and token loss on the validation problems; remembers the best weights."""
        problems = list(self.parts.validation)
        if not problems:
            return
        rows = evaluate(self.policy, problems, self.settings.evaluation, self.verifier,
                        part="validation", samples=0, seed=self.seed)
        taught = [PromptCompletion(self.policy.encode_prompt(p.question),
                                   self.policy.encode_completion(p.solution)) for p in problems]
        loss = -float(torch.cat(self.learner.scores(taught, temperature=1.0)).mean())
        row = {"step": self.step, "epoch": round(self._epoch(), 6), "strict": accuracy(rows),
               "loss": loss, "problems": len(problems)}
        self.folder.append("validation.jsonl", row)
        self.observer.on_validation(row)
        if row["strict"] > self.best["strict"]:
            self.best = {"strict": row["strict"], "step": self.step}
            self.best_weights = {k: v.detach().cpu().clone() for k, v in self.weights().items()}

    # 6. Checkpoints ----------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The weights that training moves: all of them, or the adapter's."""
        return {n: p for n, p in self.policy.model.named_parameters() if p.requires_grad}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Puts weights in place of those that training moves."""
        with torch.no_grad():
            for name, parameter in self.weights().items():
                parameter.copy_(weights[name])

    def use_best_weights(self) -> bool:
        """Puts the weights that did best on validation in place; False if they are the last."""
        if self.best_weights is None or self.best["step"] == self.step:
            return False
        self.load_weights(self.best_weights)
        return True

    def _save_checkpoint(self) -> None:
        state = {"step": self.step, "stage_index": self.stage_index, "stage_step": self.stage_step,
                 "tokens": self.tokens, "best": self.best, "resumed_from": self.resumed_from,
                 "seconds": self.clock.read()}

        def write(folder: Path) -> None:
            save_file({k: v.detach().cpu().contiguous() for k, v in self.weights().items()},
                      folder / "weights.safetensors")
            if self.best_weights is not None:
                save_file(self.best_weights, folder / "best.safetensors")
            torch.save(self.learner.optimizer.state_dict(), folder / "optimizer.pt")
            if self.learner.accelerator.scaler is not None:
                torch.save(self.learner.accelerator.scaler.state_dict(), folder / "scaler.pt")
            write_whole(folder / "state.json", to_json(state))

        self.folder.save_checkpoint(self.step, write)

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one; cuts the logs back to it."""
        found = self.folder.newest_checkpoint()
        if found is None:
            self.folder.forget_after(-1)
            return
        step, folder = found
        try:
            self._read_checkpoint(step, folder)
        except Exception as error:  # cut off or no checkpoint of ours: types of four libraries
            raise UserError(
                f"The checkpoint {folder.name} of the run {self.folder.path.parent.name}/"
                f"{self.folder.path.name} cannot be read ({reason(error)}); delete the folder "
                "checkpoint there to start this run again.") from error
        self.folder.forget_after(step)
        self.observer.note(f"going on from the checkpoint of step {step}")

    def _read_checkpoint(self, step: int, folder: Path) -> None:
        """Takes over weights, optimiser and place."""
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.step, self.stage_index = state["step"], state["stage_index"]
        self.stage_step, self.tokens, self.best = (state["stage_step"], state["tokens"],
                                                   state["best"])
        self.resumed_from = [*state["resumed_from"], step]
        self.clock.go_on_from(state["seconds"])
        self.load_weights(load_file(folder / "weights.safetensors"))
        if (folder / "best.safetensors").exists():
            self.best_weights = load_file(folder / "best.safetensors")
        self.learner.new_optimizer()
        self.learner.optimizer.load_state_dict(read_tensors(folder / "optimizer.pt"))
        if self.learner.accelerator.scaler is not None and (folder / "scaler.pt").exists():
            self.learner.accelerator.scaler.load_state_dict(read_tensors(folder / "scaler.pt"))


def read_tensors(path: Path) -> dict:
    """A file that torch.save wrote, if it holds tensors and plain values only.

    The format is a pickle, which could run code. torch refuses that, and advises to switch the
    refusal off: this project does not.

    Raises:
        ValueError: it is damaged or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path.name} is damaged or holds more than tensors") from error


def reward_metrics(groups: Sequence[Group], rewards: Tensor) -> dict:
    """What rollouts say about a policy, by the names of the record.

    Args:
        groups: P groups of G completions.
        rewards: (P, G) of 0 and 1.
    """
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    size = rewards.shape[1]
    right = rewards.sum(1).round().long().tolist()
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(dim=1).mean()) if size > 1 else 0.0,
        "frac_reward_zero_std": sum(n in (0, size) for n in right) / len(right),
        "entropy": sum(sum(c.entropies) for c in completions) / max(1, sum(lengths)),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": sum(not c.finished for c in completions) / len(completions),
        "groups/correct_counts": [right.count(n) for n in range(size + 1)],
    }
