"""Completions packed side by side: the same scores and gradients as one by one."""

import random
from types import SimpleNamespace

import pytest
import torch
from small_training import distance
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from hybridrl_lib.policy import attention
from hybridrl_lib.policy.packing import PromptCompletion, pack
from hybridrl_lib.policy.scoring import score_tokens

PROMPTS = ([5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17])


def groups(eos: int) -> list[PromptCompletion]:
    """Three prompts with four completions each, of 1 to 9 tokens, most ended by EOS."""
    draw = random.Random(1)
    return [PromptCompletion(prompt, [draw.randrange(3, 90) for _ in range(length)] + [eos] * ended)
            for prompt in PROMPTS for length, ended in ((0, 1), (3, 1), (8, 1), (5, 0))]


def scores_of(policy, sequences, budget, **arguments):
    """(log-probabilities, entropies) per completion, by micro-batches of `budget` tokens."""
    result = [None] * len(sequences)
    for packed in pack(sequences, budget, policy.pad_id):
        scores, entropies = policy.score(packed, **arguments)
        for index in packed.sequence.unique().tolist():
            mine = packed.sequence == index
            result[index] = (scores[mine], entropies[mine])
    return result


def plain_scores(policy, item):
    """The same through `transformers` alone: one completion, no padding, no mask."""
    ids = torch.tensor([[*item.prompt, *item.completion]])
    logits = policy.model(input_ids=ids).logits[0, len(item.prompt) - 1:-1]
    log_p = logits.log_softmax(-1)
    return (log_p.gather(-1, ids[0, len(item.prompt):, None]).squeeze(-1),
            -(log_p.exp() * log_p).sum(-1))


BUDGETS = (12, 40, 10_000)


def test_packed_equals_one_by_one(make_policy):
    """A prompt read once for its completions gives each the score it has alone, in any packing."""
    for architecture in ("qwen2", "llama"):
        policy = make_policy(architecture)
        sequences = groups(policy.eos_id)
        with torch.no_grad():
            plain = [plain_scores(policy, item) for item in sequences]
            for budget in BUDGETS:
                for mine, theirs in zip(scores_of(policy, sequences, budget), plain, strict=True):
                    for one, other in zip(mine, theirs, strict=True):
                        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_packed_gradient_equals_one_by_one_gradient(make_policy):
    """The same gradient, accumulated over micro-batches or over single completions."""
    for adapter in ("none", "lora"):
        policy = make_policy(adapter=adapter)
        moved = [p for p in policy.model.parameters() if p.requires_grad]
        sequences = groups(policy.eos_id)
        weights = torch.linspace(-1, 1, len(sequences))

        def gradient(pairs, policy=policy, weights=weights, moved=moved):
            policy.model.zero_grad()
            sum((weight * (scores + 0.3 * entropies).sum() for weight, (scores, entropies) in
                 zip(weights, pairs, strict=True))).backward()
            return torch.cat([p.grad.flatten() for p in moved])

        plain = gradient([plain_scores(policy, item) for item in sequences])
        for budget in BUDGETS:
            packed = gradient(scores_of(policy, sequences, budget))
            assert distance(packed, plain) < 1e-5, (adapter, budget)


