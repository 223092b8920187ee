"""L_GRPO, its gradient, and its advantages equal those of TRL's GRPOTrainer at named settings.

Both get the same weights, prompts, completions, and rewards; TRL pads where this project packs, and
computes its own log-probabilities, advantages and reference.

| here                                    | TRL                                               |
| --------------------------------------- | ------------------------------------------------- |
| rl.loss_normalization=sequence_mean     | loss_type="grpo"                                  |
| rl.loss_normalization=token_mean        | loss_type="bnpo", "dapo"                          |
| rl.loss_normalization=constant          | loss_type="dr_grpo"                               |
| rl.advantage_scale=group_std, none      | scale_rewards="group", "none"                     |
| rl.kl_anchor=reference, rl.beta         | beta, use_bias_correction_kl=True                 |
| gamma of the stage                      | entropy_coef                                      |
"""

import pytest
import torch
from datasets import Dataset
from small_training import Fixed, distance, rows_of, take_first_step, watch, watch_rollouts
from trl import GRPOConfig, GRPOTrainer

TEMPERATURE, GROUP, CAP = 0.7, 4, 12  # TRL fixes the temperature when it is built
REWARDS = [1, 0, 0, 1] + [0, 0, 0, 0] + [0, 1, 0, 0] * 3 + [1, 1, 1, 0] * 2 + [1, 1, 1, 1]


class Rollouts:
    """Gives TRL completions that were sampled here."""

    def __init__(self):
        self.groups = []

    def __call__(self, prompts, trainer):
        pairs = [(g.prompt_ids, c.token_ids) for g in self.groups for c in g.completions]
        assert len(prompts) == len(pairs)
        return {"prompt_ids": [p for p, _ in pairs], "completion_ids": [c for _, c in pairs],
                "logprobs": None}


@pytest.fixture(scope="module")
def trl(make_policy, tmp_path_factory):
    """A GRPOTrainer on the same model, on the CPU, that takes its completions from us."""
    policy = make_policy()
    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none",
        per_device_train_batch_size=16, num_generations=GROUP, max_completion_length=CAP,
        temperature=TEMPERATURE, beta=0.1, gradient_checkpointing=False, disable_tqdm=True)
    trainer = GRPOTrainer(
        model=policy.model, args=config, processing_class=policy.tokenizer,
        reward_funcs=lambda reward, **_: reward, rollout_func=Rollouts(),
        train_dataset=Dataset.from_list([{"prompt": "How many?", "reward": 0.0}] * 16))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def set_up(trl, loss_type="grpo", scale_rewards="group", beta=0.0, epsilons=(0.2, 0.2),
           correction=True, entropy_coef=0.0):
    """Gives the trainer, built once, the settings of a case."""
    trl.loss_type, trl.scale_rewards, trl.beta = loss_type, scale_rewards, beta
    trl.epsilon_low, trl.epsilon_high = epsilons
    trl.args.use_bias_correction_kl = correction
    trl.entropy_coef, trl._entropy_bonus_enabled = entropy_coef, entropy_coef != 0


def load(model, weights):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def theirs(trl, groups, rewards, start, now):
    """TRL's loss and gradient at weights `now`, for completions sampled at weights `start`."""
    load(trl.model, start)
    trl.rollout_func.groups = groups
    inputs = trl._generate_and_score_completions(
        [{"prompt": "How many?", "reward": float(r)} for r in rewards])
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        inputs["old_per_token_logps"], _, _ = trl._get_per_token_logps_and_entropies(
            trl.model, ids, mask, inputs["completion_ids"].size(1))
    load(trl.model, now)
    trl.model.zero_grad()
    loss = trl.compute_loss(trl.model, inputs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trl.model.parameters()])


def both(make_trainer, monkeypatch, trl, overrides, case, setup="rl"):
    """Runs a step here, and the same two mini-batches there.

    Returns:
        Our recorded loss, TRL's mean loss, and for both mini-batches the gradients' distance.
    """
    with monkeypatch.context() as patch:
        taken = watch_rollouts(patch)
        trainer = make_trainer(
            setup, f"rl.temperature={TEMPERATURE}", "rl.learning_rate=0.004", "rl.beta=0",
            *overrides, verifier=Fixed(REWARDS), folder=f"{setup}-{overrides}-{case}")
        seen = watch(trainer)
        take_first_step(trainer)
    row, groups = rows_of(trainer)[0], taken[0]
    assert row["clip_ratio"] > 0.01, "the second mini-batch must be off-policy"
    set_up(trl, **case)
    losses, distances = [], []
    for index in range(2):
        mine = range(index, len(groups), 2)
        rewards = [r for i in mine for r in REWARDS[i * GROUP:(i + 1) * GROUP]]
        loss, gradient = theirs(trl, [groups[i] for i in mine], rewards, seen.weights[0],
                                seen.weights[index])
        losses.append(loss)
        distances.append(distance(seen.gradients[index], gradient))
    return row["loss/rl"], sum(losses) / 2, max(distances)


def test_loss_and_gradient_equal_trls(make_trainer, monkeypatch, trl):
    """On-policy (first mini-batch), and off-policy with an active clip (second)."""
    wrong = []
    for overrides, case in (
            ((), {}),
            (("rl.loss_normalization=token_mean",), {"loss_type": "bnpo"}),
            (("rl.loss_normalization=token_mean",), {"loss_type": "dapo"}),
            (("rl.loss_normalization=constant", "rl.advantage_scale=none"),
             {"loss_type": "dr_grpo", "scale_rewards": "none"}),
            (("rl.loss_normalization=constant",), {"loss_type": "dr_grpo"}),
            (("rl.advantage_scale=none",), {"scale_rewards": "none"}),
            (("rl.epsilon_low=0.05", "rl.epsilon_high=0.4"), {"epsilons": (0.05, 0.4)}),
            (("rl.kl_anchor=reference", "rl.beta=0.3"), {"beta": 0.3}),
            (("rl.kl_anchor=reference", "rl.beta=0.3", "rl.loss_normalization=token_mean"),
             {"beta": 0.3, "loss_type": "dapo"})):
        mine, other, apart = both(make_trainer, monkeypatch, trl, overrides, case)
        if mine != pytest.approx(other, rel=1e-4, abs=1e-6) or apart >= 1e-4:
            wrong.append((overrides, case, mine, other, apart))
    assert not wrong


def test_the_entropy_term_equals_trls(make_trainer, monkeypatch, trl):
    """gamma * H with H a mean over the mini-batch's tokens, over the whole vocabulary."""
    _, _, apart = both(make_trainer, monkeypatch, trl,
                       ("rl.gamma=0.2", "training.entropy=vocabulary"), {"entropy_coef": 0.2},
                       setup="rl_entropy")
    assert apart < 1e-4


def test_other_settings_of_trl_are_other_losses(make_trainer, monkeypatch, trl):
    """The comparison has power: a setting that differs on one side alone is seen.

    Among them TRL's default KL, plain k3, which assumes samples of the policy itself.
    """
    unseen = []
    for overrides, case in (
            (("rl.loss_normalization=token_mean",), {"loss_type": "grpo"}),
            ((), {"scale_rewards": "none"}),
            (("rl.kl_anchor=reference", "rl.beta=0.3"), {"beta": 0.3, "correction": False}),
            ((), {"epsilons": (0.1, 0.1)}), ((), {"entropy_coef": 0.01})):
        _, _, apart = both(make_trainer, monkeypatch, trl, overrides, case)
        if apart <= 1e-3:
            unseen.append((overrides, case, apart))
    assert not unseen
