"""The sampler: it draws from exactly the distribution that training moves."""

import warnings
from collections import Counter
from dataclasses import replace

import torch
from scipy.stats import chisquare

from hybridrl_lib.policy.decoding import Decoder, TransformersDecoder
from hybridrl_lib.policy.packing import PromptCompletion, pack
from hybridrl_lib.policy.sampling import choose_tokens, sample
from hybridrl_lib.training import judge as judging

TOLERANCE = 1e-5  # between a log-probability as sampled and as trained, in nats, fp32
HALF = 0.2  # the same in bf16, for these random models
QUESTIONS = ("How many?", "Ann has 3 apples. Ann gets 4 more. How many apples does Ann have now?",
             "Find 17 mod 5.")
KINDS = ("qwen2", "llama", "transformers", "lora", "lora on llama", "lora through transformers")


def every_kind(make_policy, monkeypatch):
    """Fresh policies: by architecture, adapter, own decoder or `transformers` itself."""
    for kind in KINDS:
        with monkeypatch.context() as patch:
            policy = make_policy("llama" if "llama" in kind else "qwen2",
                                 adapter="lora" if "lora" in kind else "none")
            if "lora" in kind:
                move_adapter(policy)
            if "transformers" in kind:
                patch.setattr(Decoder, "supports", staticmethod(lambda policy: False))
            else:
                assert Decoder.supports(policy)
            print(kind)  # a failure shows the last one
            yield policy


def move_adapter(policy) -> None:
    """Gives an adapter weights that matter: a fresh one adds nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.03 * torch.randn(weight.shape, generator=generator))


def prompts_of(policy) -> list[list[int]]:
    return [policy.encode_prompt(question) for question in QUESTIONS]


def trained_scores(policy, groups, temperature):
    """Log-probabilities and entropies of sampled completions as the loss computes them."""
    sequences = [PromptCompletion(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
    scores = [None] * len(sequences)
    with torch.no_grad():
        for packed in pack(sequences, 500, policy.pad_id):
            both = torch.stack(policy.score(packed, temperature=temperature))
            for index in packed.sequence.unique().tolist():
                scores[index] = both[:, packed.sequence == index]
    return torch.cat(scores, dim=1)


def sampled_scores(groups):
    completions = [c for g in groups for c in g.completions]
    return torch.tensor([[x for c in completions for x in c.log_probabilities],
                         [x for c in completions for x in c.entropies]])


def texts(groups):
    return [[c.token_ids for c in group.completions] for group in groups]


# The same distribution ----------------------------------------------------------------------------


def test_sampled_log_probabilities_are_the_trained_ones(make_policy, monkeypatch):
    """Sampler and loss agree on every token, at any temperature, in a left-padded batch."""
    for policy in every_kind(make_policy, monkeypatch):
        for temperature in (1.0, 0.7):
            groups = sample(policy, prompts_of(policy), samples=6, max_new_tokens=12,
                            temperature=temperature, seed=1)
            torch.testing.assert_close(sampled_scores(groups),
                                       trained_scores(policy, groups, temperature),
                                       atol=TOLERANCE, rtol=TOLERANCE)


def test_how_far_sampled_and_trained_log_probabilities_are_apart(make_policy):
    """In fp32 only rounding; in bf16 far more, though both round at the same places."""
    for architecture in ("qwen2", "llama"):
        for precision, tolerance in (("fp32", TOLERANCE), ("bf16", HALF)):
            policy = replace(make_policy(architecture), precision=precision)
            groups = sample(policy, prompts_of(policy), samples=6, max_new_tokens=12,
                            temperature=1.0, seed=1)
            apart = (sampled_scores(groups) - trained_scores(policy, groups, 1.0)).abs().max()
            assert apart <= tolerance, (architecture, precision)
            # in bf16 the sampler's numbers could not be used instead of the training model's
            assert precision == "fp32" or apart > 10 * TOLERANCE


def test_in_half_precision_the_sampler_s_log_probabilities_are_not_used(make_policy, make_trainer,
                                                                        monkeypatch):
    """The record's KL to the reference: wrong numbers from the sampler show in fp32 alone."""
    found = {}
    honest = judging.sample
    for precision in ("fp32", "bf16"):
        for shift in (0.0, 1.0):
            def shifted(*arguments, shift=shift, **more):
                return [replace(group, completions=[
                    replace(c, log_probabilities=[x + shift for x in c.log_probabilities])
                    for c in group.completions]) for group in honest(*arguments, **more)]

            monkeypatch.setattr(judging, "sample", shifted)
            trainer = make_trainer("rl", policy=replace(make_policy(), precision=precision),
                                   folder=f"{precision}-{shift}")
            trainer.train()
            found[precision, shift] = trainer.folder.lines("metrics.jsonl")[0]["kl/reference"]
    assert found["fp32", 1.0] > found["fp32", 0.0] + 0.1
    assert found["bf16", 1.0] == found["bf16", 0.0]


