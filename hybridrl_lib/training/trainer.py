"""Algorithm 1 of the paper as one loop: sample -> reward -> advantages -> loss -> update.

    L = lambda_SFT L_SFT + lambda_RL L_RL - gamma H

A method sets the two lambdas at every step. A step with lambda_SFT > 0 takes a batch of
demonstrations, a step with lambda_RL > 0 samples G answers per problem. The method turns them into
updates (`methods/method.py`); everything else is the same for all methods.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ..config.settings import Settings
from ..learning.entropy_control import EntropyControl
from ..learning.learner import Learner
from ..learning.progress import Progress, Stage, Weights
from ..learning.step import Step
from ..learning.update import Totals, Update
from ..methods.method import Method, Run
from ..policy.completions import Group
from ..policy.policy import Policy
from ..problems.problem import Problem
from ..problems.splits import ProblemParts, in_turn
from ..records.health import Health, replay
from ..records.run_folder import RunFolder
from ..rewards.verifier import Verifier
from ..system.errors import Stopped, UserError, reason
from ..system.interrupt import Interrupt
from ..system.processes import any_of, from_first, is_first, together
from ..system.seeds import seed_of
from .checkpoints import Checkpoints, Snapshot
from .judge import Judge
from .measuring import Measuring
from .metrics import finite_values, gradient_metrics, place_of, update_metrics
from .observer import Observer, Stopwatch


class Trainer:
    """Trains one policy by one method and keeps its record.

    Args:
        policy: the model; its present weights are the base of every KL in the record.
        method: decides stages, lambdas, and updates.
        parts: training, validation, and test problems.
        settings: all settings of the run.
        with_entropy: whether gamma of the stage is in the loss.
        seed: order of the problems and all sampling.
        folder: where logs and checkpoints go.
        verifier: gives the verdicts.
        observer: receives the events.
        clock: runs since the run began; default: a new one.
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
        # Before the learner, which trains what the method lets it train.
        method.begin(Run(policy, parts.train, verifier, settings, seed, self.steps_per_epoch,
                         folder.has_begun, observer.note))
        self.entropy_control = EntropyControl(settings, seed)
        self.learner = Learner(policy, settings, self.entropy_control)
        self.measuring = Measuring(policy, self.learner, verifier, settings, seed)
        self.checkpoints = Checkpoints(folder)
        self.anchor_weights: dict[str, Tensor] | None = None
        self.step = self.stage_index = self.stage_step = 0
        self.tokens = {"demonstrations": 0, "rollouts": 0}
        self.best = {"strict": -1.0, "step": 0}
        self.best_weights: dict[str, Tensor] | None = None
        self.resumed_from: list[int] = []
        self.health = Health()
        self.probe_problems = in_turn(parts.validation)[:settings.probe.prompts]

    # The loop ----------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs all stages from where the last checkpoint left off.

        Raises:
            Stopped: by Ctrl-C, after a checkpoint.
            UserError: the loss was not finite several updates in a row.
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
                        raise Stopped(f"Stopped after step {self.step}; the checkpoint is saved, "
                                      "and the same command resumes from it.")
                if self.stage_index + 1 == len(self.method.stages):
                    break
                self.stage_index, self.stage_step = self.stage_index + 1, 0
                self.learner.optimizers.clear()  # each stage has its own, and its own warm-up

    def _begin_stage(self) -> None:
        """A fresh optimizer, and the KL anchor if that is what the stage starts from."""
        self.learner.new_optimizer()
        if self.learner.needs_anchor and self.settings.rl.kl_anchor == "stage":
            self.anchor_weights = {name: weight.detach().clone()
                                   for name, weight in self.policy.trained_weights().items()}

    # One step ----------------------------------------------------------------------------------

    def _one_step(self, progress: Progress) -> None:
        """One step of Algorithm 1, in six parts; parts 2 to 4 are in `Judge`, 5 in `Learner`."""
        began = time.perf_counter()

        # 1. Weights: lambda_SFT, lambda_RL, and gamma of this step.
        step = self._new_step(progress, self.method.weights(progress))
        size = self._batch_size(progress.stage)
        if step.weights.sft > 0:
            step.demonstrations = self._batch(progress, "demonstrations", size)

        # 2. Sample, 3. reward, 4. advantages: G answers per problem.
        if step.weights.rl > 0:
            step.rollouts = self.judge.roll_out(
                self._batch(progress, "prompts", size), progress, step.row)
            step.gamma += self.entropy_control.begin_step(self.step, step.row["entropy"])
            step.row["gamma"] = step.gamma
        sampled = time.perf_counter()

        # 5. Update: the method turns both into updates, and the learner takes them.
        if step.rollouts and (self.step % self.settings.rl.reference_every == 0
                              or self.learner.needs_anchor or self.method.needs_reference):
            self.measuring.score_reference(step, self.anchor_weights)
        updates, totals = self.method.compose(step), Totals()
        self.learner.place = place_of(step, self.step + 1)
        norms = self.method.learn(step, updates, totals)

        # 6. Record.
        self.step += 1
        self.stage_step += 1
        self._count_tokens(step, updates)
        now = time.perf_counter()
        self._record(step, {
            **update_metrics(totals, updates, with_rollouts="reward" in step.row),
            **gradient_metrics(norms, totals.counts.get("left_out", 0)),
            **(self.entropy_control.columns if step.weights.rl > 0 else {}),
            "tokens": sum(self.tokens.values()), "seconds/sampling": round(sampled - began, 4),
            "seconds/update": round(now - sampled, 4), "seconds/step": round(now - began, 4)})

    def _new_step(self, progress: Progress, weights: Weights) -> Step:
        """The step with its weights, its learning rates, and the first columns of its row."""
        stage = progress.stage
        gamma = getattr(self.settings, stage.name).gamma if self.with_entropy else 0.0
        rates = {name: self._learning_rate(progress, name) for name in ("sft", "rl")}
        row = {"step": self.step + 1, "stage": stage.name,
               "epoch": round(self._epoch() + 1 / self.steps_per_epoch(stage), 6),
               "lambda/sft": weights.sft, "lambda/rl": weights.rl, "gamma": gamma,
               "learning_rate": rates[stage.name]}
        return Step(progress, self.settings, self.learner, weights, gamma, rates, row)

    def _learning_rate(self, progress: Progress, section: str) -> float:
        """Linear decay from the peak to a fraction of it, times a linear warm-up from 0 to 1."""
        training = self.settings.training
        warm = min(1.0, (progress.step + 1) / max(1, training.warmup_steps))
        left = 1 - progress.step / max(1, progress.steps)
        floor = training.final_learning_rate_fraction
        return getattr(self.settings, section).learning_rate * warm * (floor + (1 - floor) * left)

    def _batch(self, progress: Progress, kind: str, size: int) -> list[Problem]:
        """The problems of a step: every epoch has its own order, from the seed alone."""
        epoch, place = divmod(progress.step, self.steps_per_epoch(progress.stage))
        order = list(range(len(self.parts.train)))
        random.Random(seed_of(self.seed, kind, self.stage_index, epoch)).shuffle(order)
        return [self.parts.train[i] for i in order[place * size:(place + 1) * size]]

    def _count_tokens(self, step: Step, updates: Sequence[Update]) -> None:
        """Adds the demonstrations of the updates, and what the method itself has used."""
        self.tokens["demonstrations"] += sum(
            len(s.completion) for u in updates for s in u.sequences[:u.demonstrations])
        for name, count in step.tokens.items():
            self.tokens[name] = self.tokens.get(name, 0) + count

    def _record(self, step: Step, measured: dict) -> None:
        """Writes the line of metrics.jsonl and reports new warnings."""
        row = finite_values(step.row | measured)
        self.method.after_step(row, step.progress)
        row = finite_values(row)
        begun = self.health.see(row)
        if self.health.active:
            row["warnings"] = sorted(self.health.active)
        self.folder.append("metrics.jsonl", row)
        for alarm in begun:
            self.observer.on_warning(alarm.name, str(alarm))
        self.observer.on_step(row, self.total_steps())

    def _count_and_show(self, problems: Sequence[Problem], groups: Sequence[Group],
                        rewards: Tensor, first: bool) -> None:
        """Counts the tokens of a round of sampling; sometimes records its first answers."""
        self.tokens["rollouts"] += sum(len(c.token_ids) for g in groups for c in g.completions)
        if not first or self.step % self.settings.training.samples_every:
            return
        for completion, reward in list(zip(groups[0].completions, rewards[0].tolist(),
                                           strict=True))[:2]:
            row = {"step": self.step + 1, "id": problems[0].id, "prompt": problems[0].question,
                   "completion": completion.text, "finished": completion.finished,
                   "reward": reward, "gold": problems[0].answer}
            self.folder.append("samples.jsonl", row)
            self.observer.on_sample(row)

    # Stages, steps, and epochs -----------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.method.stages[self.stage_index]

    def _progress(self) -> Progress:
        return Progress(self.stage, self.stage_step, self.steps_of(self.stage), self.step,
                        self.seed)

    def steps_of(self, stage: Stage) -> int:
        """Number of steps of a stage."""
        return (stage.epochs * self.steps_per_epoch(stage) if stage.steps is None else stage.steps)

    def steps_per_epoch(self, stage: Stage) -> int:
        return max(1, math.ceil(len(self.parts.train) / self._batch_size(stage)))

    def total_steps(self) -> int:
        return sum(self.steps_of(stage) for stage in self.method.stages)

    def _batch_size(self, stage: Stage) -> int:
        return (self.settings.sft.batch_size if stage.name == "sft"
                else self.settings.rl.prompts_per_step)

    def _epoch(self) -> float:
        """Passes over the training problems so far, all stages together."""
        past = [stage.epochs if stage.steps is None else stage.steps / self.steps_per_epoch(stage)
                for stage in self.method.stages[:self.stage_index]]
        now = self.stage_step / self.steps_per_epoch(self.stage) if self.method.stages else 0
        return sum(past) + now

    @property
    def not_finite(self) -> int:
        """Updates so far that were skipped because their gradient was not finite."""
        return sum(row.get("updates_not_finite", 0) for row in self.folder.lines("metrics.jsonl"))

    # Between steps -----------------------------------------------------------------------------

    def _after_step(self) -> None:
        """Probe, validation, and checkpoint when they are due; the method may end the stage."""
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
        """Writes a line of probe.jsonl, which the joint figures show."""
        if not self.probe_problems:
            return
        row = {"step": self.step, "stage": stage_name, "epoch": round(self._epoch(), 6),
               **self.measuring.probe(self.probe_problems, self.step)}
        self.folder.append("probe.jsonl", row)
        if self.step:
            self.method.after_probe(row, self._progress())
        self.health.see_probe(row)
        self.observer.on_probe(row)

    def _validate(self) -> None:
        """Writes a line of validation.jsonl and remembers the best weights."""
        problems = list(self.parts.validation)
        if not problems:
            return
        row = {"step": self.step, "epoch": round(self._epoch(), 6),
               **self.measuring.validate(problems)}
        self.folder.append("validation.jsonl", row)
        self.method.after_validation(row, self._progress())
        self.observer.on_validation(row)
        if row["strict"] > self.best["strict"]:
            self.best = {"strict": row["strict"], "step": self.step}
            self.best_weights = self.copy_of_weights()

    # Weights and checkpoints -------------------------------------------------------------------

    def copy_of_weights(self) -> dict[str, Tensor]:
        """The trained weights as they are now, on the CPU."""
        return {k: v.detach().cpu().clone() for k, v in self.policy.trained_weights().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Replaces the trained weights."""
        with torch.no_grad():
            for name, parameter in self.policy.trained_weights().items():
                parameter.copy_(weights[name])

    def use_best_weights(self) -> bool:
        """Loads the weights that did best on validation; False if they are the last ones."""
        if self.best_weights is None or self.best["step"] == self.step:
            return False
        self.load_weights(self.best_weights)
        return True

    def seconds(self) -> list[float]:
        """[wall, processor] so far; processor time is the sum over all processes."""
        wall, processor = self.clock.read()
        return [wall, round(sum(together(lambda: processor)), 2)]

    def _save_checkpoint(self) -> None:
        state = {"step": self.step, "stage_index": self.stage_index, "stage_step": self.stage_step,
                 "tokens": self.tokens, "best": self.best, "resumed_from": self.resumed_from,
                 "verdicts": dict(self.verifier.counts), "seconds": self.seconds(),
                 "method": self.method.state(),
                 "entropy_control": {n: getattr(self.entropy_control, n)
                                     for n in self.entropy_control.kept},
                 "stages": [asdict(stage) for stage in self.method.stages]}
        scaler = self.learner.accelerator.scaler
        more = {f"method/{name}": tensor for name, tensor in self.method.tensors().items()}
        more |= {f"anchor/{name}": w for name, w in (self.anchor_weights or {}).items()}
        moments = self.learner.optimizer_states()
        from_first(lambda: self.checkpoints.save(self.step, Snapshot(
            state, self.policy.trained_weights(), self.best_weights, moments,
            None if scaler is None else scaler.state_dict(), more).write))

    def _resume(self) -> None:
        """Resumes from the newest intact checkpoint, if there is one."""
        found = from_first(lambda: self.checkpoints.resume(self.observer.note))
        if found is None:
            return
        step, folder = found
        try:
            self._restore(step, Snapshot.read(folder))
        except Exception as error:  # not one of our checkpoints: the types of four libraries
            raise UserError(
                f"The checkpoint {folder.name} of the run {self.folder.path.parent.name}/"
                f"{self.folder.path.name} cannot be read ({reason(error)}); delete the folder "
                "checkpoint there to start this run again.") from error
        self.observer.note(f"resuming from the checkpoint of step {step}")

    def _restore(self, step: int, snapshot: Snapshot) -> None:
        """Restores weights, optimizers, and counters from a checkpoint."""
        state = snapshot.state
        self.step, self.stage_index = state["step"], state["stage_index"]
        self.stage_step, self.tokens, self.best = (state["stage_step"], state["tokens"],
                                                   state["best"])
        self.resumed_from = [*state["resumed_from"], step]
        self.verifier.counts.update(state["verdicts"])
        wall, processor = state["seconds"]
        self.clock.resume_from([wall, processor if is_first() else 0.0])
        self.load_weights(snapshot.weights)
        self.best_weights = snapshot.best
        self.learner.load_optimizer_states(snapshot.optimizer)
        more: dict[str, dict[str, Tensor]] = {"method": {}, "anchor": {}}
        for name, tensor in snapshot.more.items():
            owner, _, own = name.partition("/")
            more[owner][own] = tensor
        if more["anchor"]:
            self.anchor_weights = {name: tensor.to(self.policy.device)
                                   for name, tensor in more["anchor"].items()}
        self.method.stages = tuple(Stage(**stage) for stage in state["stages"])
        self.method.load_state(state["method"], more["method"])
        for name, value in state["entropy_control"].items():
            setattr(self.entropy_control, name, value)
        if self.learner.accelerator.scaler is not None and snapshot.scaler is not None:
            self.learner.accelerator.scaler.load_state_dict(snapshot.scaler)
