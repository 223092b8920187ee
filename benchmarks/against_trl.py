"""One GRPO step of this library against one of TRL's GRPOTrainer, in alternating pairs.

Timed on both sides: prompts to tokens, G answers a prompt, their texts, rewards (a fixed pattern),
advantages, the loss and its gradient over micro-batches, clipping, AdamW. Before that, both get the
same completions once, and their losses and clipped gradients must agree. See README.md beside this
file.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from common import (
    add_lengths,
    alternate,
    circumstances,
    finish,
    load_questions,
    make_parser,
    median,
    positive_number,
    ratios,
    rounded,
    run,
    show,
)
from grpo_step import GRPOStep, fastest, sizes_to_try
from trl_step import LOSS_TYPES, TRLStep

from hybridrl_lib.policy.completions import Group

# Largest distance of the clipped gradients over their norm, and of the losses. Both sides of fp32
# differ by rounding; in bf16 the order of rounding differs, since one packs and one pads.
TOLERANCES = {"fp32": (1e-4, 1e-5), "bf16": (5e-2, 2e-3)}


def compare(ours: GRPOStep, trl: TRLStep, groups: Sequence[Group]) -> dict[str, float]:
    """Takes one step on each side from the same weights and completions.

    At the first update of a batch every ratio is 1, so the loss is minus the mean advantage, which
    many wrong losses share. The gradient is what tells them apart.

    Raises:
        RuntimeError: loss or gradient differ by more than the tolerance.
    """
    gradients: list[list[torch.Tensor]] = []
    hooks = [side.optimizer.register_step_pre_hook(
        lambda *_, side=side: gradients.append([p.grad.clone() for p in side.parameters]))
        for side in (ours, trl)]
    mine, other = ours.update(groups), trl.update(groups)
    for hook in hooks:
        hook.remove()
    squares = [sum(float((a - b).double().pow(2).sum()) for a, b in zip(*pair, strict=True))
               for pair in (gradients, (gradients[1], [torch.zeros(())] * len(gradients[1])))]
    found = {"loss_ours": mine[0], "loss_trl": other.loss,
             "loss_difference": abs(mine[0] - other.loss),
             "gradient_distance": (squares[0] / squares[1]) ** 0.5,
             "gradient_norm_ours": mine[1], "gradient_norm_trl": other.norm}
    most_gradient, most_loss = TOLERANCES[ours.policy.precision]
    found |= {"gradient_tolerance": most_gradient, "loss_tolerance": most_loss}
    if not (found["gradient_distance"] <= most_gradient and found["loss_difference"] <= most_loss):
        raise RuntimeError(f"The two sides do not compute the same loss: {found}")
    return found


def tune(ours: GRPOStep, trl: TRLStep, groups: Sequence[Group],
         arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Gives each side the size of micro-batch that is fastest for it, within the same tokens."""
    tried = ours.use_fastest_micro_batches(groups, arguments.micro_batch_tokens)
    longest = max(len(g.prompt_ids) for g in groups) + arguments.max_new_tokens
    rows = sorted({max(n for n in range(1, trl.completions + 1)
                       if trl.completions % n == 0 and (n == 1 or n * longest <= most))
                   for most in sizes_to_try(trl.parameters)})

    def other(candidate: int) -> None:
        trl.rows = candidate
        trl.update(groups)

    trl.rows, also = fastest([arguments.trl_rows] if arguments.trl_rows else rows, other)
    return {"ours_seconds_by_tokens": tried, "trl_seconds_by_rows": also}


def settings_of(ours: GRPOStep, trl: TRLStep) -> dict[str, dict[str, Any]]:
    """What decides speed or result, in each side's own words."""
    rl, training, theirs = ours.settings.rl, ours.settings.training, trl.trainer.args
    return {
        "ours": {"rl.loss_normalization": rl.loss_normalization, "rl.beta": rl.beta,
                 "rl.advantage_scale": rl.advantage_scale, "rl.group_size": rl.group_size,
                 "rl.updates_per_rollout": 1, "rl.temperature": rl.temperature,
                 "rl.epsilon": [rl.epsilon_low, rl.epsilon_high],
                 "optimizer": type(ours.optimizer).__name__, "training.betas": training.betas,
                 "training.weight_decay": training.weight_decay,
                 "training.gradient_clip": training.gradient_clip,
                 "training.micro_batch_tokens": training.micro_batch_tokens,
                 "weights": "fp32", "gradient checkpointing": False},
        "trl": {"loss_type": theirs.loss_type, "beta": theirs.beta,
                "scale_rewards": theirs.scale_rewards, "num_generations": theirs.num_generations,
                "num_iterations": theirs.num_iterations, "temperature": theirs.temperature,
                "epsilon": [theirs.epsilon, theirs.epsilon_high],
                "optimizer": f"{type(trl.optimizer).__name__} ({theirs.optim.value})",
                "betas": [theirs.adam_beta1, theirs.adam_beta2],
                "weight_decay": theirs.weight_decay, "max_grad_norm": theirs.max_grad_norm,
                "per_device_train_batch_size": theirs.per_device_train_batch_size,
                "weights": str(next(trl.model.parameters()).dtype).removeprefix("torch."),
                "bf16": theirs.bf16, "gradient checkpointing": theirs.gradient_checkpointing}}


