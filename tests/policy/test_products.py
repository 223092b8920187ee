"""fp32 products through oneDNN: the same function, the same gradients, and a way back."""

import copy

import torch
import torch.nn.functional as F

from hybridrl_lib.policy import products
from hybridrl_lib.policy.products import linear, use_fast_products, use_plain_products


def test_a_product_and_its_gradients_are_torchs():
    """Any leading dimensions, with and without bias, and gradients for all that want them."""
    for shape in ((1, 8), (5, 8), (2, 3, 8), (0, 8)):
        for with_bias in (True, False):
            generator = torch.Generator().manual_seed(0)
            values = [torch.randn(size, generator=generator) for size in (shape, (4, 8), (4,))]
            results = []
            for function in (linear, F.linear):
                x, weight, bias = (value.clone().requires_grad_() for value in values)
                y = function(x, weight, bias if with_bias else None)
                (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
                results.append([y, x.grad, weight.grad, *([bias.grad] if with_bias else [])])
            for mine, theirs in zip(*results, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)


def test_frozen_weights_get_no_gradient():
    """As the base model under an adapter."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), atol=1e-5, rtol=1e-5)
    assert weight.grad is None


def test_autocast_and_half_precision_are_left_to_torch():
    """Under autocast a layer computes in half precision, as it does without this file."""
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert linear(x, weight).dtype == torch.bfloat16
    assert torch.equal(linear(x.bfloat16(), weight.bfloat16()),
                       F.linear(x.bfloat16(), weight.bfloat16()))


def test_a_torch_without_the_operation_works(monkeypatch):
    """The fallback is torch's own product."""
    monkeypatch.setattr(products, "ONE_DNN", False)
    monkeypatch.setattr(products, "_product", None)
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_the_plain_model_computes_the_same(make_policy):
    """What benchmarks compare with has the same weights, and none of this project's speedups."""
    for adapter in ("none", "lora"):
        policy = make_policy(adapter=adapter)
        plain, ids = policy.plain_model(), torch.tensor([[5, 6, 7, 8]])
        base = plain.get_base_model() if adapter == "lora" else plain
        assert base.config._attn_implementation == "sdpa"
        assert policy.model.config._attn_implementation == "packed"
        assert not any(isinstance(m, products.Linear) for m in plain.modules())
        with torch.no_grad():
            torch.testing.assert_close(plain(input_ids=ids).logits,
                                       policy.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_a_model_can_be_made_plain_again(policy):
    """Layer by layer, and back."""
    model = copy.deepcopy(policy.model)
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {products.Linear}
    use_plain_products(model)
    assert not any(type(m) is products.Linear for m in model.modules())
    assert use_fast_products(model) is model
    assert {type(m) for m in policy.model.modules() if isinstance(m, torch.nn.Linear)} == kinds
