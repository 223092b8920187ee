"""One GRPO step of TRL's GRPOTrainer, as its train() takes it.

A step is what `Trainer._run_epoch` does from one call of the optimizer to the next: `training_step`
of every micro-batch (the first one samples, by `generate` of transformers, and scores), clipping,
the optimizer, zero_grad. Data loader, schedule, logging, callbacks and disk are left out.
"""

import copy
import tempfile
import time
from collections.abc import Sequence

import torch
from datasets import Dataset
from grpo_step import LEARNING_RATE, Outcome, rewards
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from hybridrl_lib.config.settings import Settings
from hybridrl_lib.policy.completions import Group
from hybridrl_lib.policy.policy import Policy
from hybridrl_lib.policy.prompts import prompt_text
from hybridrl_lib.system.errors import UserError

LOSS_TYPES = {"sequence_mean": "grpo", "token_mean": "dapo", "constant": "dr_grpo"}


class TRLStep:
    """A GRPOTrainer on a copy of the policy's model, with the same settings.

    Args:
        policy: gives weights, tokenizer, precision and stop tokens.
        questions: one a group.
        settings: of our side; TRL gets what they mean there.
        which: groups with a signal, as `rewards` takes it.
        rows: completions of a micro-batch; they must divide all completions of a step.

    Raises:
        UserError: TRL reads the prompts as other tokens.
    """

    def __init__(self, policy: Policy, questions: Sequence[str], settings: Settings, which: str,
                 rows: int):
        samples, training = settings.rl.group_size, settings.training
        self.completions = len(questions) * samples
        texts = [prompt_text(policy.tokenizer, question) for question in questions]
        if policy.tokenizer(text=texts)["input_ids"] != [policy.encode_prompt(q)
                                                         for q in questions]:
            raise UserError("TRL reads this model's prompts as other tokens; take another model.")
        model = policy.plain_model()  # not with this library's products and attention
        # In place of the model's own, which may hold a repetition penalty or a top-k.
        model.generation_config = GenerationConfig(eos_token_id=list(policy.stop_ids),
                                                   pad_token_id=policy.pad_id)
        self._folder = tempfile.TemporaryDirectory()  # nothing is written to it
        arguments = GRPOConfig(
            output_dir=self._folder.name, use_cpu=policy.device.type == "cpu", report_to="none",
            disable_tqdm=True, save_strategy="no", logging_strategy="no",
            fp16=False, bf16=policy.precision == "bf16", gradient_checkpointing=False,
            per_device_train_batch_size=self.completions, gradient_accumulation_steps=1,
            num_generations=samples, max_completion_length=settings.rl.max_new_tokens,
            temperature=settings.rl.temperature, top_p=1.0, top_k=0,
            generation_kwargs={"eos_token_id": list(policy.stop_ids)},
            beta=settings.rl.beta, epsilon=settings.rl.epsilon_low,
            epsilon_high=settings.rl.epsilon_high, num_iterations=1,
            loss_type=LOSS_TYPES[settings.rl.loss_normalization],
            scale_rewards={"group_std": "group"}.get(settings.rl.advantage_scale, "none"),
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            adam_beta1=training.betas[0], adam_beta2=training.betas[1],
            weight_decay=training.weight_decay, max_grad_norm=training.gradient_clip)

        def reward(completions, **_):
            return rewards(len(completions) // samples, samples, which).flatten().tolist()

        self.trainer = GRPOTrainer(
            model=model, args=arguments, processing_class=copy.deepcopy(policy.tokenizer),
            reward_funcs=reward, train_dataset=Dataset.from_list([{"prompt": t} for t in texts]))
        self.trainer.eos_token_ids = list(policy.stop_ids)
        self.batch = [{"prompt": text} for text in texts for _ in range(samples)]
        self.trainer.create_optimizer()
        self.model, self.trainer.optimizer = self.trainer.accelerator.prepare(
            self.trainer.model, self.trainer.optimizer)
        self.trainer.model_wrapped = self.model
        self.rows = rows
        self._time_the_sampling()

    @property
    def rows(self) -> int:
        """Completions of a micro-batch."""
        return self.trainer.args.per_device_train_batch_size

    @rows.setter
    def rows(self, rows: int) -> None:
        count = self.completions // rows
        arguments = self.trainer.args
        arguments.per_device_train_batch_size = rows
        arguments.gradient_accumulation_steps = arguments.steps_per_generation = count

    def _time_the_sampling(self) -> None:
        """Notes the seconds and tokens of `_generate`: tokenisation, sampling, text."""
        generate = self.trainer._generate
        self.sampling, self.tokens = 0.0, 0

        def timed(prompts):
            began = time.perf_counter()
            result = generate(prompts)
            self.sampling = time.perf_counter() - began
            self.tokens = sum(map(len, result[1]))
            return result

        self.trainer._generate = timed

    def update(self, groups: Sequence[Group]) -> Outcome:
        """One step on completions that were sampled elsewhere."""
        pairs = [(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
        self.trainer.rollout_func = lambda prompts, trainer: {
            "prompt_ids": [prompt for prompt, _ in pairs],
            "completion_ids": [completion for _, completion in pairs], "logprobs": None}
        try:
            return self(0)
        finally:
            self.trainer.rollout_func = None

    def __call__(self, seed: int) -> Outcome:
        """A whole step."""
        trainer, count = self.trainer, self.trainer.args.gradient_accumulation_steps
        torch.manual_seed(seed)
        began = time.perf_counter()
        trainer._step = trainer._step // count * count  # micro-batches may have been of other size
        trainer._buffered_inputs = None
        trainer.current_gradient_accumulation_steps = count
        loss = torch.zeros((), device=trainer.accelerator.device)
        for number in range(count):
            trainer.accelerator.gradient_state._set_sync_gradients(number + 1 == count)
            loss += trainer.training_step(self.model, self.batch, None)
        norm = float(trainer._clip_grad_norm(self.model))
        trainer.optimizer.step()
        self.model.zero_grad()
        trainer.state.global_step += 1
        return Outcome(self.sampling, time.perf_counter() - began - self.sampling, self.tokens,
                       float(loss), norm)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.optimizer.optimizer

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())
