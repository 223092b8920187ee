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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Settings
from .errors import UserError
from .evaluation import accuracy, evaluate, verdicts_of
from .interrupt import Interrupt
from .methods import Method, Progress, Stage
from .objectives import (
    entropy_terms,
    group_advantages,
    is_clipped,
    k3,
    kl_to_old,
    kl_to_reference,
    policy_token_losses,
    sft_token_losses,
    token_weights,
)
from .packing import PromptCompletion, pack
from .policy import Policy
from .problems import Problem, ProblemParts
from .progress import Observer
from .records import RunFolder, seed_of, to_json, write_whole
from .rewards import Verifier
from .rollouts import Group, sample

PATIENCE_WITH_NON_FINITE = 5  # updates in a row with a non-finite gradient before a run stops


@dataclass
class Update:
    """What one optimiser update learns from: S completions and the weight of each one's tokens.

    Attributes:
        sequences: S demonstrations and rollouts.
        sft, rl, entropy: (S,) weight of every token of completion i in L_SFT, L_RL and H, with
            lambda and gamma multiplied in; 0 where a term does not apply.
        advantages: (S,).
        temperature: (S,) that the completion was sampled at; 1 for demonstrations.
        old: log pi_old of every token, a tensor (T_i,) a completion; None while the policy is
            still the one that sampled (then the ratio is 1).
        reference: log pi_reference likewise, when the loss needs it.
    """

    sequences: list[PromptCompletion]
    sft: Tensor
    rl: Tensor
    entropy: Tensor
    advantages: Tensor
    temperature: Tensor
    old: list[Tensor] | None = None
    reference: list[Tensor] | None = None


