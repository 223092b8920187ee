"""The settings of the methods: one class per method, whose section is its file in `methods/`.

A class also says what follows from the settings alone: the stages of a run, the extra memory, and
which settings the method cannot work with. The algorithm is in `methods/`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from ..setups import Setup
from ..system.paths import is_missing, without_home
from . import mixers  # noqa: F401  its classes are in METHODS
from .fields import setting
from .settings import MethodSettings, MixingSettings, Settings

OPEN = "the paper names it, without a value"


@dataclass(frozen=True)
class StagedSettings(MethodSettings):
    """SFT, RL, or SFT then RL: the paper's six setups."""

    section: ClassVar[str] = "staged"


@dataclass(frozen=True)
class DeepSeekMathSettings(MethodSettings):
    """SFT, then GRPO with a frozen reference; Dr. GRPO and DAPO."""

    section: ClassVar[str] = "deepseekmath"


@dataclass(frozen=True)
class CombinedSettings(MixingSettings):
    """A weighted sum of the two losses, with a weight that may follow a schedule."""

    section: ClassVar[str] = "combined"
    dynamic_sampling: ClassVar[bool] = True
    first: float = setting(0.5, "lambda at the first step", "the paper has no value",
                           at_least=0, at_most=1)
    last: float = setting(0.5, "lambda at the last step", "the paper has no value",
                          at_least=0, at_most=1)
    schedule: str = setting("constant", "how lambda moves from first to last",
                            "the paper: at any time", choices=("constant", "linear", "cosine"))

    def check(self) -> None:
        if self.schedule == "constant" and self.first != self.last:
            self.refuse("last", f"a constant lambda stays at combined.first = {self.first:g}; "
                        "choose combined.schedule=linear or cosine")


@dataclass(frozen=True)
class SwitchingSettings(MethodSettings):
    """Switching between SFT and RL when validation metrics say so."""

    section: ClassVar[str] = "switching"
    demonstrations: ClassVar[str] = "as needed"
    limits: ClassVar[tuple[str, ...]] = ("loss_fall", "kl_change", "distinct_answers", "entropy")
    reads_probes: ClassVar[bool] = True
    first: str = setting("sft", "the stage a run starts with", OPEN, choices=("sft", "rl"))
    switches: int = setting(1, "maximum number of switches; 2 or more go back and forth", OPEN,
                            at_least=1)
    least_epochs: float = setting(1.0, "minimum length of a stage (epochs)", at_least=0)
    loss_fall: float | None = setting(
        0.05, "SFT ends when the validation loss falls by less than this fraction of itself "
        "between two validations; none = ignored", OPEN)
    kl_change: float | None = setting(
        0.2, "a stage ends when the KL divergence to the base model changes by less than this "
        "fraction of itself between two probes; none = ignored",
        "in the published tiny run of RL it changes by 2 to 80 %", above=0)
    distinct_answers: float | None = setting(
        0.2, "a stage ends when the number of distinct answers to a problem falls below this "
        "fraction of probe.samples; none = ignored", OPEN, above=0, at_most=1)
    entropy: float | None = setting(
        0.05, "a stage ends when the entropy of the probe's answers falls below this value (nats "
        "per token); none = ignored",
        "below 0.05 most groups of published runs have no signal", above=0)
    patience: int = setting(2, "number of probes in a row for which a condition must hold", OPEN,
                            at_least=1)

    @property
    def ends_rl(self) -> bool:
        """Whether any of the conditions applies to RL."""
        return any(value is not None for value in (self.kl_change, self.distinct_answers,
                                                   self.entropy))

    def sees_loss_fall(self, settings: Settings) -> bool:
        """Whether two validations come before the run ends, the second late enough to switch."""
        every, epochs = settings.training.validate_every, settings.training.epochs
        count = math.ceil(epochs / every) - 1
        return count > 1 and count * every >= self.least_epochs

    def stages(self, setup: Setup, epochs: int) -> tuple[tuple[str, int], ...]:
        return ((self.first, epochs),)

    def check(self) -> None:
        if self.ends_rl:
            return
        if self.loss_fall is None:
            self.refuse("loss_fall", "no stage could ever end; set at least one of "
                        "switching.loss_fall, kl_change, distinct_answers, and entropy")
        if self.first == "rl" or self.switches > 1:
            self.refuse("first" if self.first == "rl" else "switches", "RL could never end, since "
                        "the validation loss only ends SFT; set one of switching.kl_change, "
                        "distinct_answers, and entropy")

    def check_run(self, settings: Settings) -> None:
        super().check_run(settings)
        epochs = settings.training.epochs
        if self.least_epochs >= epochs:
            self.refuse("least_epochs", "no stage could end before the run's training.epochs = "
                        f"{epochs}; choose a smaller value")
        if not self.ends_rl and not self.sees_loss_fall(settings):
            settings.training.refuse(
                "validate_every", "SFT could never end: it takes 2 validations before the end of "
                f"training.epochs = {epochs}, the second after switching.least_epochs; validate "
                "more often")


