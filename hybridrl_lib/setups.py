"""The table of setups: name -> method, stages, settings, and the row of the paper's Table 2."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setup:
    """One row of Table 2, or a setup that is not in the paper.

    Attributes:
        name: for `hybridrl run`, and the folder of its records.
        title: the row's name in tables and figures.
        stages: the stages in order; they share the epochs of the run, unless the method says
            otherwise.
        shares: fraction of the run's epochs for each stage, if they are not shared equally; the sum
            may be more than 1.
        entropy: whether the entropy term -gamma * H is in the loss (paper, setup iv).
        paper: exact match in percent as the paper prints it, by benchmark; empty for a setup that
            is not in the paper.
        notebook: the notebook that runs it; "" if only `hybridrl run` does.
        method: a key of `config.methods.METHODS`.
        settings: the settings that define it, as in `--set`.
    """

    name: str
    title: str
    stages: tuple[str, ...]
    entropy: bool = False
    paper: dict[str, float] = field(default_factory=dict)
    notebook: str = ""
    method: str = "staged"
    settings: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()

    def __post_init__(self):
        # The name becomes a folder and part of pages, the title a cell in Markdown and LaTeX.
        if not re.fullmatch(r"\w[\w.+-]*", self.name) or re.search(r"[<>&|`$\[\]\\\x00-\x1f]",
                                                                self.title):
            raise ValueError(f"The setup {self.name!r} ({self.title!r}) needs a plain name, and a "
                             "title without < > & | ` $ [ ] or backslashes.")

    @property
    def in_paper(self) -> bool:
        """Whether it is a row of the paper's Table 2, or the base model they start from."""
        return self.name == "base" or bool(self.paper)


