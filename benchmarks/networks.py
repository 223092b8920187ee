"""Models of a given shape with random weights, for benchmarks that need no particular one."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hybridrl_lib.config.sections import ModelSettings
from hybridrl_lib.machine.shapes import Shape
from hybridrl_lib.policy import attention
from hybridrl_lib.policy import device as device_module
from hybridrl_lib.policy import loading as policies
from hybridrl_lib.policy.device import choose_device
from hybridrl_lib.policy.policy import Policy
from hybridrl_lib.policy.products import use_fast_products
from hybridrl_lib.system.paths import tiny_model_folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny model's: its words are among those of every shape here."""
    return PreTrainedTokenizerFast.from_pretrained(tiny_model_folder())


def make_network(shape: Shape, end: int) -> PreTrainedModel:
    """A model of this shape with random weights, as transformers makes it; `end` is its EOS."""
    kind, config = ((Qwen2ForCausalLM, Qwen2Config) if shape.biases else
                    (LlamaForCausalLM, LlamaConfig))
    torch.manual_seed(0)
    return kind(config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.feed_forward, tie_word_embeddings=shape.tied,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=end))


def make_policy(shape: Shape, model: ModelSettings) -> Policy:
    """A model of this shape with random weights, held as `load_policy` would, that never stops."""
    tokenizer = tiny_tokenizer()
    network = make_network(shape, tokenizer.eos_token_id)
    use_fast_products(network).set_attn_implementation(attention.NAME)
    network.eval()
    if model.adapter == "lora":
        network = policies._add_adapter(network, model)
    if model.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
        network.train()
    device = choose_device(model.device)
    return Policy(network.to(device), tokenizer, "random", "",
                  device_module.choose_precision(model.precision, device),
                  stop_ids=(shape.vocabulary,), pad_id=0, adapter=model.adapter)