def test_greedy_answers_are_those_of_transformers(make_policy, monkeypatch):
    """Batched and left-padded here, one prompt at a time through generate() there."""
    for policy in every_kind(make_policy, monkeypatch):
        prompts = prompts_of(policy)
        groups = sample(policy, prompts, samples=1, max_new_tokens=15, temperature=0.0)
        for prompt, (mine,) in zip(prompts, texts(groups), strict=True):
            theirs = policy.model.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                do_sample=False, max_new_tokens=15, pad_token_id=policy.pad_id,
                eos_token_id=list(policy.stop_ids))
            assert mine == theirs[0, len(prompt):].tolist()


def test_left_padding_changes_no_log_probability(make_policy, monkeypatch):
    """A prompt among longer ones is continued as it is alone, with the same scores."""
    for policy in every_kind(make_policy, monkeypatch):
        prompts = prompts_of(policy)
        together = sample(policy, prompts, samples=1, max_new_tokens=8, temperature=0.0)
        for prompt, group in zip(prompts, together, strict=True):
            alone = sample(policy, [prompt], samples=1, max_new_tokens=8, temperature=0.0)
            assert texts(alone) == texts([group])
            torch.testing.assert_close(sampled_scores(alone), sampled_scores([group]),
                                       atol=TOLERANCE, rtol=TOLERANCE)