SETUPS: dict[str, Setup] = {
    setup.name: setup
    for setup in (
        Setup("base", "base model", (), False, {}, "00_start_here"),
        Setup("sft", "SFT", ("sft",), False, {"gsm8k": 44.1, "math500": 33.2}, "10_sft"),
        Setup("rl", "RL", ("rl",), False, {"gsm8k": 31.8, "math500": 20.7}, "11_rl"),
        Setup("sft_then_rl", "SFT + RL", ("sft", "rl"), False,
              {"gsm8k": 51.6, "math500": 36.1}, "12_sft_then_rl"),
        Setup("sft_entropy", "SFT + entropy reg.", ("sft",), True,
              {"gsm8k": 45.2, "math500": 33.9}, "13_sft_entropy"),
        Setup("rl_entropy", "RL + entropy reg.", ("rl",), True,
              {"gsm8k": 33.0, "math500": 20.8}, "14_rl_entropy"),
        Setup("sft_then_rl_entropy", "SFT + RL + entropy reg.", ("sft", "rl"), True,
              {"gsm8k": 52.7, "math500": 37.4}, "15_sft_then_rl_entropy"),
        # GRPO as others publish it, by settings alone.
        Setup("deepseekmath", "DeepSeekMath (SFT + GRPO)", ("sft", "rl"),
              notebook="32_deepseekmath", method="deepseekmath",
              settings=("rl.kl_anchor=stage", "rl.kl_estimator=k3", "rl.beta=0.04",
                        "rl.updates_per_rollout=1")),
        Setup("dr_grpo", "Dr. GRPO", ("rl",), method="deepseekmath",
              settings=("rl.advantage_scale=none", "rl.loss_normalization=constant", "rl.beta=0",
                        "rl.updates_per_rollout=1")),
        Setup("dapo", "DAPO", ("rl",), method="deepseekmath",
              settings=("rl.epsilon_high=0.28", "rl.loss_normalization=token_mean", "rl.beta=0",
                        "rl.overlong_share=0.2", "rl.dynamic_sampling_rounds=10")),
        # Other ways to keep the entropy of RL up than the paper's constant weight.
        Setup("rl_adaptive_entropy", "RL + adaptive entropy", ("rl",),
              settings=("entropy_control.kind=adaptive",)),
        Setup("rl_clip_cov", "RL + Clip-Cov", ("rl",), settings=("entropy_control.kind=clip_cov",)),
        Setup("rl_kl_cov", "RL + KL-Cov", ("rl",), settings=("entropy_control.kind=kl_cov",)),
        # RL's whole budget after SFT: the control for claims about RL alone.
        Setup("sft_then_full_rl", "SFT + all of RL", ("sft", "rl"), shares=(0.5, 1.0)),
        # Other ways to combine SFT and RL, one method per paper.
        Setup("combined", "combined loss", ("rl",), notebook="30_combined_loss", method="combined"),
        Setup("combined_cosine", "combined loss, cosine", ("rl",), method="combined",
              settings=("combined.first=1", "combined.last=0", "combined.schedule=cosine")),
        Setup("relift", "ReLIFT", ("rl",), True, notebook="33_relift", method="relift",
              settings=("sft.gamma=1e-4", "rl.gamma=0")),
        Setup("relift_code", "ReLIFT, released code", ("rl",), True, method="relift",
              settings=("relift.newest_first=true", "rl.clip=false", "rl.advantage_scale=none",
                        "rl.loss_normalization=constant", "rl.beta=0", "sft.gamma=1e-3",
                        "rl.gamma=0.001")),
        Setup("superrl", "SuperRL", ("rl",), notebook="34_superrl", method="superrl"),
        Setup("superrl_advantage", "SuperRL, advantage gate", ("rl",), method="superrl",
              settings=("superrl.gate=advantage",)),
        Setup("superrl_code", "SuperRL, gate per update", ("rl",), method="superrl",
              settings=("superrl.granularity=update",)),
        Setup("superrl_drop", "SuperRL without SFT", ("rl",), method="superrl",
              settings=("superrl.unsolved=drop",)),
        Setup("superrl_log_sigma", "SuperRL, learned weights", ("rl",), method="superrl",
              settings=("superrl.mixing=log_sigma",)),
        Setup("hpt", "HPT", ("rl",), True, method="hpt",
              settings=("rl.clip=false", "rl.advantage_scale=none", "rl.beta=0", "rl.gamma=0.001",
                        "rl.loss_normalization=constant")),
        Setup("sasr", "SASR", ("sft", "rl"), notebook="35_sasr",
              method="sasr", settings=("rl.kl_anchor=stage",)),
        Setup("chord", "CHORD-mu", ("rl",), method="chord",
              settings=("rl.updates_per_rollout=1",)),
        Setup("chord_phi", "CHORD-phi", ("rl",), method="chord",
              settings=("chord.schedule=constant", "chord.peak=0.1", "chord.phi=uncertainty",
                        "rl.updates_per_rollout=1")),
        Setup("chord_adaptive", "CHORD, adaptive", ("rl",), method="chord",
              settings=("chord.schedule=adaptive", "rl.updates_per_rollout=1")),
        Setup("luffy", "LUFFY", ("rl",), notebook="39_other_mixers",
              method="luffy", settings=("rl.beta=0",)),
        Setup("luffy_code", "LUFFY, released code", ("rl",), True, method="luffy",
              settings=("rl.clip=false", "rl.advantage_scale=none", "rl.beta=0",
                        "rl.loss_normalization=constant", "rl.gamma=0.001")),
        Setup("uft", "UFT", ("rl",), method="uft", settings=("rl.kl_anchor=reference",)),
        Setup("mifo", "MIFO", ("rl",), method="mifo"),
        Setup("mifo_last", "MIFO, alpha = 0", ("rl",), method="mifo",
              settings=("mifo.decay=0",)),
        Setup("switching", "SFT + RL, switched by validation", ("sft", "rl"),
              notebook="31_switching", method="switching"),
        Setup("switching_rl_first", "RL + SFT, switched by validation", ("rl", "sft"),
              method="switching", settings=("switching.first=rl", "switching.switches=3")),
        # RL's half of the epochs: the rollouts of SFT -> RL, without demonstrations.
        Setup("raft", "RAFT", ("rl",), method="raft", settings=("rl.beta=0",), shares=(0.5,)),
        Setup("frpo", "FRPO (PRL v2)", ("rl",), notebook="38_prl",
              method="prl", settings=("rl.beta=0",), shares=(0.5,)),
        Setup("prl", "PRL, fixed steps", ("rl",), method="prl", shares=(0.5,),
              settings=("rl.beta=0", "prl.steps=fixed", "prl.suffix=exclusive")),
        Setup("prl_newline", "PRL, one step per line", ("rl",), method="prl", shares=(0.5,),
              settings=("rl.beta=0", "prl.steps=newline", "prl.suffix=exclusive")),
        Setup("pear", "PEAR", ("sft", "rl"), notebook="37_pear", method="pear"),
        Setup("pear_centered", "PEAR, centered", ("sft", "rl"), method="pear",
              settings=("pear.centered=true", "pear.normalization=weights")),
        Setup("sft_sampled_then_rl", "SFT on sampled answers + RL", ("sft", "rl"), method="pear",
              settings=("pear.level=none",)),
        *(Setup(name, title, ("rl",), method="bridge",
                notebook="36_bridge" if name == "bridge" else "",
                settings=("model.adapter=lora", "rl.kl_anchor=reference", *settings))
          for name, title, settings in (
              ("bridge", "BRIDGE", ()),
              ("bridge_one_step", "BRIDGE, one step ahead", ("bridge.auxiliary=one_step",)),
              ("bridge_without_gain", "BRIDGE without gain", ("bridge.adapter=sft",)),
              ("bridge_joint", "BRIDGE, joint adapter", ("bridge.adapter=both",)),
              ("bridge_without_adapter", "BRIDGE without adapter", ("bridge.adapter=nothing",)))),
        Setup("prefix_rft", "Prefix-RFT", ("rl",), method="prefix_rft", settings=("rl.beta=0",)),
    )
}


def paper_setups() -> tuple[str, ...]:
    """The base model and the paper's six, in the order of Table 2."""
    return tuple(name for name, setup in SETUPS.items() if setup.in_paper)


def setups_with_notebook() -> tuple[str, ...]:
    """What `hybridrl reproduce` runs by default: Table 2, and other staged setups with a notebook.

    Other methods have notebooks too; `hybridrl compare` runs those.
    """
    return tuple(name for name, setup in SETUPS.items()
                 if setup.notebook and setup.method == "staged" and not setup.settings)
