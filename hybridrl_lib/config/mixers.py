"""The settings of the other methods of the field that mix SFT and RL: one class per method."""

from dataclasses import dataclass
from typing import ClassVar

from .fields import setting
from .settings import MixingSettings

UNKNOWN = "the paper's value was not found"


@dataclass(frozen=True)
class HPTSettings(MixingSettings):
    """RL on problems above a rate of correct answers, SFT on the others."""

    section: ClassVar[str] = "hpt"
    demonstrations: ClassVar[str] = "as needed"
    gamma: float = setting(0.0, "a problem goes to RL if its fraction of correct answers is above "
                           "this", "released code: 0 for Qwen, 0.25 for Llama",
                           at_least=-1, at_most=1)
    sft_coefficient: float = setting(1.0, "factor of the SFT loss",
                                     "released code: 1, and 0.3 for 1.5B", at_least=0)
    largest_norm: float | None = setting(80.0, "an update with a larger gradient norm, before "
                                         "clipping, is skipped; none = no limit",
                                         "released code: 80", above=0)


@dataclass(frozen=True)
class MIFOSettings(MixingSettings):
    """RL, and SFT on the uncertain tokens of hard problems that spares the weights RL moved."""

    section: ClassVar[str] = "mifo"
    demonstrations: ClassVar[str] = "as needed"
    limits: ClassVar[tuple[str, ...]] = ("token_share", "frozen")
    own_loss: ClassVar[bool] = True
    batch_size: int = setting(16, "M, demonstrations per SFT update", UNKNOWN, at_least=1)
    accuracy: float = setting(0.0, "p: problems with at most this fraction of correct answers go "
                              "to the buffer", UNKNOWN, at_least=0, at_most=1)
    token_share: float = setting(0.2, "rho: fraction of a demonstration's tokens with a loss, "
                                 "rounded up", UNKNOWN, above=0, at_most=1)
    decay: float = setting(0.9, "alpha: factor on the importance at the next RL step",
                           f"{UNKNOWN}, except 0 in its second variant", at_least=0, at_most=1)
    frozen: float = setting(0.1, "k: fraction of the weights that SFT leaves alone", UNKNOWN,
                            at_least=0, at_most=1)

    def copies(self, device: str) -> tuple[float, float]:
        # SFT's moments and C; the weights before RL, or (more on a CPU) what topk takes of C.
        return 3.0, 1.0 if device == "cuda" else 2.5


@dataclass(frozen=True)
class LUFFYSettings(MixingSettings):
    """Demonstrations as off-policy answers of the group."""

    section: ClassVar[str] = "luffy"
    own_loss: ClassVar[bool] = True
    gamma: float = setting(0.1, "f(x) = x / (x + gamma): the probability at which a token of a "
                           "demonstration learns most", "paper and released code: 0.1", above=0)


@dataclass(frozen=True)
class CHORDSettings(MixingSettings):
    """A scheduled weight between the losses, and a weight for every token of a demonstration."""

    section: ClassVar[str] = "chord"
    own_loss: ClassVar[bool] = True
    schedule: str = setting("cosine", "how mu moves: cosine = warm-up, then from peak to valley; "
                            "constant = at its peak; adaptive = max(0, tau - mean reward)",
                            "paper: all three", choices=("cosine", "constant", "adaptive"))
    peak: float = setting(0.9, "cosine and constant: largest mu", "CHORD-mu: 0.9, CHORD-phi: 0.1",
                          at_least=0, at_most=1)
    valley: float = setting(0.05, "cosine: mu at the end of the decay", "paper: 0.05",
                            at_least=0, at_most=1)
    warmup: float = setting(0.1, "cosine: fraction of the steps in which mu rises from 0 to its "
                            "peak", at_least=0, at_most=1)
    decay: float = setting(0.5, "cosine: fraction of the steps in which mu falls from peak to "
                           "valley", "paper: 30 or 200 steps", at_least=0, at_most=1)
    tau: float = setting(0.5, "adaptive: the mean reward from which mu is 0",
                         "paper: 0.5 fine, 0.7 bad", above=0, below=1)
    phi: str = setting("none", "weight of a token in the SFT loss: none = 1; uncertainty = "
                       "p (1 - p), without gradient", "CHORD-mu: none; CHORD-phi: uncertainty",
                       choices=("none", "uncertainty"))

    def check(self) -> None:
        if self.schedule == "cosine":
            if self.valley > self.peak:
                self.refuse("valley", f"it is above chord.peak = {self.peak:g}")
            if self.warmup + self.decay > 1:
                self.refuse("decay", f"with chord.warmup = {self.warmup:g} it ends after the run; "
                            "their sum must be at most 1")


@dataclass(frozen=True)
class UFTSettings(MixingSettings):
    """RL from hints that become shorter, with a little SFT on the hints."""

    section: ClassVar[str] = "uft"
    chunks: int = setting(5, "n, parts of a demonstration", "released code: 5", at_least=1)
    high: float = setting(0.95, "p at the first step", "released code: 0.95", at_least=0, at_most=1)
    low: float = setting(0.05, "p when the hints end", "released code: 0.05", at_least=0, at_most=1)
    hinted: float = setting(0.6, "fraction of the steps that have hints",
                            "released code: 300 of 500", at_least=0, at_most=1)
    sft_coefficient: float = setting(0.001, "c, weight of the hints' negative log-likelihood",
                                     "released code: 0.001", at_least=0)

    def check(self) -> None:
        if self.low > self.high:
            self.refuse("low", f"it is above uft.high = {self.high:g}")


@dataclass(frozen=True)
class PrefixRFTSettings(MixingSettings):
    """RL with one answer per group that starts like the demonstration."""

    section: ClassVar[str] = "prefix_rft"
    own_loss: ClassVar[bool] = True
    longest: float = setting(0.95, "largest fraction of a demonstration that becomes the prefix; "
                             "also where the smallest starts", "paper: 0.95", at_least=0, below=1)
    token_share: float = setting(0.2, "fraction of a prefix's tokens with a gradient, those of "
                                 "highest entropy, rounded up", "paper: 0.2",
                                 at_least=0, at_most=1)
