"""All settings of a run, and what every method's settings have in common."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from ..setups import Setup
from .fields import Section
from .sections import (
    DataSettings,
    EntropyControlSettings,
    EvaluationSettings,
    ModelSettings,
    ProbeSettings,
    RLSettings,
    SFTSettings,
    TrainingSettings,
    VerifierSettings,
)


@dataclass(frozen=True)
class MethodSettings(Section):
    """The settings of a method (`config/methods.py`), and what follows from them alone.

    Attributes:
        algorithm: the class in `methods/<section>.py`: this one's name without "Settings".
        adapters: values of model.adapter that the method works with.
        dynamic_sampling: whether groups without signal may be dropped before the method sees them.
        demonstrations: when it learns from demonstrations: in the `stages` named sft, at `every
            step`, or `as needed`.
        own_loss: whether its loss on demonstrations differs from L_SFT.
        trains_base: whether it trains the base weights along with an adapter.
        reads_probes: whether it decides anything by the probes.
        limits: columns of metrics.jsonl for which the setting of the same name is a limit or a
            target; figures draw it as a dashed line.
    """

    algorithm: ClassVar[str] = ""
    adapters: ClassVar[tuple[str, ...]] = ("none", "lora")
    dynamic_sampling: ClassVar[bool] = True
    demonstrations: ClassVar[str] = "stages"
    own_loss: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    reads_probes: ClassVar[bool] = False
    limits: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.algorithm = cls.__name__.removesuffix("Settings")

    def stages(self, setup: Setup, epochs: int) -> tuple[tuple[str, int], ...]:
        """(name, epochs) of each stage: the setup's stages share the epochs of the run."""
        count = len(setup.stages)
        if not setup.shares:
            shares = [epochs // count + (i < epochs % count) for i in range(count)]
        else:
            shares = [math.ceil(share * epochs) if name == "sft" else max(1, int(share * epochs))
                      for name, share in zip(setup.stages, setup.shares, strict=True)]
        return tuple(zip(setup.stages, shares, strict=True))

    def copies(self, device: str) -> tuple[float, float]:
        """Copies of the trained weights that the method holds: always, and while it learns.

        For the memory estimate, in addition to weights, reference, optimizer, and one gradient.
        """
        return 0.0, 0.0

    def check_run(self, settings: "Settings") -> None:
        """Refuses settings of other sections that the method cannot work with."""
        if settings.model.adapter not in self.adapters:
            settings.model.refuse("adapter", f"the method {self.section} works with "
                                  + " or ".join(self.adapters))
        if settings.rl.dynamic_sampling_rounds > 1 and not self.dynamic_sampling:
            settings.rl.refuse("dynamic_sampling_rounds", f"the method {self.section} also learns "
                               "from groups without signal, so none may be dropped; set it to 1")


class MixingSettings(MethodSettings):
    """A method that runs SFT and RL in one stage.

    The stage has the RL epochs of SFT -> RL: the same rollouts and, where every step takes
    demonstrations, about the same number of those.
    """

    dynamic_sampling = False
    demonstrations = "every step"

    def stages(self, setup: Setup, epochs: int) -> tuple[tuple[str, int], ...]:
        return (("rl", max(1, epochs // 2)),)


@dataclass(frozen=True)
class Settings:
    """All settings of a run, by section; `method` has those of the run's method."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    sft: SFTSettings = field(default_factory=SFTSettings)
    rl: RLSettings = field(default_factory=RLSettings)
    entropy_control: EntropyControlSettings = field(default_factory=EntropyControlSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    verifier: VerifierSettings = field(default_factory=VerifierSettings)
    method: MethodSettings = field(default_factory=MethodSettings)

    def __post_init__(self):
        if self.entropy_control.kind == "kl_cov" and self.rl.updates_per_rollout == 1:
            self.entropy_control.refuse("kind", "in the first update after sampling |log pi - log "
                                        "pi_old| has no gradient, and with "
                                        "rl.updates_per_rollout=1 there is no other; set 2 or more")
        self.method.check_run(self)