@dataclass(frozen=True)
class ReLIFTSettings(MixingSettings):
    """RL interleaved with SFT on the problems that no answer solves."""

    section: ClassVar[str] = "relift"
    demonstrations: ClassVar[str] = "as needed"
    batch_size: int = setting(16, "M, demonstrations per SFT update",
                              "released code: 128, the number of problems per step", at_least=1)
    every: int = setting(
        1, "at most one SFT update in this many steps; a weak model fills the buffer at every step",
        "released code: 1", at_least=1)
    newest_first: bool = setting(False, "whether SFT takes the newest problems of the buffer first",
                                 "released code: true; the paper does not say")

    def copies(self, device: str) -> tuple[float, float]:
        return 2.0, 0.0  # the moments of SFT's optimizer


@dataclass(frozen=True)
class SuperRLSettings(MixingSettings):
    """RL where an answer earned a reward, SFT where none did."""

    section: ClassVar[str] = "superrl"
    demonstrations: ClassVar[str] = "as needed"
    mixing: str = setting("gate", "gate = each problem takes one of the losses; log_sigma = each "
                          "takes both, with learned weights", "paper: both",
                          choices=("gate", "log_sigma"))
    gate: str = setting("reward", "what opens the gate to RL: a correct answer, or an advantage "
                        "above 0", "paper: both; reward is its main one",
                        choices=("reward", "advantage"))
    granularity: str = setting("problem", "problem = one gate per problem; update = one gate for "
                               "all problems of an optimizer update",
                               "paper: problem; its code reportedly: update",
                               choices=("problem", "update"))
    unsolved: str = setting("sft", "what happens to a problem whose gate is closed; drop = it is "
                            "left out, the control", "paper: sft", choices=("sft", "drop"))
    sigma_sft: float = setting(1.0, "log_sigma: initial s_sft",
                               "notes: 0 and 1, without saying which")
    sigma_rl: float = setting(0.0, "log_sigma: initial s_rl",
                              "notes: 0 and 1, without saying which")
    sigma_learning_rate: float = setting(0.01, "log_sigma: step size of gradient descent on s",
                                         at_least=0)
    sigma_decay: float = setting(0.99, "log_sigma: factor on s at every step",
                                 "notes: 0.99, without saying of what", above=0, at_most=1)
    sigma_floor: float = setting(-2.0, "log_sigma: lower bound of s, so that a loss has at most "
                                 "the weight exp(4) = 55", "notes", at_most=0)

    def check(self) -> None:
        if self.mixing == "log_sigma" and (self.gate, self.granularity, self.unsolved) != (
                "reward", "problem", "sft"):
            self.refuse("mixing", "log_sigma has no gate; leave out superrl.gate, "
                        "superrl.granularity, and superrl.unsolved")
        for name in ("sigma_sft", "sigma_rl"):
            if getattr(self, name) < self.sigma_floor:
                self.refuse(name, f"it is below superrl.sigma_floor = {self.sigma_floor:g}")


@dataclass(frozen=True)
class SASRSettings(MixingSettings):
    """Steps of SFT or GRPO, drawn with a probability from the norm of the SFT gradient."""

    section: ClassVar[str] = "sasr"
    demonstrations: ClassVar[str] = "as needed"
    warmup_epochs: int = setting(1, "epochs of SFT before the first draw",
                                 "the paper has a warm-up; its length is unverified", at_least=1)
    gamma: float = setting(1.0, "balance: p = g / (g + gamma g_warm); 1 starts at p = 0.5",
                           "reconstruction", above=0)

    def stages(self, setup: Setup, epochs: int) -> tuple[tuple[str, int], ...]:
        return (("sft", self.warmup_epochs), *super().stages(setup, epochs))


