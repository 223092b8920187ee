"""All settings of a run: one frozen dataclass per section, each field with meaning and source.

Defaults that depend on the model are those of the tiny world; `presets/` has every preset's own.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..system.paths import without_home
from .fields import Section, setting

BENCHMARK_NAMES = ("tiny_word", "tiny_symbolic", "gsm8k", "math500")
A_STEP = "A step is one batch of SFT, or one batch of rollouts with all its optimizer updates"
LEARNING_RATE = ("AdamW's learning rate before decay and warm-up; both multiply it from the first "
                 "step on, so with both it is never quite reached")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VLLM_SHARE = 0.4  # fraction of GPU memory that vllm takes for itself


@dataclass(frozen=True)
class ModelSettings(Section):
    """The base model and how it is held in memory."""

    section: ClassVar[str] = "model"
    path: str = setting(
        "tiny", "tiny = the model shipped with the package; otherwise a model folder, a hub name, "
        "or a GGUF file", "the paper: Qwen2.5-0.5B, in the presets colab and paper")
    revision: str | None = setting(None, "commit of a hub model; none = the newest")
    adapter: str = setting("none", "none = train all weights; lora = train low-rank adapters only",
                           choices=("none", "lora"))
    lora_rank: int = setting(16, "rank of each adapter", at_least=1)
    lora_alpha: float = setting(32.0, "the adapter's output is scaled by lora_alpha / lora_rank",
                                above=0)
    lora_targets: tuple[str, ...] = setting(LORA_TARGETS, "linear layers that get an adapter")
    precision: str = setting(
        "auto", "number format of the forward pass; auto = bf16 from CUDA capability 8.0 on, "
        "otherwise fp32", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = setting("auto", "auto = the GPU if there is one", choices=("auto", "cpu", "cuda"))
    sampler: str = setting(
        "own", "own = the sampler of this project; vllm = the package vllm, on a GPU with room for "
        "a second copy of the model", choices=("own", "vllm"))
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about a third more time")

    def check(self) -> None:
        # Settings are recorded: no record may name the user's home folder.
        object.__setattr__(self, "path", without_home(self.path))


@dataclass(frozen=True)
class DataSettings(Section):
    """Which problems there are and how they are split."""

    section: ClassVar[str] = "data"
    benchmarks: tuple[str, ...] = setting(
        ("tiny_word", "tiny_symbolic"), "benchmarks, joined for training and scored separately",
        "the paper: GSM8K and MATH-500 joined", choices=BENCHMARK_NAMES)
    split: str = setting(
        "paper", "paper = pool all rows and split them by train_fraction; official = GSM8K's own "
        "test file", "the paper; which rows it pools is left open", choices=("paper", "official"))
    train_fraction: float = setting(0.6, "fraction of each benchmark used for training",
                                    "the paper", above=0, below=1)
    validation_fraction: float = setting(
        0.1, "fraction of the training part held out for validation", above=0, below=1)
    split_seed: int = setting(0, "seed of the split; independent of the run's seed", at_least=0)
    train_limits: tuple[int, ...] = setting(
        (), "training problems of each benchmark, in the order of data.benchmarks, or one number "
        "for all; () = all", at_least=0)
    validation_limits: tuple[int, ...] = setting((), "the same for validation problems", at_least=0)
    test_limits: tuple[int, ...] = setting((), "the same for test problems", at_least=0)
    max_solution_steps: int | None = setting(
        None, "training and validation problems only: maximum number of lines of the reference "
        "solution; a rule that does not look at the model", at_least=1)
    max_level: int | None = setting(
        None, "training and validation problems only: maximum MATH level", at_least=1, at_most=5)
    max_prompt_tokens: int = setting(
        512, "training and validation problems with a longer prompt are left out (tokens)",
        at_least=1)
    max_demonstration_tokens: int = setting(
        512, "training and validation problems with a longer reference solution are left out "
        "(tokens)", at_least=1)

    def check(self) -> None:
        if not self.benchmarks or len(set(self.benchmarks)) < len(self.benchmarks):
            self.refuse("benchmarks", "name at least one benchmark, each once")
        for name in ("train_limits", "validation_limits", "test_limits"):
            limits = getattr(self, name)
            if len(limits) == 1:
                object.__setattr__(self, name, limits * len(self.benchmarks))
            elif limits and len(limits) != len(self.benchmarks):
                self.refuse(name, f"give one number for all or {len(self.benchmarks)} numbers")
            if limits and not any(limits):
                self.refuse(name, "at least one benchmark must keep a problem")


@dataclass(frozen=True)
class TrainingSettings(Section):
    """What both stages share."""

    section: ClassVar[str] = "training"
    epochs: int = setting(
        10, "passes over the training problems; a two-stage setup gives each stage half, and SFT "
        "the odd one", "the paper: 10, or 5 + 5", at_least=2)
    betas: tuple[float, ...] = setting(
        (0.9, 0.95), "AdamW's decay rates of the first and second moment of the gradient",
        at_least=0, below=1)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", at_least=0)
    gradient_clip: float = setting(1.0, "maximum gradient norm of an optimizer update",
                                   "HPT", above=0)
    warmup_steps: int = setting(
        10, "steps over which a factor rises linearly to 1, in each stage; it multiplies the "
        f"learning rate, which decays at the same time. {A_STEP}", at_least=0)
    final_learning_rate_fraction: float = setting(
        0.1, "fraction of the learning rate to which it decays linearly from the first step of a "
        "stage; it would be reached one step after the last", at_least=0, at_most=1)
    micro_batch_tokens: int = setting(
        4096, "tokens, padding included, in one forward and backward pass; changes memory, and "
        "results by rounding only; 0 = as many as fit into the memory of the device", at_least=0)
    logit_chunk_tokens: int = setting(
        1024, "tokens whose logits are held at once; changes memory, and results by rounding only",
        at_least=1)
    entropy: str = setting(
        "vocabulary", "vocabulary = entropy over all words at each token; sampled = the printed "
        "sum over the tokens of the text",
        "the paper prints the latter", choices=("vocabulary", "sampled"))
    checkpoint_every: int = setting(
        50, "steps (see training.warmup_steps) between checkpoints", at_least=1)
    samples_every: int = setting(
        25, "steps between lines of samples.jsonl, which RL steps write", at_least=1)
    validate_every: int = setting(1, "epochs between scores on the validation problems", at_least=1)

    def check(self) -> None:
        if len(self.betas) != 2:
            self.refuse("betas", "give two numbers")


@dataclass(frozen=True)
class SFTSettings(Section):
    """The supervised stage: L_SFT - gamma * H."""

    section: ClassVar[str] = "sft"
    batch_size: int = setting(
        32, "reference solutions per step, which is one optimizer update", at_least=1)
    learning_rate: float = setting(2e-4, LEARNING_RATE, above=0)
    gamma: float = setting(
        0.1, "weight of the entropy, in setups with entropy regularization only",
        "the paper has the term, not its weight", at_least=0)
    loss_normalization: str = setting(
        "token_mean", "what the token losses of an optimizer update are divided by; also used for "
        "the entropy term, in RL stages as well", "the paper's letter is sequence_sum",
        choices=("token_mean", "sequence_mean", "sequence_sum"))


@dataclass(frozen=True)
class RLSettings(Section):
    """The reinforcement stage: L_GRPO - gamma * H."""

    section: ClassVar[str] = "rl"
    prompts_per_step: int = setting(
        16, "problems per batch of rollouts, which is one step", at_least=1)
    group_size: int = setting(8, "G, completions per problem", "most GRPO recipes", at_least=2)
    updates_per_rollout: int = setting(
        2, "mini-batches, each one optimizer update, in which a batch of rollouts is used once",
        "Algorithm 1: 1, where ratio, clip, and KL to old are inert", at_least=1)
    learning_rate: float = setting(1.5e-4, LEARNING_RATE, above=0)
    gamma: float = setting(
        0.02, "weight of the entropy, in setups with entropy regularization only",
        "the paper has the term, not its weight", at_least=0)
    beta: float = setting(0.02, "weight of the KL divergence in the loss",
                          "the paper has the term, not its weight", at_least=0)
    kl_anchor: str = setting(
        "old", "the policy that the KL divergence is measured from: old = the one that sampled; "
        "reference = the pretrained base model, frozen, in every stage, also after SFT; stage = "
        "the policy at the start of the stage, frozen",
        "the paper: old; GRPO as published: reference; DeepSeekMath's is the SFT model: stage",
        choices=("old", "reference", "stage"))
    kl_estimator: str = setting(
        "ratio_k3", "per-token estimator of the KL to reference or stage: ratio_k3 = ratio times "
        "k3, whose gradient is that of the divergence; k3 = k3 alone",
        "GRPO as published: k3, which assumes samples of the policy itself",
        choices=("ratio_k3", "k3"))
    epsilon_low: float = setting(
        0.2, "the ratio is clipped below 1 - epsilon_low",
        "the paper has one epsilon, not its value", above=0, below=1)
    epsilon_high: float = setting(
        0.2, "the ratio is clipped above 1 + epsilon_high", "see epsilon_low", above=0)
    clip: bool = setting(True, "whether the ratio is clipped",
                         "the released code of ReLIFT, LUFFY, and HPT does not")
    advantage_scale: str = setting(
        "group_std", "group_std = reward minus the group's mean, divided by its standard "
        "deviation; none = the difference alone",
        "GRPO; the paper's words are none", choices=("group_std", "none"))
    loss_normalization: str = setting(
        "sequence_mean", "what the token losses of an optimizer update are divided by; for the "
        "entropy term see sft.loss_normalization", "the paper: 1/G sum 1/T_i",
        choices=("sequence_mean", "token_mean", "constant", "sequence_sum"))
    reward: str = setting(
        "answer", "answer = 1 for an answer that is correct by the strict rule, else 0; "
        "answer_and_steps = the equations written in the solution must hold as well, and there "
        "must be some if the reference solution has any",
        "the paper promises rewards sensitive to errors of inference and has none",
        choices=("answer", "answer_and_steps"))
    temperature: float = setting(
        1.0, "temperature of sampling and of the trained log-probabilities",
        "the paper: samples of the policy itself", above=0)
    max_new_tokens: int = setting(56, "maximum length of a completion (tokens)", at_least=1)
    overlong_share: float = setting(
        0.0, "the last fraction of rl.max_new_tokens, over which the reward behind the advantage "
        "falls linearly by 1; a truncated completion loses all of it; 0 = no penalty",
        "DAPO: 4096 of 20480 tokens = 0.2", at_least=0, at_most=1)
    dynamic_sampling_rounds: int = setting(
        1, "above 1: groups whose answers are all correct or all wrong are dropped, and more "
        "problems are sampled until rl.prompts_per_step groups are left, in at most this many "
        "rounds", "DAPO: at most 10 rounds of three times the batch", at_least=1)
    reference_every: int = setting(
        1, "steps between values of kl/reference; every step if the loss needs it", at_least=1)

    def check(self) -> None:
        if self.prompts_per_step % self.updates_per_rollout:
            self.refuse("updates_per_rollout", "it must divide rl.prompts_per_step "
                        f"({self.prompts_per_step}) so that no group is split")
        if self.kl_estimator == "k3" and self.kl_anchor == "old":
            self.refuse("kl_estimator", "with rl.kl_anchor=old its gradient is 0 at the first "
                        "update; choose ratio_k3, or the anchor reference or stage")


@dataclass(frozen=True)
class EntropyControlSettings(Section):
    """What keeps the entropy of RL from collapsing; a method refuses kinds that it cannot use."""

    section: ClassVar[str] = "entropy_control"
    kind: str = setting(
        "none", "adaptive = an entropy bonus that seeks a target; clip_cov, kl_cov = by the "
        "covariance of log-probability and advantage; for a constant bonus see rl.gamma",
        "2505.22617 (clip_cov, kl_cov); Skywork-OR1 (adaptive)",
        choices=("none", "adaptive", "clip_cov", "kl_cov"))
    target: float = setting(
        0.2, "adaptive: the entropy below which the bonus is active and grows (nats per token)",
        "Skywork-OR1, for 7B to 32B: measure the base model's first", above=0)
    change: float = setting(1e-4, "adaptive: change of the weight per step", "Skywork-OR1", above=0)
    largest: float = setting(0.005, "adaptive: maximum weight", "Skywork-OR1", above=0)
    clip_share: float = setting(2e-4, "clip_cov: fraction of an update's tokens without gradient",
                                "2505.22617", above=0, at_most=1)
    clip_low: float = setting(1.0, "clip_cov: minimum covariance of these tokens", "2505.22617")
    clip_high: float = setting(5.0, "clip_cov: maximum covariance of these tokens", "2505.22617")
    kl_share: float = setting(2e-3, "kl_cov: fraction of an update's tokens with a KL penalty",
                              "2505.22617: 2e-3 for 7B, 2e-4 for 32B", above=0, at_most=1)
    kl_weight: float = setting(1.0, "kl_cov: weight of |log pi - log pi_old|", "2505.22617",
                               above=0)

    def check(self) -> None:
        if self.clip_low >= self.clip_high:
            self.refuse("clip_low", "no covariance lies between; choose less than "
                        f"entropy_control.clip_high = {self.clip_high:g}")


@dataclass(frozen=True)
class EvaluationSettings(Section):
    """How a trained model is scored."""

    section: ClassVar[str] = "evaluation"
    samples: int = setting(16, "m, sampled solutions per test problem in Pass@k; 0 = greedy only",
                           "the paper has Pass@k, not its m", at_least=0)
    train_samples: int = setting(
        16, "the same on the training problems, for the train-test gap; at least rl.group_size for "
            "the base model, to show what RL starts from", at_least=0)
    pass_at: tuple[int, ...] = setting((1, 2, 4, 8), "the k of Pass@k", at_least=1)
    temperature: float = setting(1.0, "temperature of the sampled solutions", above=0)
    max_new_tokens: int = setting(56, "maximum length of a solution (tokens)", at_least=1)
    batch_size: int = setting(512, "sequences decoded together", at_least=1)
    train_limit: int | None = setting(
        None, "training problems per benchmark scored for the train-test gap; none = all",
        at_least=0)

    def check(self) -> None:
        largest = max(self.pass_at, default=0)
        for name in ("samples", "train_samples"):
            if 0 < getattr(self, name) < largest:
                self.refuse(name, f"Pass@{largest} of evaluation.pass_at needs {largest} samples")


@dataclass(frozen=True)
class ProbeSettings(Section):
    """The measurement that every setup takes on the same validation problems while it trains."""

    section: ClassVar[str] = "probe"
    every: int = setting(10, "steps (see training.warmup_steps) between probes", at_least=1)
    prompts: int = setting(
        32, "validation problems that are sampled: the first ones, alternating between benchmarks",
        at_least=1)
    samples: int = setting(8, "completions per problem", at_least=2)


@dataclass(frozen=True)
class VerifierSettings(Section):
    """The processes that compare an answer with the gold answer."""

    section: ClassVar[str] = "verifier"
    workers: int = setting(
        1, "processes for the answers that the numeric fast path cannot decide", at_least=1)
    time_limit: float = setting(
        5.0, "seconds per answer; after that the process is killed and the answer earns 0",
        above=0)
