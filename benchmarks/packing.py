"""The gradient of one RL batch: the prompt once a group against one row a completion.

Both take the same completions, sampled from the model, the same loss and the same budget of tokens
a micro-batch. See README.md in this folder.
"""

import sys
from collections.abc import Sequence

import torch
from common import (
    alternate,
    circumstances,
    finish,
    load,
    make_parser,
    positive_number,
    ratios,
    rounded,
    run,
    show,
)
from torch import Tensor

from hybridrl_lib.config.sections import RLSettings
from hybridrl_lib.objectives import group_advantages, grpo_loss, token_weights
from hybridrl_lib.policy.packing import Packed, PromptCompletion, pack
from hybridrl_lib.policy.policy import Policy
from hybridrl_lib.policy.sampling import sample


def one_row_each(sequences: Sequence[PromptCompletion], budget_tokens: int,
                 pad_id: int) -> list[Packed]:
    """The usual micro-batches: right-padded rows of prompt and completion, sorted by length."""
    def length(index: int) -> int:  # the last token is predicted and never read
        return len(sequences[index].prompt) + len(sequences[index].completion) - 1

    batches: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=length):
        if not batches or (len(batches[-1]) + 1) * length(index) > budget_tokens:
            batches.append([])
        batches[-1].append(index)
    return [_pad(sequences, batch, max(map(length, batch)), pad_id) for batch in batches]


def _pad(sequences: Sequence[PromptCompletion], batch: list[int], longest: int,
         pad_id: int) -> Packed:
    ids = torch.full((len(batch), longest), pad_id)
    present = torch.zeros(len(batch), longest, dtype=torch.long)  # transformers adds causality
    before, targets, owner = [], [], []
    for row, index in enumerate(batch):
        prompt, completion = sequences[index].prompt, sequences[index].completion
        read = torch.tensor([*prompt, *completion[:-1]])
        ids[row, :len(read)] = read
        present[row, :len(read)] = 1
        before.append(torch.arange(len(prompt) - 1, len(read)) + row * longest)
        targets.append(torch.tensor(completion))
        owner.append(torch.full((len(completion),), index))
    positions = torch.arange(longest).expand(len(batch), -1)
    return Packed(ids, positions, present, torch.cat(before), torch.cat(targets), torch.cat(owner))


class Batch:
    """One RL batch of S completions with made-up rewards, and the gradient of its loss."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], samples: int,
                 max_new_tokens: int, budget_tokens: int):
        self.policy, self.budget_tokens = policy, budget_tokens
        groups = sample(policy, prompts, samples=samples, max_new_tokens=max_new_tokens,
                        temperature=1.0)
        self.sequences = [PromptCompletion(group.prompt_ids, c.token_ids)
                          for group in groups for c in group.completions]
        # Random rewards: with true ones, how many groups have a gradient would depend on the model.
        rewards = torch.rand(len(groups), samples, generator=torch.Generator().manual_seed(0))
        self.advantages = group_advantages(rewards).flatten()
        lengths = torch.tensor([len(s.completion) for s in self.sequences])
        self.weights = token_weights(lengths, "sequence_mean")
        self.settings = RLSettings()
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def micro_batches(self, packing) -> list[Packed]:
        return packing(self.sequences, self.budget_tokens, self.policy.pad_id)

    def accumulate(self, packing) -> None:
        """The gradient of L_RL of the whole batch, in micro-batches; packing them is included."""
        self.policy.model.zero_grad(set_to_none=True)
        for micro_batch in self.micro_batches(packing):
            mine = micro_batch.to(self.policy.device)
            scores, _ = self.policy.score(mine)
            weights, advantages = (values[micro_batch.sequence].to(self.policy.device)
                                   for values in (self.weights, self.advantages))
            grpo_loss(scores, scores.detach(), advantages, weights,
                      epsilon_low=self.settings.epsilon_low,
                      epsilon_high=self.settings.epsilon_high).backward()

    def gradient(self, packing) -> Tensor:
        """The gradient as one vector, fp32."""
        self.accumulate(packing)
        return torch.cat([p.grad.flatten() for p in self.parameters])


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures, prints a table and the JSON line; returns what the line holds."""
    parser = make_parser("The prompt packed once a group against one row a completion.",
                         prompts=16, pairs=6)
    parser.add_argument("--micro-batch-tokens", type=positive_number, default=1024,
                        help="tokens of a micro-batch, padding included; default: 1024")
    arguments = parser.parse_args(argv)
    policy, prompts = load(arguments)
    batch = Batch(policy, prompts, arguments.samples, arguments.max_new_tokens,
                  arguments.micro_batch_tokens)
    packed, plain = batch.gradient(pack), batch.gradient(one_row_each)
    difference, largest = float((packed - plain).abs().max()), float(plain.abs().max())
    del packed, plain

    pairs = alternate(lambda _: batch.accumulate(pack), lambda _: batch.accumulate(one_row_each),
                      arguments.pairs)
    seconds = [[one[0] for one in side] for side in zip(*pairs, strict=True)]
    names = ("packed", "one_row_each")
    computed = [sum(m.input_ids.numel() for m in batch.micro_batches(packing))
                for packing in (pack, one_row_each)]
    record = circumstances("packing", arguments, policy) | {
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "positions": dict(zip(names, computed, strict=True)),
        "positions_ratio": round(computed[1] / computed[0], 4),
        "gradient_difference": difference, "gradient_largest": largest,
        "seconds": {name: rounded(s) for name, s in zip(names, seconds, strict=True)},
        **ratios(*seconds)}
    rows = [[str(number), f"{mine:.3f}", f"{theirs:.3f}", f"{theirs / mine:.2f}"]
            for number, (mine, theirs) in enumerate(zip(*seconds, strict=True), start=1)]
    show(record, "Gradient of one RL batch: prompt once a group against one row a completion "
         "(ratio of times; above 1: packing is faster)",
         ("pair", "packed s", "one row each s", "ratio"), rows,
         (f"positions computed: {computed[0]} against {computed[1]}, "
          f"ratio {record['positions_ratio']:.2f}",
          f"gradient: largest difference {difference:.1e}, largest entry {largest:.1e}"))
    return finish(record, arguments.json)


if __name__ == "__main__":
    sys.exit(run(main))