@dataclass(frozen=True)
class BridgeSettings(MixingSettings):
    """SFT and RL on the base weights, and an adapter that is trained to make them cooperate."""

    section: ClassVar[str] = "bridge"
    adapters: ClassVar[tuple[str, ...]] = ("lora",)
    trains_base: ClassVar[bool] = True
    rl_weight: float = setting(0.5, "lambda, weight of L_RL and of the gain, at the first step; "
                               "L_SFT has 1 - lambda",
                               "second-hand: 0.5, flat from 0.3 to 0.7", above=0, below=1)
    last_rl_weight: float | None = setting(
        None, "lambda at the last step, reached linearly; none = lambda is constant",
        "second-hand: whether it is annealed is ambiguous", above=0, below=1)
    adapter: str = setting(
        "gain", "what the adapter learns from: gain = SFT and the cooperative gain; sft = SFT "
        "only; both = SFT and RL, like the base weights; nothing = it stays 0",
        "BRIDGE: gain", choices=("gain", "sft", "both", "nothing"))
    auxiliary: str = setting(
        "persistent", "the weights that bridge.adapter=gain compares with: persistent = a copy "
        "trained by RL alone since the start; one_step = the base weights after one RL update",
        "sources disagree", choices=("persistent", "one_step"))
    base_learning_rate: float | None = setting(
        None, "alpha, learning rate of the base weights; none = rl.learning_rate, which in a "
        "preset with LoRA is the adapter's", "second-hand: the same everywhere", above=0)
    adapter_learning_rate: float | None = setting(
        None, "beta, learning rate of the adapter; none = rl.learning_rate; both follow its "
        "schedule", "second-hand: the same everywhere", above=0)

    def copies(self, device: str) -> tuple[float, float]:
        gain, ahead = self.adapter == "gain", self.auxiliary == "one_step"
        return (3.0 if gain else 0.0), (2.0 if gain and ahead else 1.0)  # hat, moments; gradients

    def check_run(self, settings: Settings) -> None:
        super().check_run(settings)
        if settings.model.precision == "fp16":
            settings.model.refuse("precision", "three optimizers share a backward pass, which the "
                                  "loss scale of fp16 does not allow; choose bf16 or fp32")


@dataclass(frozen=True)
class PEARSettings(MethodSettings):
    """SFT weighted by how likely the policy is to continue as the demonstration does, then RL."""

    section: ClassVar[str] = "pear"
    own_loss: ClassVar[bool] = True
    level: str = setting("token", "what shares a weight: a token, a block, or the whole sequence; "
                         "none = all weights are 1", "PEAR has the three",
                         choices=("token", "block", "sequence", "none"))
    block_size: int = setting(4, "tokens per block, for pear.level=block", "second-hand: 4",
                              at_least=1)
    gamma: float = setting(0.999, "discount of a token's weight per token after it, at the levels "
                           "token and block", "second-hand: 0.999", above=0, at_most=1)
    delta_low: float = setting(-0.08, "lower clip bound of a token's log-ratio",
                               "second-hand: -0.08", at_most=0)
    delta_high: float = setting(0.3, "upper clip bound of a token's log-ratio", "second-hand: 0.3",
                                at_least=0)
    log_weight_low: float = setting(-10.0, "lower clip bound of the logarithm of a weight",
                                    "second-hand: -10", at_most=0)
    log_weight_high: float = setting(5.0, "upper clip bound of the logarithm of a weight",
                                     "second-hand: 5", at_least=0)
    normalization: str = setting(
        "tokens", "tokens = the weighted losses are normalized like those of SFT; weights = so "
        "that the mean weight of an update is 1", "unspecified in the paper",
        choices=("tokens", "weights"))
    centered: bool = setting(False, "whether the mean log-ratio of an answer is subtracted; no "
                             "effect with pear.level=none", "a replication's variant")
    behavior: str | None = setting(
        "sft", "the model that writes the demonstrations: a folder, hub name, or GGUF file with "
        "the same tokenizer; sft = the base model after SFT on the reference solutions")
    behavior_epochs: int = setting(5, "epochs of that SFT", at_least=1)
    behavior_rate: float | None = setting(
        None, "its learning rate, which `hybridrl compare` does not tune, so that all arms learn "
        "from the same demonstrations; none = sft.learning_rate", above=0)
    samples: int = setting(8, "answers sampled per problem at temperature 1; the first correct one "
                           "is the demonstration", at_least=1)

    def copies(self, device: str) -> tuple[float, float]:
        return (0.0, 0.0) if device == "cuda" else (2.0, 1.0)  # weights of before, and of now

    def check(self) -> None:
        if self.behavior is None:
            self.refuse("behavior", "human solutions have no log-probabilities under the model "
                        "that wrote them, which PEAR divides by; name a model, or sft")
        object.__setattr__(self, "behavior", without_home(self.behavior))  # like model.path

    def check_run(self, settings: Settings) -> None:
        super().check_run(settings)
        if self.level == "block" and self.block_size >= settings.rl.max_new_tokens:
            self.refuse("block_size", "a demonstration of at most rl.max_new_tokens = "
                        f"{settings.rl.max_new_tokens} tokens would be a single block, with "
                        "nothing after it to weight it by; choose a smaller value")
        if is_missing(self.behavior):
            self.refuse("behavior", "there is no such file or folder; use a model folder, a hub "
                        "name, a GGUF file, or sft")


