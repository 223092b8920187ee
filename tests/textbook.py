"""A textbook implementation: one completion at a time, all logits at once, no packing."""

import torch

CAP = 12  # rl.max_new_tokens of small_training.SMALL


def plain_scores(model, prompt, completion, temperature=1.0):
    """Log-probabilities and entropies of a completion, (T,) each."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1:-1] / temperature
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def plain_mean(terms, normalization):
    """The mean of token terms [(T_i,)] by name."""
    sums = torch.stack([term.sum() for term in terms])
    lengths = torch.tensor([float(len(term)) for term in terms])
    return {"sequence_mean": (sums / lengths).mean(), "token_mean": sums.sum() / lengths.sum(),
            "constant": sums.sum() / (len(terms) * CAP), "sequence_sum": sums.mean()}[normalization]


def plain_grpo(policy, groups, rewards, old, reference, settings, gamma=0.0, entropy="vocabulary"):
    """L_GRPO - gamma H of one mini-batch as the paper writes it; `old`: (T_i,) per completion."""
    rl, losses, entropies, place = settings.rl, [], [], 0
    for group, reward in zip(groups, rewards, strict=True):
        gain = reward - reward.mean()
        if rl.advantage_scale == "group_std":
            gain = gain / (reward.std() + 1e-4)
        for completion, advantage in zip(group.completions, gain, strict=True):
            now, all_words = plain_scores(policy.model, group.prompt_ids, completion.token_ids,
                                          rl.temperature)
            rho = (now - old[place]).exp()
            loss = -torch.min(rho * advantage,
                              rho.clamp(1 - rl.epsilon_low, 1 + rl.epsilon_high) * advantage)
            if rl.kl_anchor == "old":
                loss = loss + rl.beta * (rho * rho.log() - rho + 1)
            else:
                away = reference[place] - now
                weight = 1 if rl.kl_estimator == "k3" else rho
                loss = loss + rl.beta * weight * (away.exp() - away - 1)
            losses.append(loss)
            entropies.append(all_words if entropy == "vocabulary" else -now.exp() * now)
            place += 1
    return (plain_mean(losses, rl.loss_normalization)
            - gamma * plain_mean(entropies, settings.sft.loss_normalization))


def gradient(trainer, loss):
    trainer.policy.model.zero_grad()
    loss.backward()
    result = torch.cat([p.grad.flatten() for p in trainer.learner.parameters])
    trainer.policy.model.zero_grad(set_to_none=True)
    return result


def all_scores(trainer, groups):
    with torch.no_grad():
        return [plain_scores(trainer.policy.model, g.prompt_ids, c.token_ids,
                             trainer.settings.rl.temperature)[0]
                for g in groups for c in g.completions]


def coin_rewards(trainer, problems, groups):
    verdicts = trainer.verifier.verify(
        [p.answer for p, g in zip(problems, groups, strict=True) for _ in g.completions],
        [c.text for g in groups for c in g.completions],
        [c.finished for g in groups for c in g.completions])
    return torch.tensor([float(v.strict) for v in verdicts]).view(len(groups), -1)


def problems_of(trainer, groups):
    """The problems that groups were sampled for, by their prompts."""
    by_prompt = {tuple(trainer.policy.encode_prompt(p.question)): p for p in trainer.parts.train}
    return [by_prompt[tuple(group.prompt_ids)] for group in groups]


def plain_sft(trainer, problems, normalization="token_mean", gamma=0.0):
    """L_SFT - gamma H on the demonstrations of problems."""
    found = [plain_scores(trainer.policy.model, trainer.policy.encode_prompt(p.question),
                          trainer.policy.encode_completion(p.solution)) for p in problems]
    return (plain_mean([-scores for scores, _ in found], normalization)
            - gamma * plain_mean([entropies for _, entropies in found], normalization))


def plain_rl(trainer, groups, rewards, old=None):
    """L_GRPO; 0 without groups. `rewards`: G of 0 and 1 per group. `old`: log pi_old of every
    completion; default: that of the policy as it is."""
    if not groups:
        return torch.zeros(())
    old = all_scores(trainer, groups) if old is None else old
    return plain_grpo(trainer.policy, groups, torch.tensor(rewards, dtype=torch.float32), old, old,
                      trainer.settings)