def test_segments_and_mask_are_the_same_attention(make_policy):
    """Leaving out what the mask hides changes no score and no gradient; any model takes the mask.

    Among the micro-batches are rows of one completion and completions of one token.
    """
    for adapter in ("none", "lora"):
        policy = make_policy(adapter=adapter)
        moved = [p for p in policy.model.parameters() if p.requires_grad]
        for budget in BUDGETS:
            found = []
            for known in (True, False):
                policy.model.set_attn_implementation(attention.NAME if known else "sdpa")
                policy.model.zero_grad()
                scores = torch.cat([torch.cat(pair) for pair in scores_of(
                    policy, groups(policy.eos_id), budget)])
                (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
                found.append((scores.detach(), torch.cat([p.grad.flatten() for p in moved])))
            (mine, my_gradient), (masked, gradient) = found
            torch.testing.assert_close(mine, masked, atol=1e-5, rtol=1e-5)
            assert distance(my_gradient, gradient) < 1e-5, (adapter, budget)


def largest_tensors(policy, packed) -> tuple[int, int]:
    """(numbers in the largest tensor, numbers kept for the backward pass) of an update."""
    kept = []
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), more=None):
            result = function(*arguments, **(more or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.untyped_storage().nbytes() // 4)
            return result

    def keep(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    with Watch(), saved_tensors_hooks(keep, lambda tensor: tensor):
        scores, entropies = policy.score(packed, chunk_tokens=16)
        (scores + entropies).sum().backward()
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    storages = {s.data_ptr(): s.nbytes() // 4 for s in kept}
    return largest[0], sum(size for place, size in storages.items() if place not in weights)


def test_memory_of_an_update_does_not_grow_with_the_length_of_completions(policy):
    """152,000 words and the same number of tokens, in short completions and in long ones."""
    policy.model.resize_token_embeddings(152_000)
    found = {}
    for length in (8, 60):
        count = 120 // length
        items = [PromptCompletion(PROMPTS[0], [20 + i] * length) for i in range(count)]
        packed, = pack(items, 1000, policy.pad_id)
        found[length] = largest_tensors(policy, packed)
    (short_largest, short_kept), (long_largest, long_kept) = found[8], found[60]
    assert long_largest <= 1.1 * short_largest
    assert long_kept <= 1.3 * short_kept


def test_logits_exist_for_one_chunk_of_tokens_only():
    """At 20,000 words no tensor is larger than the chunk's logits, in both passes."""
    words, tokens, chunk, width = 20_000, 128, 8, 4
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = torch.randn(words, width, requires_grad=True)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), more=None):
            result = function(*arguments, **(more or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with Watch():
        scores, entropies = score_tokens(hidden, head, torch.arange(tokens), chunk_tokens=chunk)
        (scores + entropies).sum().backward()
    assert max(sizes) == chunk * words


def test_completions_do_not_see_each_other(policy):
    """Another answer to the same question in the same row changes nothing."""
    mine = PromptCompletion(PROMPTS[0], [20, 21, 22, policy.eos_id])
    others = [PromptCompletion(PROMPTS[0], [token] * 6) for token in (30, 40)]
    with torch.no_grad():
        one = scores_of(policy, [others[0], mine], 1000)[1][0]
        two = scores_of(policy, [others[1], mine], 1000)[1][0]
    assert torch.equal(one, two)


def test_pad_length_never_changes_a_score(policy):
    """A longer row, and so more padding, leaves a completion's scores as they are."""
    mine = PromptCompletion(PROMPTS[1], [20, 21, policy.eos_id])
    with torch.no_grad():
        alone = scores_of(policy, [mine], 1000)[0]
        for longer in (8, 40):
            neighbor = PromptCompletion(PROMPTS[2], [33] * longer)
            padded = scores_of(policy, [mine, neighbor], 1000)[0]
            for one, other in zip(alone, padded, strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_padding_tokens_are_never_read(policy):
    """Any token may fill a batch, also one that ends completions."""
    sequences = groups(policy.eos_id)
    with torch.no_grad():
        one, two = (torch.cat([policy.score(packed)[0] for packed in pack(sequences, 1000, pad)])
                    for pad in (policy.pad_id, policy.eos_id))
    assert torch.equal(one, two)


def test_eos_is_among_the_targets_also_where_padding_is_eos(policy):
    """The end is learned: masks go by length, so a tokenizer whose padding is EOS loses nothing."""
    sequences = groups(policy.eos_id)
    for pad in (policy.pad_id, policy.eos_id):
        taken = [[] for _ in sequences]
        for packed in pack(sequences, 60, pad):
            for index, target in zip(packed.sequence.tolist(), packed.targets.tolist(),
                                     strict=True):
                taken[index].append(target)
        assert taken == [list(item.completion) for item in sequences]


def test_every_token_is_there_once_and_rows_share_one_prompt(policy):
    """Nothing is lost or counted twice, a row holds one prompt, and the budget is kept."""
    sequences, budget = groups(policy.eos_id), 40
    batches = pack(sequences, budget, policy.pad_id)
    owners = torch.cat([packed.sequence for packed in batches])
    assert owners.bincount().tolist() == [len(item.completion) for item in sequences]
    for packed in batches:
        assert packed.input_ids.numel() <= budget
        counts = packed.sequence.unique_consecutive()
        assert len(counts) == len(counts.unique()), "a completion's tokens are contiguous"
    whole, = pack(sequences, 10_000, policy.pad_id)
    assert len(whole.input_ids) == len(PROMPTS)


def test_a_completion_longer_than_the_budget_gets_its_own_micro_batch(policy):
    """The budget is about memory: it cuts no completion and drops none."""
    long = PromptCompletion(PROMPTS[0], [20] * 50)
    short = PromptCompletion(PROMPTS[0], [21] * 3)
    batches = pack([short, long, short], 10, policy.pad_id)
    assert sorted(packed.sequence.unique().tolist() for packed in batches) in ([[0, 2], [1]],
                                                                                [[0], [1], [2]])


def test_one_token_completions(policy):
    """An answer that is EOS alone reads nothing after the prompt and is still scored."""
    item = PromptCompletion(PROMPTS[0], [policy.eos_id])
    with torch.no_grad():
        (scores, _), = scores_of(policy, [item], 100)
        torch.testing.assert_close(scores, plain_scores(policy, item)[0])


def test_an_empty_prompt_or_completion_is_refused():
    """Nothing predicts the first token of an empty prompt: better an error than a wrong score."""
    for prompt, completion in (([], [1]), ([1], [])):
        with pytest.raises(ValueError):
            pack([SimpleNamespace(prompt=prompt, completion=completion)], 10)
