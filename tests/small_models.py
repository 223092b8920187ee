"""Random models of a few thousand weights, the same on every machine."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hybridrl_lib.experiments.pretraining import make_tokenizer

FIRST = 4.0  # first coordinate of every embedding, so that it is much the same in all hidden states
STOP = {"qwen2": 4.5, "llama": 2.5}  # more weight on it makes one token in eight the end of text


def write_model(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Writes a model folder: `qwen2` (tied, biases) or `llama` (untied, no biases).

    The weights come from numpy's legacy generator, whose stream is the same everywhere.
    """
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 256, "bos_token_id": None,
             "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False,
                                             rope_parameters={"rope_type": "default",
                                                              "rope_theta": 500.0}))
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.tensor(random.standard_normal(tuple(weight.shape)), dtype=torch.float32)
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
        model.get_input_embeddings().weight[:, 0] = FIRST
        model.model.norm.weight[0] = 1.0
        head = model.get_output_embeddings().weight
        head[:, 0] = FIRST
        head[tokenizer.eos_token_id] = 0.0
        head[tokenizer.eos_token_id, 0] = FIRST + STOP[architecture]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
