"""PEAR (arXiv 2602.01058, section numbers unknown): SFT weighted for the RL that follows, then RL.

    pi_beta: the model that wrote the demonstration y_1..y_T;  delta_t, clipped, is
             log pi_theta(y_t|x, y_<t) - log pi_beta(y_t|x, y_<t) at the update's own theta
    L = sum_t G_t * -log pi_theta(y_t|x, y_<t),  no gradient through G, log G clipped
    sequence   log G_t = delta_1 + ... + delta_T
    token      log G_t = (T - t) log gamma + delta_t+1 + ... + delta_T     (t itself is not in it)
    block      the same from the end of the block that t is in; blocks of one token are `token`
    then the same GRPO as after plain SFT

No official code. The formulas and clip bounds come second-hand, through a re-implementation with a
mapping to the paper's sections. Unspecified, not found: what the weighted losses are divided by;
that is a setting, and `weights` has the step size of SFT. T is the true length and EOS is in the
product and the loss; the re-implementation took the padded length, and clamps G to [0.1, 10].
`pear_centred` is a replication's, which found that on long answers published PEAR trains their end
alone: delta less its mean over the answer, weights of mean 1 (here over an update). Its clip is
taken after that. The paper's negative examples are left out: their formula is unverified.

Human solutions have no pi_beta, so the demonstrations are sampled: the first right one of
`pear.samples` answers of the behaviour model. A problem without one is left out of SFT. That they
are right answers, not any, is in no log-probability. Unless a model is named, pi_beta is the run's
base model after some plain SFT. `sft_sampled_then_rl` learns from the same demonstrations without
weights: that is the arm to compare with.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..config import Settings
from ..fields import Section, setting
from ..home import is_missing, without_home
from ..setups import Setup
from .method import Progress
from .staged import Staged

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Step


@dataclass(frozen=True)
class PEARSettings(Section):
    """The weights, and who wrote the demonstrations."""

    section: ClassVar[str] = "pear"
    level: str = setting("token", "what shares a weight: a token, a block or the whole sequence; "
                         "none = all weights are 1", "PEAR has the three",
                         choices=("token", "block", "sequence", "none"))
    block_size: int = setting(4, "tokens in a block, for pear.level=block", "second-hand: 4",
                              at_least=1)
    gamma: float = setting(0.999, "discount of a token's weight per token after it, at the levels "
                           "token and block", "second-hand: 0.999", above=0, at_most=1)
    delta_low: float = setting(-0.08, "lower clip bound of a token's log-ratio",
                               "second-hand: -0.08", at_most=0)
    delta_high: float = setting(0.3, "upper clip bound of the same", "second-hand: 0.3",
                                at_least=0)
    log_weight_low: float = setting(-10.0, "lower clip bound of a weight's logarithm",
                                    "second-hand: -10", at_most=0)
    log_weight_high: float = setting(5.0, "upper clip bound of the same", "second-hand: 5",
                                     at_least=0)
    normalisation: str = setting(
        "tokens", "tokens = the weighted losses are normalised as those of SFT; weights = so that "
        "the mean weight of an update is 1", "unspecified in the paper",
        choices=("tokens", "weights"))
    centred: bool = setting(False, "whether the log-ratios have their mean over the answer "
                            "subtracted; for pear.level=none, as all settings of weights, nothing",
                            "a replication's variant")
    behaviour: str | None = setting(
        "sft", "the model that writes the demonstrations: a folder, hub name or GGUF file with the "
        "same tokenizer; sft = the base model after SFT on the reference solutions")
    behaviour_epochs: int = setting(5, "epochs of that SFT", at_least=1)
    behaviour_rate: float | None = setting(
        None, "its learning rate, which `hybridrl compare` does not tune, so that all arms learn "
        "from the same demonstrations; none = sft.learning_rate", above=0)
    samples: int = setting(8, "answers sampled a problem, at temperature 1, of which the first "
                           "right one is the demonstration", at_least=1)

    def check(self) -> None:
        if self.behaviour is None:
            self.refuse("behaviour", "human solutions have no log-probabilities under the model "
                        "that wrote them, which PEAR divides by; name a model, or sft")
        object.__setattr__(self, "behaviour", without_home(self.behaviour))  # as model.path


class PEAR(Staged):
    """SFT weighted by how likely the policy is to go on as the demonstration does, then RL."""

    settings_section = PEARSettings
    own_loss = True
    sharded = False

    @classmethod
    def copies(cls, own: PEARSettings, device: str) -> tuple[float, float]:
        return (0.0, 0.0) if device == "cuda" else (2.0, 1.0)  # of before; of now, too

    def __init__(self, setup: Setup, settings: Settings):
        super().__init__(setup, settings)
        if self.own.level == "block" and self.own.block_size >= settings.rl.max_new_tokens:
            self.own.refuse("block_size", "a demonstration of at most rl.max_new_tokens = "
                            f"{settings.rl.max_new_tokens} tokens would be a single block, with "
                            "nothing after it to weigh it by; give fewer tokens")
        if is_missing(self.own.behaviour):
            self.own.refuse("behaviour", "there is no such file or folder; give a model folder, a "
                            "hub name, a GGUF file, or sft")
        self.demonstrations: dict | None = None  # by problem; sampled at the first step of SFT
        self.after_sft: dict[str, Tensor] = {}

    def begin(self, trainer) -> None:
        from ..behaviour import OF_THIS_RUN, refuse_other_tokenizer
        from ..weight_changes import copy_of

        self.trainer = trainer
        self.at_first = copy_of(trainer.weights())
        if self.own.behaviour != OF_THIS_RUN and not trainer.folder.has_begun:  # else it is written
            refuse_other_tokenizer(self.own.behaviour, trainer.policy, trainer.parts.train,
                                   trainer.settings)

    # SFT ------------------------------------------------------------------------------------------

    def compose(self, step: "Step"):
        if not step.demonstrations:
            if step.progress.step == 0:
                from ..weight_changes import copy_of

                self.after_sft = copy_of(self.trainer.weights())
            return super().compose(step)
        if self.demonstrations is None:
            self._sample(step)
        known = [self.demonstrations[problem.id] for problem in step.demonstrations
                 if problem.id in self.demonstrations]
        update = step.update([demonstration.sequence for demonstration in known])
        step.row["pear/demonstrations"] = len(known)
        if known and self.own.level != "none":
            scores = step.learner.scores(update.sequences, temperature=1.0)
            deltas = [score - demonstration.behaviour
                      for score, demonstration in zip(scores, known, strict=True)]
            weights = [log_weights(delta, self.own).exp() for delta in deltas]
            self._describe(step.row, deltas, weights)
            if self.own.normalisation == "weights":
                shares = list(zip(update.sft.tolist(), weights, strict=True))
                scale = (sum(share * len(weight) for share, weight in shares)
                         / sum(share * float(weight.sum()) for share, weight in shares))
                weights = [scale * weight for weight in weights]
            update.demonstration_loss = lambda i, scores, entropies: -weights[i] * scores
        return [update]

    def _sample(self, step: "Step") -> None:
        """Has the behaviour model write the demonstrations; it is dropped afterwards."""
        from ..behaviour import behaviour_policy, sample_demonstrations

        trainer, own, problems = self.trainer, self.own, self.trainer.parts.train
        policy, taught = behaviour_policy(
            own.behaviour, trainer.policy, problems, trainer.settings, own.behaviour_epochs,
            own.behaviour_rate or trainer.settings.sft.learning_rate, trainer.seed)
        self.demonstrations, tokens = sample_demonstrations(
            policy, trainer.policy, problems, trainer.verifier, trainer.settings, own.samples,
            trainer.seed)
        without = len(problems) - len(self.demonstrations)
        trainer.tokens |= {"behaviour": tokens, "behaviour_demonstrations": taught.tokens}
        step.row |= {"pear/problems_without": without, "pear/behaviour_tokens": tokens,
                     "groups/beside": len(problems) * own.samples, "updates/beside": taught.updates}
        trainer.observer.note(f"the behaviour model solved {len(self.demonstrations)} of "
                              f"{len(problems)} training problems; the others are left out of SFT")

    def _describe(self, row: dict, deltas: "list[Tensor]", weights: "list[Tensor]") -> None:
        """Mean log-ratio, share of tokens where it is clipped, mean weight, and the share of tokens
        that, weighted alike, would average as noisily."""
        own, count = self.own, sum(map(len, weights))
        total = sum(float(weight.sum()) for weight in weights)
        squares = sum(float(weight.pow(2).sum()) for weight in weights)
        outside = sum(int(((d < own.delta_low) | (d > own.delta_high)).sum())
                      for d in (centred(delta, own) for delta in deltas))
        row |= {"pear/delta": sum(float(delta.sum()) for delta in deltas) / count,
                "pear/clipped": outside / count, "pear/weight": total / count,
                "pear/effective": total ** 2 / (count * squares)}

    # RL -------------------------------------------------------------------------------------------

    def after_step(self, row: dict, progress: Progress) -> None:
        """Where the policy is validated, how far RL has moved the weights."""
        every = self.trainer.steps_per_epoch(progress.stage) * self.settings.training.validate_every
        step = progress.step + 1
        if progress.stage.name == "rl" and (step == progress.steps or step % every == 0):
            from ..weight_changes import copy_of, weight_changes

            changes = weight_changes(self.at_first, self.after_sft, copy_of(self.trainer.weights()))
            row |= {f"pear/{name}": value for name, value in changes.items()}

    # The checkpoint -------------------------------------------------------------------------------

    def state(self) -> dict:
        from ..behaviour import sizes_of

        known = self.demonstrations
        return {} if known is None else {"demonstrations": sizes_of(known)}

    def tensors(self) -> "dict[str, Tensor]":
        from ..behaviour import tensors_of

        kept = {f"after_sft/{name}": weight for name, weight in self.after_sft.items()}
        return kept | tensors_of(self.demonstrations or {})

    def load_state(self, state: dict) -> None:
        self.sizes = state.get("demonstrations")

    def load_tensors(self, tensors: "dict[str, Tensor]") -> None:
        from ..behaviour import demonstrations_of

        self.after_sft = {name.removeprefix("after_sft/"): weight
                          for name, weight in tensors.items() if name.startswith("after_sft/")}
        if self.sizes is not None:
            self.demonstrations = demonstrations_of(self.sizes, tensors, self.trainer.policy.device)


def centred(delta: "Tensor", own: PEARSettings) -> "Tensor":
    """The log-ratios (T,) of an answer, less their mean where that is asked for."""
    return delta - delta.mean() if own.centred else delta


def log_weights(delta: "Tensor", own: PEARSettings) -> "Tensor":
    """log G (T,) of every token of an answer.

    Args:
        delta: (T,) log pi_theta - log pi_beta, not clipped.
    """
    import math

    delta = centred(delta, own).clamp(own.delta_low, own.delta_high).double()
    length, up_to = len(delta), delta.cumsum(0)
    if own.level == "sequence":
        result = up_to[-1].expand(length)
    else:
        size = own.block_size if own.level == "block" else 1
        place = delta.new_ones(length).cumsum(0)  # 1..T
        end = ((place / size).ceil() * size).clamp(max=length)
        result = (length - end) * math.log(own.gamma) + up_to[-1] - up_to[end.long() - 1]
    return result.clamp(own.log_weight_low, own.log_weight_high).float()
