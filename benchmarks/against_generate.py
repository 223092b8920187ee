"""Our sampler against `transformers`' generate: tokens per second, in alternating pairs.

Same weights, prompts, number of samples and cap; both sample at temperature 1 without top-k and
top-p, in one batch, and stop at the same tokens. See README.md in this folder.
"""

import sys
from collections.abc import Sequence

import torch
from common import (
    add_lengths,
    alternate,
    circumstances,
    finish,
    load,
    make_parser,
    ratios,
    rounded,
    run,
    show,
)
from torch import Tensor
from transformers import GenerationConfig

from hybridrl_lib.policy.completions import Group
from hybridrl_lib.policy.decoding import Decoder
from hybridrl_lib.policy.device import DTYPES
from hybridrl_lib.policy.policy import Policy
from hybridrl_lib.policy.sampling import sample


class Generate:
    """`transformers`' generate, set up to draw from the same distribution as our sampler.

    It gets a copy of the model without this project's kernels. Where the policy computes in half
    precision the copy is in that dtype: that is faster than autocast, which would cast the weights
    again for every token.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], samples: int,
                 max_new_tokens: int):
        self.model = policy.plain_model().to(DTYPES[policy.precision]).eval()
        # In place of the model's own, which may hold a repetition penalty or a top-k.
        self.model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
            num_return_sequences=samples, eos_token_id=list(policy.stop_ids),
            pad_token_id=policy.pad_id)
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), policy.pad_id)
        present = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # left-padded, as generate wants it
            ids[row, longest - len(prompt):] = torch.tensor(prompt)
            present[row, longest - len(prompt):] = 1
        self.ids, self.present = ids.to(policy.device), present.to(policy.device)
        self.stop_ids = policy.stop_ids

    @torch.inference_mode()
    def __call__(self, seed: int) -> Tensor:
        """(prompts x samples, new tokens) ids; what follows a stop token is padding."""
        torch.manual_seed(seed)
        ids = self.model.generate(input_ids=self.ids, attention_mask=self.present)
        return ids[:, self.ids.shape[1]:]

    def count(self, ids: Tensor) -> int:
        """Tokens of the completions, stop tokens included and padding not."""
        stops = torch.tensor(self.stop_ids, device=ids.device)
        ended = torch.isin(ids, stops).cumsum(1) > 0
        return int((~ended).sum() + ended.any(1).sum())


def count(groups: Sequence[Group]) -> int:
    """Tokens of our completions, stop tokens included."""
    return sum(len(c.token_ids) for group in groups for c in group.completions)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures, prints a table and the JSON line; returns what the line holds."""
    parser = make_parser("Our sampler against transformers' generate.", prompts=32, pairs=6)
    add_lengths(parser)
    arguments = parser.parse_args(argv)
    policy, prompts = load(arguments)
    generate = Generate(policy, prompts, arguments.samples, arguments.max_new_tokens)

    def ours(seed: int) -> list[Group]:
        return sample(policy, prompts, samples=arguments.samples, temperature=1.0, seed=seed,
                      max_new_tokens=arguments.max_new_tokens,
                      batch_size=arguments.prompts * arguments.samples)

    pairs = alternate(ours, generate, arguments.pairs)
    seconds = [[one[0] for one in side] for side in zip(*pairs, strict=True)]
    tokens = [[count(mine[1]) for mine, _ in pairs],
              [generate.count(theirs[1]) for _, theirs in pairs]]
    speeds = [[n / s for n, s in zip(*side, strict=True)]
              for side in zip(tokens, seconds, strict=True)]
    names = ("ours", "generate")
    record = circumstances("against_generate", arguments, policy) | {
        "decoder": "own" if Decoder.supports(policy) else "transformers",
        "seconds": {name: rounded(s) for name, s in zip(names, seconds, strict=True)},
        "tokens": dict(zip(names, tokens, strict=True)),
        "tokens_per_second": {name: rounded(s, 1) for name, s in zip(names, speeds, strict=True)},
        "settings": {
            "ours": {"temperature": 1.0, "top_k": None, "top_p": None, "dtype": policy.precision,
                     "batch": arguments.prompts * arguments.samples},
            "generate": {name: getattr(generate.model.generation_config, name)
                         for name in ("temperature", "top_k", "top_p", "eos_token_id")}
            | {"dtype": str(generate.model.dtype).removeprefix("torch."),
               "batch": arguments.prompts * arguments.samples}},
        **ratios(*([1 / speed for speed in side] for side in speeds))}
    rows = [[str(i + 1), *(cell for side in (0, 1) for cell in (
                f"{seconds[side][i]:.3f}", str(tokens[side][i]), f"{speeds[side][i]:.0f}")),
             f"{record['ratio'][i]:.2f}"] for i in range(len(pairs))]
    show(record, "Our sampler against transformers' generate (ratio of tokens/s; above 1: ours is "
         "faster)", ("pair", "ours s", "tokens", "tokens/s", "generate s", "tokens", "tokens/s",
                     "ratio"), rows)
    return finish(record, arguments.json)


if __name__ == "__main__":
    sys.exit(run(main))
