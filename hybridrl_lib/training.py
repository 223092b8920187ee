"""Algorithm 1 as one loop: problems -> rollouts -> rewards -> advantages -> loss -> update.

    L = lambda_SFT * L_SFT + lambda_RL * L_RL - gamma * H

A method says at every step what the two lambdas are. A step with lambda_SFT > 0 takes a batch of
demonstrations, a step with lambda_RL > 0 samples G answers to a batch of problems. The method makes
updates of them (`methods/method.py`); everything else is the same for all methods.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from .checkpoints import Checkpoints, Snapshot
from .config import Settings
from .distributed import any_of, from_first, is_first, together
from .entropy_control import EntropyControl
from .errors import Stopped, UserError, reason
from .evaluation import accuracy, distinct_answers, evaluate, verdicts_of
from .health import Health, replay
from .interrupt import Interrupt
from .judging import Judge, reward_metrics
from .methods.method import Method, Progress, Stage
from .objectives import k3
from .packing import PromptCompletion
from .policy import Policy
from .problems import Problem, ProblemParts, in_turn
from .progress import Observer, Stopwatch
from .records import RunFolder, seed_of
from .rewards import Verifier
from .rollouts import Group, sample
from .sharding import like, whole
from .steps import Step
from .updates import Learner, Totals, Update


class Trainer:
    """Trains one policy by one method and keeps its record.

    Args:
        policy: the model; its weights now are the base of every KL in the record.
        method: decides stages, lambdas and updates.
        parts: training, validation and test problems.
        settings: all settings of the run.
        with_entropy: whether gamma of the stage is in the loss.
        seed: order of the problems and all sampling.
        folder: where logs and checkpoints go.
        verifier: gives the verdicts.
        observer: told what happens.
        clock: runs since the run began; a new one unless given.
    """

    def __init__(self, policy: Policy, method: Method, parts: ProblemParts, settings: Settings, *,
                 with_entropy: bool, seed: int, folder: RunFolder, verifier: Verifier,
                 observer: Observer, clock: Stopwatch | None = None):
        self.policy, self.method, self.parts, self.settings = policy, method, parts, settings
        self.with_entropy, self.seed, self.folder = with_entropy, seed, folder
        self.verifier, self.observer = verifier, observer
        self.judge = Judge(policy, method, parts.train, settings, verifier, self._count_and_show)
        self.clock = clock or Stopwatch()
        policy.keep_reference()
        method.begin(self)  # before the learner, which trains what the method lets it train
        self.learner, self.checkpoints = Learner(policy, settings), Checkpoints(folder)
        self.entropy_control = self.learner.entropy_control = EntropyControl(settings, seed)
        self.anchor_weights: dict[str, Tensor] | None = None
        self.step = self.stage_index = self.stage_step = 0
        self.tokens = {"demonstrations": 0, "rollouts": 0}
        self.best = {"strict": -1.0, "step": 0}
        self.best_weights: dict[str, Tensor] | None = None
        self.resumed_from: list[int] = []
        self.health = Health()
        self.probe_problems = in_turn(parts.validation)[:settings.probe.prompts]

    # 1. The loop -------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs all stages from where the last checkpoint left off.

        Raises:
            Stopped: by Ctrl-C, after a checkpoint.
            UserError: the loss stopped being finite.
        """
        self._resume()
        steps, probes = from_first(
            lambda: [self.folder.lines(name) for name in ("metrics.jsonl", "probe.jsonl")])
        self.health = replay(steps, probes)
        if self.step == 0 and not probes:
            self._probe(self.method.stages[0].name if self.method.stages else "base")
        with Interrupt() as interrupt:
            while self.stage_index < len(self.method.stages):
                if self.learner.optimizer is None:
                    self._begin_stage()
                while self.stage_step < self.steps_of(self.stage):
                    self._one_step(self._progress())
                    self._after_step()
                    if any_of(interrupt.asked):
                        self._save_checkpoint()
                        raise Stopped(f"Stopped by you after step {self.step}; the checkpoint is "
                                      "written, and the same command goes on from there.")
                if self.stage_index + 1 == len(self.method.stages):
                    break
                self.stage_index, self.stage_step = self.stage_index + 1, 0
                self.learner.optimizers.clear()  # a stage starts with fresh ones, and warm-up

    def _begin_stage(self) -> None:
        """A fresh optimiser; and the KL anchor, where that is what the stage starts from."""
        self.learner.new_optimizer()
        if self.learner.needs_anchor and self.settings.rl.kl_anchor == "stage":
            self.anchor_weights = {name: weight.detach().clone()
                                   for name, weight in self.weights().items()}

    @property
    def stage(self) -> Stage:
        """The stage that the run is in."""
        return self.method.stages[self.stage_index]

    def _progress(self) -> Progress:
        return Progress(self.stage, self.stage_step, self.steps_of(self.stage), self.step,
                        self.seed)

    def steps_of(self, stage: Stage) -> int:
        """How many steps a stage has."""
        return (stage.epochs * self.steps_per_epoch(stage) if stage.steps is None
                else stage.steps)

    def steps_per_epoch(self, stage: Stage) -> int:
        return max(1, math.ceil(len(self.parts.train) / self._batch_size(stage)))

    @property
    def not_finite(self) -> int:
        """Updates so far that were skipped for a gradient that was not finite."""
        return sum(row.get("updates_not_finite", 0) for row in self.folder.lines("metrics.jsonl"))

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
        past = [stage.epochs if stage.steps is None else stage.steps / self.steps_per_epoch(stage)
                for stage in self.method.stages[:self.stage_index]]
        now = self.stage_step / self.steps_per_epoch(self.stage) if self.method.stages else 0
        return sum(past) + now

    # 2. One step -------------------------------------------------------------------------------

    def _one_step(self, progress: Progress) -> None:
        settings, began = self.settings, time.perf_counter()
        weights, stage = self.method.weights(progress), progress.stage
        gamma = getattr(settings, stage.name).gamma if self.with_entropy else 0.0
        row = {"step": self.step + 1, "stage": stage.name,
               "epoch": round(self._epoch() + 1 / self.steps_per_epoch(stage), 6),
               "lambda/sft": weights.sft, "lambda/rl": weights.rl, "gamma": gamma,
               "learning_rate": self._learning_rate(progress)}
        step = Step(progress, settings, self.learner, weights, gamma,
                    {name: self._learning_rate(progress, name) for name in ("sft", "rl")}, row)
        size = self._batch_size(stage)
        if weights.sft > 0:
            step.demonstrations = self._batch(stage, progress.step, "demonstrations", size)
        if weights.rl > 0:
            step.rollouts = self.judge.roll_out(
                self._batch(stage, progress.step, "prompts", size), progress, row)
            step.gamma += self.entropy_control.begin_step(self.step, row["entropy"])
            row["gamma"] = step.gamma
        sampled_at = time.perf_counter()

        if step.rollouts and (self.step % settings.rl.reference_every == 0
                              or self.learner.needs_anchor or self.method.needs_reference):
            self._score_reference(step)
        updates, totals = self.method.compose(step), Totals()
        self.learner.place = place_of(step, self.step + 1)
        self.tokens["demonstrations"] += sum(
            len(s.completion) for u in updates for s in u.sequences[:u.demonstrations])
        norms = self.method.learn(step, updates, totals)
        self.step += 1
        self.stage_step += 1
        row |= measured(totals, updates, with_rollouts="reward" in row)
        row |= gradient_metrics(norms, totals.counts.get("left_out", 0))
        row |= self.entropy_control.columns if weights.rl > 0 else {}
        row["tokens"] = sum(self.tokens.values())
        now = time.perf_counter()
        row["seconds/sampling"] = round(sampled_at - began, 4)
        row["seconds/update"] = round(now - sampled_at, 4)
        row["seconds/step"] = round(now - began, 4)
        row = finite_values(row)
        self.method.after_step(row, progress)
        row = finite_values(row)
        begun = self.health.see(row)
        if self.health.active:
            row["warnings"] = sorted(self.health.active)
        self.folder.append("metrics.jsonl", row)
        for alarm in begun:
            self.observer.on_warning(alarm.name, str(alarm))
        self.observer.on_step(row, self.total_steps())

    def _learning_rate(self, progress: Progress, section: str = "") -> float:
        """A linear decay from the peak to a fraction of it, times a linear warm-up from 0 to 1."""
        training = self.settings.training
        peak = getattr(self.settings, section or progress.stage.name).learning_rate
        warm = min(1.0, (progress.step + 1) / max(1, training.warmup_steps))
        left = 1 - progress.step / max(1, progress.steps)
        floor = training.final_learning_rate_fraction
        return peak * warm * (floor + (1 - floor) * left)

    # 3. Beside the updates ---------------------------------------------------------------------

    def _count_and_show(self, problems: Sequence[Problem], groups: Sequence[Group],
                        rewards: Tensor, first: bool) -> None:
        """Counts the tokens of a round of sampling; now and then its first answers are kept."""
        self.tokens["rollouts"] += sum(len(c.token_ids) for g in groups for c in g.completions)
        if first and self.step % self.settings.training.samples_every == 0:
            self._log_samples(problems[0], groups[0], rewards[0])

    def _log_samples(self, problem: Problem, group: Group, rewards: Tensor) -> None:
        for completion, reward in list(zip(group.completions, rewards.tolist(), strict=True))[:2]:
            row = {"step": self.step + 1, "id": problem.id, "prompt": problem.question,
                   "completion": completion.text, "finished": completion.finished,
                   "reward": reward, "gold": problem.answer}
            self.folder.append("samples.jsonl", row)
            self.observer.on_sample(row)

    def _score_reference(self, step: Step) -> None:
        """log pi of every token under the reference and the loss's anchor, and their k3 divergences
        from the policy that sampled."""
        count, tokens, apart = step.mini_batches, 0, {"reference": 0.0}
        for rollouts in (step.rollouts[index::count] for index in range(count)):
            sequences = [s for rollout in rollouts for s in rollout.sequences]
            with self.policy.reference() as model:
                reference = iter(self.learner.scores(sequences, model))
            mine = step.scores_when_sampled(rollouts)
            for rollout, scores in zip(rollouts, mine, strict=True):
                rollout.reference = [next(reference) for _ in scores]
                rollout.anchor = rollout.reference if self.learner.needs_anchor else None
                apart["reference"] += divergence(scores, rollout.reference)
                tokens += sum(map(len, scores))
            if self.anchor_weights is not None:
                with self.policy.with_weights(self.anchor_weights):
                    anchor = iter(self.learner.scores(sequences))
                for rollout, scores in zip(rollouts, mine, strict=True):
                    rollout.anchor = [next(anchor) for _ in scores]
                    apart["anchor"] = apart.get("anchor", 0.0) + divergence(scores, rollout.anchor)
        step.row |= {f"kl/{name}": total / max(1, tokens) for name, total in apart.items()}

    # 4. Between steps --------------------------------------------------------------------------

    def _after_step(self) -> None:
        """Probe, validation and checkpoint, where they are due; the method may end the stage."""
        settings, stage = self.settings, self.stage
        every = self.steps_per_epoch(stage) * settings.training.validate_every
        probed = self.step % settings.probe.every == 0 or self._at_end()
        validated = self.stage_step % every == 0 or self._stage_over()
        if probed:
            self._probe(stage.name)
        if validated:
            self._validate()
        if self._at_end() and not probed:  # the method has just ended it
            self._probe(stage.name)
        if self._stage_over() and not validated:
            self._validate()
        if self.step % settings.training.checkpoint_every == 0 or self._stage_over():
            self._save_checkpoint()

    def _stage_over(self) -> bool:
        return self.stage_step >= self.steps_of(self.stage)

    def _at_end(self) -> bool:
        return self._stage_over() and self.stage_index + 1 == len(self.method.stages)

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
               **reward_metrics(groups, rewards), "kl/base": float(k3(mine, base).mean()),
               "distinct_answers": distinct_answers(groups)}
        row["groups_with_signal"] = 1 - row["frac_reward_zero_std"]
        self.folder.append("probe.jsonl", row)
        if self.step:
            self.method.after_probe(row, self._progress())
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
        self.method.after_validation(row, self._progress())
        self.observer.on_validation(row)
        if row["strict"] > self.best["strict"]:
            self.best = {"strict": row["strict"], "step": self.step}
            self.best_weights = self.copy_of_weights()

    # 5. Checkpoints ----------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The weights that training moves: all of them, or the adapter's."""
        return self.policy.trained_weights()

    def copy_of_weights(self) -> dict[str, Tensor]:
        """The same as they are now, whole and on the CPU."""
        with whole(self.policy.model):
            return {k: v.detach().cpu().clone() for k, v in self.weights().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Puts weights in place of those that training moves."""
        with torch.no_grad():
            for name, parameter in self.weights().items():
                parameter.copy_(like(weights[name], parameter))

    def use_best_weights(self) -> bool:
        """Puts the weights that did best on validation in place; False if they are the last."""
        if self.best_weights is None or self.best["step"] == self.step:
            return False
        self.load_weights(self.best_weights)
        return True

    def _save_checkpoint(self) -> None:
        state = {"step": self.step, "stage_index": self.stage_index, "stage_step": self.stage_step,
                 "tokens": self.tokens, "best": self.best, "resumed_from": self.resumed_from,
                 "verdicts": dict(self.verifier.counts), "seconds": self.seconds(),
                 "method": self.method.state(), "entropy_control": self.entropy_control.state(),
                 "stages": [asdict(stage) for stage in self.method.stages]}
        scaler = self.learner.accelerator.scaler
        more = {f"method/{name}": tensor for name, tensor in self.method.tensors().items()}
        more |= {f"anchor/{name}": w for name, w in (self.anchor_weights or {}).items()}
        moments = self.learner.optimizer_states()
        with whole(self.policy.model):
            from_first(lambda: self.checkpoints.save(self.step, Snapshot(
                state, self.weights(), self.best_weights, moments,
                None if scaler is None else scaler.state_dict(), more).write))

    def seconds(self) -> list[float]:
        """[wall, processor] so far, the second of all processes together."""
        wall, processor = self.clock.read()
        return [wall, round(sum(together(lambda: processor)), 2)]

    def _resume(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one."""
        found = from_first(lambda: self.checkpoints.resume(self.observer.note))
        if found is None:
            return
        step, folder = found
        try:
            self._take_over(step, Snapshot.read(folder))
        except Exception as error:  # no checkpoint of ours: the types of four libraries
            raise UserError(
                f"The checkpoint {folder.name} of the run {self.folder.path.parent.name}/"
                f"{self.folder.path.name} cannot be read ({reason(error)}); delete the folder "
                "checkpoint there to start this run again.") from error
        self.observer.note(f"going on from the checkpoint of step {step}")

    def _take_over(self, step: int, snapshot: Snapshot) -> None:
        """Weights, optimiser and place of a checkpoint."""
        state = snapshot.state
        self.step, self.stage_index = state["step"], state["stage_index"]
        self.stage_step, self.tokens, self.best = (state["stage_step"], state["tokens"],
                                                   state["best"])
        self.resumed_from = [*state["resumed_from"], step]
        self.verifier.counts.update(state["verdicts"])
        wall, processor = state["seconds"]
        self.clock.go_on_from([wall, processor if is_first() else 0.0])
        self.load_weights(snapshot.weights)
        self.best_weights = snapshot.best
        self.learner.load_optimizer_states(snapshot.optimizer)
        more: dict[str, dict[str, Tensor]] = {"method": {}, "anchor": {}}
        for name, tensor in snapshot.more.items():
            whose, _, own = name.partition("/")
            more[whose][own] = tensor
        if more["anchor"]:
            self.anchor_weights = {name: tensor.to(self.policy.device)
                                   for name, tensor in more["anchor"].items()}
        self.method.stages = tuple(Stage(**stage) for stage in state["stages"])
        self.method.load_state(state["method"])
        self.entropy_control.load_state(state["entropy_control"])
        self.method.load_tensors(more["method"])
        if self.learner.accelerator.scaler is not None and snapshot.scaler is not None:
            self.learner.accelerator.scaler.load_state_dict(snapshot.scaler)


def divergence(scores: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Sum of k3 over the tokens of a problem's answers.

    Args:
        scores, theirs: (T_i,) log-probabilities of each answer, of the sampler and of another.
    """
    return sum(float(k3(mine.to(other.device), other).sum())
               for mine, other in zip(scores, theirs, strict=True))


def place_of(step: Step, number: int) -> str:
    """`step 12 (rl) with the problems a, b, c and 13 more`, for an error."""
    ids = [p.id for p in step.demonstrations] + [r.problem.id for r in step.rollouts]
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    first = ", ".join(ids[:3])
    return f"step {number} ({step.progress.stage.name}) with the problems {first}{more}"


def finite_values(row: dict) -> dict:
    """The row without numbers that are not finite: JSON has none, and they teach nothing."""
    return {name: value for name, value in row.items()
            if not isinstance(value, float) or math.isfinite(value)}


def measured(totals: Totals, updates: Sequence[Update], with_rollouts: bool) -> dict:
    """What the updates of a step measured: means over tokens, and each loss without its lambda."""
    row = {}
    for name in ("loss/sft", "loss/rl", "kl/old", "clip_ratio", *(() if with_rollouts else
                                                                  ("entropy",))):
        if name not in totals.sums:
            continue
        value = totals.mean(name)
        if name.startswith("loss/"):
            uses = sum(getattr(update, name.replace("loss/", "lambda_")) > 0 for update in updates)
            value = totals.sums[name] / max(1, uses)
        if value is not None:
            row[name] = value
    return row


def gradient_metrics(norms: Sequence[float], left_out: int = 0) -> dict:
    """Mean norm before clipping, number of updates, and of those skipped for a norm not finite.

    Args:
        left_out: how many of them moved nothing, as their norm was above `Update.largest_norm`.
    """
    finite = [norm for norm in norms if math.isfinite(norm)]
    row: dict = {}
    if finite or not norms:
        row["grad_norm"] = sum(finite) / max(1, len(finite))
    row["updates"] = len(finite) - left_out
    if len(norms) > len(finite):
        row["updates_not_finite"] = len(norms) - len(finite)
    return row