@dataclass
class Totals:
    """Sums over the tokens of a step, for its line in metrics.jsonl."""

    sums: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, count: int | None = None) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
        self.tokens[name] = self.tokens.get(name, 0) + (
            values.numel() if count is None else count)

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.tokens[name] if self.tokens.get(name) else None


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
    """

    def __init__(self, policy: Policy, method: Method, parts: ProblemParts, settings: Settings, *,
                 with_entropy: bool, seed: int, folder: RunFolder, verifier: Verifier,
                 observer: Observer):
        self.policy, self.method, self.parts, self.settings = policy, method, parts, settings
        self.with_entropy, self.seed, self.folder = with_entropy, seed, folder
        self.verifier, self.observer = verifier, observer
        self.accelerator = Accelerator(
            cpu=policy.device.type == "cpu",
            mixed_precision="fp16" if policy.precision == "fp16" else "no")
        if self.accelerator.num_processes > 1:
            raise UserError("This version trains in one process; start it without 'accelerate "
                            "launch' and use --jobs to run setups side by side.")
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = None
        self.step = self.stage_index = self.stage_step = 0
        self.tokens = {"demonstrations": 0, "rollouts": 0}
        self.best = {"strict": -1.0, "step": 0}
        self.best_weights: dict[str, Tensor] | None = None
        self.resumed_from: list[int] = []
        self.skipped_in_a_row = 0
        self.probe_problems = list(parts.validation)[:settings.probe.prompts]
        policy.keep_reference()

    # 1. The loop -------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs all stages from where the last checkpoint left off.

        Raises:
            UserError: stopped by Ctrl-C (after a checkpoint), or the loss stopped being finite.
        """
        self._resume()
        if self.step == 0 and not self.folder.lines("probe.jsonl"):
            self._probe(self.method.stages[0].name if self.method.stages else "base")
        stages = self.method.stages
        with Interrupt() as interrupt:
            for index in range(self.stage_index, len(stages)):
                stage = stages[index]
                if index != self.stage_index:
                    self.stage_index, self.stage_step = index, 0
                    self.optimizer = None  # a stage starts with a fresh optimiser and warm-up
                steps = self.steps_of(stage)
                if self.optimizer is None:
                    self.optimizer = self._new_optimizer()
                while self.stage_step < steps:
                    self._one_step(Progress(stage, self.stage_step, steps))
                    self._after_step(stage, steps, last=index + 1 == len(stages)
                                     and self.stage_step == steps)
                    if interrupt.asked:
                        self._save_checkpoint()
                        raise UserError(f"Stopped by you after step {self.step}; the checkpoint is "
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
        self._score_old(updates)
        if rollouts and (self._needs_reference() or
                         self.step % settings.rl.reference_every == 0):
            self._score_reference(updates, row)

        totals, norms = Totals(), []
        for update in updates:
            norm = self._apply(update, learning_rate, totals)
            if norm is not None:
                norms.append(norm)
        self.step += 1
        self.stage_step += 1
        for name in ("loss/sft", "loss/rl", "kl/old", "clip_ratio"):
            if name in totals.sums:
                row[name] = (totals.sums[name] / count if name.startswith("loss/")
                             else totals.mean(name))
        if not rollouts:
            row["entropy"] = totals.mean("entropy")
        row["grad_norm"] = sum(norms) / len(norms) if norms else 0.0
        row["updates"] = len(norms)
        row["tokens"] = sum(self.tokens.values())
        now = time.perf_counter()
        row["seconds/sampling"] = round(sampled_at - began, 4)
        row["seconds/update"] = round(now - sampled_at, 4)
        row["seconds/step"] = round(now - began, 4)
        self.folder.append("metrics.jsonl", row)
        self.observer.on_step(row, self.total_steps())

    def _learning_rate(self, progress: Progress) -> float:
        """Linear warm-up, then linear decay to a fraction of the peak."""
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
        entropy_mean = ("token_mean" if settings.training.entropy == "vocabulary"
                        else settings.sft.loss_normalisation)
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
            entropy=spread(taught + sampled, entropy_mean, gamma),
            advantages=torch.cat([none_taught, *(advantages for _, _, advantages in groups)]),
            temperature=torch.cat([none_taught + 1, none_sampled + settings.rl.temperature]))

    def _has_gradient(self, update: Update) -> Tensor:
        """(S,) bool: the completions that can move the policy.

        A group of equal rewards has no policy gradient. While the policy is still the one that
        sampled, the KL to it has none either. Without an entropy term such a group is skipped.
        """
        anchored = self.settings.rl.beta > 0 and (
            self.settings.rl.kl_anchor == "reference" or update.old is not None)
        return ((update.sft != 0) | (update.entropy != 0)
                | ((update.rl != 0) & ((update.advantages != 0) | anchored)))

    def _needs_reference(self) -> bool:
        return self.settings.rl.beta > 0 and self.settings.rl.kl_anchor == "reference"

    def _score_old(self, updates: list[Update]) -> None:
        """log pi_old for the mini-batches that come after the first update.

        The training model gives it, not the sampler. The first mini-batch needs none: its own
        log-probabilities are the old ones.
        """
        for update in updates[1:]:
            update.old = self._scores(update.sequences)

    def _score_reference(self, updates: list[Update], row: dict) -> None:
        total, tokens = 0.0, 0
        with self.policy.reference() as model:
            for update in updates:
                update.reference = self._scores(update.sequences, model)
        for update in updates:
            current = update.old or self._scores(update.sequences)
            for mine, theirs, weight in zip(current, update.reference, update.rl, strict=True):
                if weight != 0:
                    total, tokens = total + float(k3(mine, theirs).sum()), tokens + len(mine)
        row["kl/reference"] = total / max(1, tokens)

    @torch.no_grad()
    def _scores(self, sequences: Sequence[PromptCompletion], model=None,
                temperature: float | None = None) -> list[Tensor]:
        """Log-probabilities (T_i,) of every completion under the policy or another model."""
        temperature = temperature or self.settings.rl.temperature
        result: list[Tensor] = [torch.empty(0)] * len(sequences)
        for packed in pack(sequences, self.settings.training.micro_batch_tokens,
                           self.policy.pad_id):
            scores, _ = self.policy.score(
                packed.to(self.policy.device), temperature=temperature,
                chunk_tokens=self.settings.training.logit_chunk_tokens, with_entropy=False,
                model=model)
            lengths = packed.sequence.unique_consecutive(return_counts=True)
            for index, piece in zip(lengths[0].tolist(), scores.split(lengths[1].tolist()),
                                    strict=True):
                result[index] = piece
        return result

    # 5. The update -----------------------------------------------------------------------------

    def _apply(self, update: Update, learning_rate: float, totals: Totals) -> float | None:
        """Accumulates the gradient over micro-batches and steps; returns its norm before clipping.

        Returns None where there was nothing to learn from, or the gradient was not finite.
        """
        keep = self._has_gradient(update).nonzero().squeeze(-1).tolist()
        self._count_skipped(update, keep, totals)
        if not keep:
            return None
        sequences = [update.sequences[i] for i in keep]
        for packed in pack(sequences, self.settings.training.micro_batch_tokens,
                           self.policy.pad_id):
            loss = self._loss(update, keep, packed, totals)
            self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.parameters,
                                                self.settings.training.gradient_clip)
        norm = float(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        finite = math.isfinite(norm)
        if finite or self.accelerator.mixed_precision == "fp16":  # the scaler skips by itself
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= PATIENCE_WITH_NON_FINITE:
            raise UserError(
                f"The gradient was not finite {self.skipped_in_a_row} times in a row, last at step "
                f"{self.step + 1}; lower the learning rate or set model.precision=fp32.")
        return norm if finite else None

    def _count_skipped(self, update: Update, keep: list[int], totals: Totals) -> None:
        """Skipped completions count as what they are: ratio 1, no KL, not clipped."""
        skipped = sum(len(s.completion) for s in update.sequences) - sum(
            len(update.sequences[i].completion) for i in keep)
        if skipped:
            for name in ("kl/old", "clip_ratio"):
                totals.add(name, torch.zeros(1), skipped)
            totals.add("loss/rl", torch.zeros(1))

    def _loss(self, update: Update, keep: list[int], packed, totals: Totals) -> Tensor:
        """The part of L that the tokens of one micro-batch make up."""
        settings, device = self.settings, self.policy.device
        packed = packed.to(device)
        owners = torch.tensor(keep)[packed.sequence.cpu()]  # (N,) index into update.sequences

        def per_token(values: Tensor) -> Tensor:
            return values[owners].to(device)

        scores, entropies = self.policy.score(
            packed, temperature=per_token(update.temperature),
            chunk_tokens=settings.training.logit_chunk_tokens)

        sft, rl, entropy = (per_token(w) for w in (update.sft, update.rl, update.entropy))
        loss = scores.new_zeros(())
        if (sft != 0).any():
            part = (sft * sft_token_losses(scores)).sum()
            loss = loss + part
            totals.add("loss/sft", part.detach())
        if (rl != 0).any():
            old = scores.detach() if update.old is None else self._flat(update.old, owners)
            advantages = per_token(update.advantages)
            bounds = (settings.rl.epsilon_low, settings.rl.epsilon_high)
            losses = policy_token_losses(scores, old, advantages, *bounds)
            if settings.rl.beta > 0:
                if self._needs_reference():
                    divergence = kl_to_reference(scores, old,
                                                 self._flat(update.reference, owners))
                else:
                    divergence = kl_to_old(scores, old)
                losses = losses + settings.rl.beta * divergence
            part = (rl * losses).sum()
            loss = loss + part
            chosen = rl != 0
            totals.add("loss/rl", part.detach())
            totals.add("kl/old", kl_to_old(scores.detach(), old)[chosen])
            totals.add("clip_ratio",
                       is_clipped(scores.detach(), old, advantages, *bounds)[chosen].float())
        if (entropy != 0).any():
            terms = entropy_terms(scores, entropies, settings.training.entropy)
            loss = loss - (entropy * terms).sum()
        totals.add("entropy", entropies.detach())
        return loss

    def _flat(self, values: list[Tensor], owners: Tensor) -> Tensor:
        """(N,) per-token values in the order of a micro-batch; its completions are contiguous."""
        return torch.cat([values[i] for i in owners.unique_consecutive().tolist()])

    # 6. Between steps --------------------------------------------------------------------------

    def _after_step(self, stage: Stage, steps: int, last: bool) -> None:
        settings = self.settings
        per_epoch = self.steps_per_epoch(stage)
        if self.step % settings.probe.every == 0 or last:
            self._probe(stage.name)
        if self.stage_step % (per_epoch * settings.training.validate_every) == 0:
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
        mine = torch.cat(self._scores(sequences))
        with self.policy.reference() as model:
            base = torch.cat(self._scores(sequences, model))
        row = {"step": self.step, "stage": stage_name, "epoch": round(self._epoch(), 6),
               **reward_metrics(groups, rewards), "kl/base": float(k3(mine, base).mean())}
        row["groups_with_signal"] = 1 - row["frac_reward_zero_std"]
        self.folder.append("probe.jsonl", row)
        self.observer.on_probe(row)

    def _validate(self) -> None:
        """Exact match and mean token loss on the validation problems; remembers the best weights."""
        problems = list(self.parts.validation)
        if not problems:
            return
        rows = evaluate(self.policy, problems, self.settings.evaluation, self.verifier,
                        part="validation", samples=0, seed=self.seed)
        taught = [PromptCompletion(self.policy.encode_prompt(p.question),
                                   self.policy.encode_completion(p.solution)) for p in problems]
        loss = -float(torch.cat(self._scores(taught, temperature=1.0)).mean())
        row = {"step": self.step, "epoch": round(self._epoch(), 6), "strict": accuracy(rows),
               "loss": loss, "problems": len(problems)}
        self.folder.append("validation.jsonl", row)
        self.observer.on_validation(row)
        if row["strict"] > self.best["strict"]:
            self.best = {"strict": row["strict"], "step": self.step}
            self.best_weights = {k: v.detach().cpu().clone() for k, v in self.weights().items()}

    # 7. Checkpoints ----------------------------------------------------------------------------

    def _new_optimizer(self):
        training = self.settings.training
        return self.accelerator.prepare(torch.optim.AdamW(
            self.parameters, lr=0.0, betas=tuple(training.betas),
            weight_decay=training.weight_decay))

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
                 "tokens": self.tokens, "best": self.best, "resumed_from": self.resumed_from}

        def write(folder: Path) -> None:
            save_file({k: v.detach().cpu().contiguous() for k, v in self.weights().items()},
                      folder / "weights.safetensors")
            if self.best_weights is not None:
                save_file(self.best_weights, folder / "best.safetensors")
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            if self.accelerator.scaler is not None:
                torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")
            write_whole(folder / "state.json", to_json(state))

        self.folder.save_checkpoint(self.step, write)

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one; cuts the logs back to it."""
        found = self.folder.newest_checkpoint()
        if found is None:
            self.folder.forget_after(-1)
            return
        step, folder = found
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.step, self.stage_index = state["step"], state["stage_index"]
        self.stage_step, self.tokens, self.best = (state["stage_step"], state["tokens"],
                                                   state["best"])
        self.resumed_from = [*state["resumed_from"], step]
        self.load_weights(load_file(folder / "weights.safetensors"))
        if (folder / "best.safetensors").exists():
            self.best_weights = load_file(folder / "best.safetensors")
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict(
            torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        if self.accelerator.scaler is not None and (folder / "scaler.pt").exists():
            self.accelerator.scaler.load_state_dict(
                torch.load(folder / "scaler.pt", weights_only=True))
        self.folder.forget_after(step)
        self.observer.note(f"going on from the checkpoint of step {step}")


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