def frequencies_match(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p-value of the chi-square test; words expected less than 5 times share one bin."""
    counts = tokens.bincount(minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue


def test_sampled_frequencies_are_the_softmax(policy):
    """No top-k, no top-p, and the temperature in the logits: 4000 first words against softmax."""
    prompt = policy.encode_prompt(QUESTIONS[1])
    policy.model.generation_config.update(top_k=2, top_p=0.3, temperature=0.1)  # must not matter
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    for temperature, other in ((1.0, 0.7), (0.7, 1.0)):
        group, = sample(policy, [prompt], samples=4000, max_new_tokens=1, temperature=temperature)
        tokens = torch.tensor([c.token_ids[0] for c in group.completions])
        assert frequencies_match(tokens, (logits / temperature).softmax(-1)) > 0.01
        assert frequencies_match(tokens, (logits / other).softmax(-1)) < 1e-6, "no power"


def test_the_draw_keeps_to_words_that_can_occur():
    """Words of probability 0 are never drawn, not even at the ends of the unit interval."""
    nothing = float("-inf")
    logits = torch.tensor([[nothing, 0.5, nothing, 0.2, nothing, nothing]])
    for uniform, word in ((0.0, 1), (0.999, 3), (1 - 2**-24, 3)):
        tokens, log_p, entropies = choose_tokens(logits, torch.tensor([uniform]), 1.0)
        assert tokens.item() == word
        assert log_p.isfinite().all() and entropies.isfinite().all()


# What is sampled is what was trained --------------------------------------------------------------


def test_after_an_update_the_new_weights_are_sampled(make_policy, monkeypatch):
    """No stale copy: after an optimizer step the sampler's scores are the new model's.

    LoRA too: a sampler that never sees the adapter shipped in well-known projects.
    """
    for policy in every_kind(make_policy, monkeypatch):
        prompts = prompts_of(policy)
        arguments = {"samples": 4, "max_new_tokens": 8, "temperature": 1.0, "seed": 2}
        before = sample(policy, prompts, **arguments)
        optimizer = torch.optim.SGD(
            [p for p in policy.model.parameters() if p.requires_grad], lr=0.05)
        packed, = pack([PromptCompletion(prompts[0], [10, 11, policy.eos_id])], 500)
        policy.score(packed)[0].sum().backward()
        optimizer.step()
        after = sample(policy, prompts, **arguments)
        torch.testing.assert_close(sampled_scores(after), trained_scores(policy, after, 1.0),
                                   atol=TOLERANCE, rtol=TOLERANCE)
        moved = trained_scores(policy, before, 1.0) - sampled_scores(before)
        assert moved[0].abs().max() > 100 * TOLERANCE


def test_gradient_checkpointing_does_not_change_the_samples(make_policy, monkeypatch):
    """Training mode switches the cache of `transformers` off; sampling must not notice."""
    with warnings.catch_warnings():  # about a deprecated name
        warnings.simplefilter("error", FutureWarning)
        plain, saving = make_policy(), make_policy(gradient_checkpointing=True)
        assert make_policy(gradient_checkpointing=True, adapter="lora")
    arguments = {"samples": 3, "max_new_tokens": 10, "temperature": 1.0, "seed": 3}
    wanted = texts(sample(plain, prompts_of(plain), **arguments))
    assert texts(sample(saving, prompts_of(saving), **arguments)) == wanted
    monkeypatch.setattr(Decoder, "supports", staticmethod(lambda policy: False))
    assert texts(sample(saving, prompts_of(saving), **arguments)) == wanted


# How the work is cut does not matter --------------------------------------------------------------


def test_one_seed_repeats_and_two_differ(make_policy, monkeypatch):
    """The same seed gives the same completions, another seed others."""
    for policy in every_kind(make_policy, monkeypatch):
        arguments = {"samples": 4, "max_new_tokens": 10, "temperature": 1.0}
        one, again, other = (texts(sample(policy, prompts_of(policy), seed=seed, **arguments))
                             for seed in (1, 1, 2))
        assert one == again != other


def test_batch_size_does_not_change_the_completions(make_policy, monkeypatch):
    """Random numbers belong to a prompt and a sample, not to a place in a batch."""
    for policy in every_kind(make_policy, monkeypatch):
        arguments = {"samples": 4, "max_new_tokens": 10, "temperature": 1.0, "seed": 4}
        prompts = prompts_of(policy)
        whole = sample(policy, prompts, **arguments)
        for batch_size in (1, 5, 8, 500):
            cut = sample(policy, prompts, batch_size=batch_size, **arguments)
            assert texts(cut) == texts(whole)
            assert [group.prompt_ids for group in cut] == prompts, "in the prompts' order"


def test_compaction_does_not_change_the_completions(make_policy, monkeypatch):
    """Dropping rows that have ended, at every chance or never, gives the same tokens."""
    for policy in every_kind(make_policy, monkeypatch):
        arguments = {"samples": 8, "max_new_tokens": 12, "temperature": 1.0, "seed": 5}
        taken = []
        for share in (0.0, 0.5, 1.1):
            for decoder in (Decoder, TransformersDecoder):
                monkeypatch.setattr(decoder, "compact_below", share)
            taken.append(sample(policy, prompts_of(policy), **arguments))
        assert texts(taken[0]) == texts(taken[1]) == texts(taken[2])
        lengths = {len(c.token_ids) for group in taken[0] for c in group.completions}
        assert len(lengths) > 3, "rows must end at different steps for this test to mean anything"
        torch.testing.assert_close(sampled_scores(taken[0]), sampled_scores(taken[2]),
                                   atol=TOLERANCE, rtol=TOLERANCE)


# Where a completion ends --------------------------------------------------------------------------


def test_a_completion_ends_with_its_first_stop_token(make_policy, monkeypatch):
    """EOS is the last token of a finished answer, is scored, and nothing follows it."""
    for policy in every_kind(make_policy, monkeypatch):
        arguments = {"samples": 30, "max_new_tokens": 10, "temperature": 1.0}
        first = sample(policy, prompts_of(policy), **arguments)
        words = Counter(token for group in texts(first) for row in group for token in row)
        word = next(token for token, _ in words.most_common() if token != policy.eos_id)
        policy = replace(policy, stop_ids=(policy.eos_id, word))
        groups = sample(policy, prompts_of(policy), **arguments)
        ends = set()
        for completion in (c for group in groups for c in group.completions):
            *inner, last = completion.token_ids
            assert not set(inner) & set(policy.stop_ids)
            assert completion.finished == (last in policy.stop_ids)
            assert completion.finished or len(completion.token_ids) == 10
            assert len(completion.token_ids) == len(completion.log_probabilities)
            assert len(completion.token_ids) == len(completion.entropies)
            assert policy.tokenizer.eos_token not in completion.text
            ends.add(last if completion.finished else None)
        assert ends == {policy.eos_id, word, None}, "all three ways to end occur"


def test_padding_that_is_eos_ends_nothing(policy):
    """A tokenizer whose padding is EOS samples the same answers, and they still end with EOS."""
    arguments = {"samples": 6, "max_new_tokens": 10, "temperature": 1.0, "seed": 6}
    same = replace(policy, pad_id=policy.eos_id)
    one, two = (sample(p, prompts_of(p), **arguments) for p in (policy, same))
    assert texts(one) == texts(two)
    assert any(c.finished and c.token_ids[-1] == policy.eos_id
               for group in two for c in group.completions)


def test_a_cap_of_one_token(policy):
    """The smallest cap: one token each, finished only if it is the end of text."""
    groups = sample(policy, prompts_of(policy), samples=20, max_new_tokens=1, temperature=1.0)
    assert all(len(c.token_ids) == 1 and c.finished == (c.token_ids[0] == policy.eos_id)
               for group in groups for c in group.completions)
