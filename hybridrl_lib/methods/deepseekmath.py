"""DeepSeekMath (arXiv 2402.03300): SFT, then GRPO with a frozen reference; Dr. GRPO and DAPO.

    pi_ref: the model after SFT, frozen
    in every step of RL:
        sample G answers o_i per problem from pi_old, which is pi_theta;  r_i: their rewards
        A_i = (r_i - mean(r)) / std(r), the same for every token of o_i
        one update by J = 1/G sum_i 1/T_i sum_t
            { min[rho A_i, clip(rho, 1 - epsilon, 1 + epsilon) A_i] - beta D_i,t }
        D = exp(u) - u - 1 with u = log pi_ref - log pi_theta  (k3: in the loss, not in the reward)

Second-hand, and consistent with TRL's documentation: the loss, k3, beta 0.04, G 64, 1024 tokens and
questions per batch, learning rate 1e-6, and one policy update per exploration stage, so that rho is
1 and the clip is inactive. epsilon is not stated. Process supervision and the iterative variant
(retrained reward model, reset reference) are not implemented. Here G, batch size, length, and
learning rates are the preset's, the reward is the verifier's, and 1e-4 is added to std.

`dr_grpo` (arXiv 2503.20783; README and released code read) removes the divisions: A_i = r_i -
mean(r), and the sum over tokens is divided by a constant, the maximum number of tokens of an
answer; beta = 0, one update. It and `dapo` are RL alone, without SFT before.

`dapo` (arXiv 2503.14476; verl's documentation and the project's README read) has beta = 0 and
  rl.epsilon_high=0.28           clip-higher; 0.2 below
  token_mean                     the mean is over all tokens of an update: long answers weigh more
  rl.dynamic_sampling_rounds=10  groups that are all right or all wrong are replaced
  rl.overlong_share=0.2          penalty over the last fifth before the maximum; -1 if truncated
Different here: after the last round a step continues with the groups there are, where verl's recipe
raises an error; a round is as large as the batch, where the recipe samples three times the batch; a
correct answer earns 1 and a wrong one 0, not -1, so the same penalty has twice the weight relative
to the reward. Overlong filtering, which the best run does not use, and verl's bound for tokens of
negative advantage (dual clip) are not implemented. The length of the learning rate's warm-up is
unverified; warm-up and decay are the preset's.
"""

from .staged import Staged


class DeepSeekMath(Staged):
    """SFT, then GRPO with a frozen reference; Dr. GRPO and DAPO by settings."""