def main(argv: Sequence[str] | None = None) -> dict:
    """Checks, measures, prints a table and the JSON line; returns what the line holds."""
    parser = make_parser("A GRPO step against TRL's.", prompts=16, pairs=5, max_new_tokens=48)
    add_lengths(parser)
    parser.add_argument("--groups", choices=("all", "signal"), default="all",
                        help="groups with unequal rewards: all, or every other one (signal)")
    parser.add_argument("--loss-normalization", choices=tuple(LOSS_TYPES), default="sequence_mean",
                        help="as rl.loss_normalization; default: sequence_mean")
    parser.add_argument("--micro-batch-tokens", type=positive_number,
                        help="of our micro-batches; default: the fastest of some")
    parser.add_argument("--trl-rows", type=positive_number,
                        help="completions of TRL's micro-batches; default: the fastest of some")
    arguments = parser.parse_args(argv)
    policy, questions = load_questions(arguments)
    ours = GRPOStep(policy, questions, samples=arguments.samples, which=arguments.groups,
                    max_new_tokens=arguments.max_new_tokens,
                    loss_normalization=arguments.loss_normalization)
    trl = TRLStep(policy, questions, ours.settings, arguments.groups,
                  arguments.trl_rows or arguments.samples)
    groups = ours.sample(seed=0)
    check = compare(ours, trl, groups)
    print(f"same completions: losses differ by {check['loss_difference']:.1e} (at most "
          f"{check['loss_tolerance']:.0e} allowed), gradients by "
          f"{check['gradient_distance']:.1e} of their norm (at most "
          f"{check['gradient_tolerance']:.0e} allowed)")
    tuned = tune(ours, trl, groups, arguments)
    settings = settings_of(ours, trl)
    for side, values in settings.items():
        print(f"{side}: " + ", ".join(f"{key}={value}" for key, value in values.items()))

    pairs = alternate(ours, trl, arguments.pairs)
    seconds = [[one[0] for one in side] for side in zip(*pairs, strict=True)]
    outcomes = [[one[1] for one in side] for side in zip(*pairs, strict=True)]

    def by_side(values: Sequence[Sequence]) -> dict[str, Any]:
        return dict(zip(("ours", "trl"), values, strict=True))

    parts = {part: [[getattr(o, part) for o in side] for side in outcomes]
             for part in ("sampling", "update")}
    record = circumstances("against_trl", arguments, policy) | {
        "trl": version("trl"), "groups": arguments.groups, "settings": settings,
        "check": check, "tuning": tuned, "seconds": by_side([rounded(s) for s in seconds]),
        **{f"seconds_{part}": by_side([rounded(s) for s in sides])
           for part, sides in parts.items()},
        **{f"ratio_{part}_median": median([b / a for a, b in zip(*sides, strict=True)])
           for part, sides in parts.items()},
        "tokens": by_side([[o.tokens for o in side] for side in outcomes]),
        **ratios(*seconds)}
    rows = [[str(number + 1), *(cell for side in (0, 1) for cell in (
                f"{seconds[side][number]:.3f}", f"{outcomes[side][number].sampling:.3f}",
                f"{outcomes[side][number].update:.3f}", str(outcomes[side][number].tokens))),
             f"{record['ratio'][number]:.2f}"] for number in range(len(pairs))]
    show(record, f"One GRPO step, groups with a signal: {arguments.groups} (ratio of times, TRL's "
         "over ours; above 1: ours is faster)",
         ("pair", *(("ours s", "sampling", "update", "tokens")),
          "TRL s", "sampling", "update", "tokens", "ratio"), rows,
         (f"sampling alone: {record['ratio_sampling_median']:.2f}, "
          f"update alone: {record['ratio_update_median']:.2f} (medians)",))
    return finish(record, arguments.json)


if __name__ == "__main__":
    sys.exit(run(main))