@dataclass(frozen=True)
class PRLSettings(MethodSettings):
    """RL with process rewards: how far the rest of an answer moves away from the reference."""

    section: ClassVar[str] = "prl"
    dynamic_sampling: ClassVar[bool] = False
    beta: float = setting(0.01, "weight of the log-ratio summed over the rest of the answer; 1/eta",
                          "v2: 0.01; v1's scripts: 1 to 1/200", at_least=0)
    steps: str = setting("token", "token = every token is a step; fixed = a step has "
                         "prl.step_tokens tokens; newline = a step ends with its line",
                         "v2: token; v1: the others", choices=("token", "fixed", "newline"))
    step_tokens: int = setting(16, "length of a step with prl.steps=fixed (tokens)",
                               "v1: 256 of 3072; 16 and 64 did worse than GRPO", at_least=1)
    suffix: str = setting("inclusive", "whether a step's last token is part of its own sum",
                          "v2 and the released code: inclusive; v1: exclusive",
                          choices=("inclusive", "exclusive"))

    def check_run(self, settings: Settings) -> None:
        super().check_run(settings)
        if settings.rl.beta > 0:
            settings.rl.refuse("beta", "the method prl has the KL in its advantage, and would "
                               "count it twice; set rl.beta=0 and choose prl.beta")
        if self.steps == "fixed" and self.step_tokens >= settings.rl.max_new_tokens:
            self.refuse("step_tokens", "the whole answer would be one step; choose fewer than "
                        f"rl.max_new_tokens = {settings.rl.max_new_tokens}")


@dataclass(frozen=True)
class RAFTSettings(MethodSettings):
    """SFT on the model's own correct answers."""

    section: ClassVar[str] = "raft"
    dynamic_sampling: ClassVar[bool] = False

    def check_run(self, settings: Settings) -> None:
        super().check_run(settings)
        if settings.rl.beta > 0:
            settings.rl.refuse("beta", "the method raft has no KL in its loss; set rl.beta=0")
        if settings.rl.overlong_share:
            settings.rl.refuse("overlong_share", "the method raft has no advantages that a penalty "
                               "could lower; set rl.overlong_share=0")
        if settings.entropy_control.kind in ("clip_cov", "kl_cov"):
            settings.entropy_control.refuse("kind", "the method raft has no advantages for a "
                                            "covariance; choose none or adaptive")


METHODS: dict[str, type[MethodSettings]] = {cls.section: cls for cls in sorted(
    (*MethodSettings.__subclasses__(), *MixingSettings.__subclasses__()),
    key=lambda cls: cls.section) if cls.section}
