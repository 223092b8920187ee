r"""The prompt template for SFT, RL, and evaluation, and the tokens that end a completion.

The paper does not print its prompt. All models are asked the same, through the tokenizer's chat
template if it has one, and must answer in `\boxed{}`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = r"Reason step by step and put the final answer in \boxed{}."

# What ends a turn in the chat templates of Qwen and SmolLM, Llama 3, Gemma, Phi and others.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>",
             "<|endoftext|>", "<|end_of_text|>", "</s>")
# Tokens that vocabularies hold for padding even where the tokenizer does not name them.
PADDINGS = ("<|pad|>", "<pad>", "[PAD]", "<|fim_pad|>", "<|finetune_right_pad_id|>",
            "<|endoftext|>")


def prompt_text(tokenizer: "PreTrainedTokenizerBase", question: str) -> str:
    """The prompt of a question as text; the completion follows it directly."""
    request = f"{question}\n{INSTRUCTION}"
    if not tokenizer.chat_template:
        return f"Problem: {request}\nSolution:\n"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], add_generation_prompt=True,
        continue_final_message=False, tokenize=False, return_dict=False)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", question: str) -> list[int]:
    """The prompt of a question as token ids, shape `(prompt length,)`.

    A chat template writes its special tokens itself. Without one, the beginning-of-text token is
    added if the tokenizer adds it; an end-of-text token never is.
    """
    text = prompt_text(tokenizer, question)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.chat_template or tokenizer.bos_token_id is None:
        return ids
    begin = [tokenizer.bos_token_id]
    adds_begin = tokenizer(text, add_special_tokens=True)["input_ids"][:1] == begin
    return begin + ids if adds_begin and ids[:1] != begin else ids


def _id_of(tokenizer: "PreTrainedTokenizerBase", token: str) -> int | None:
    """The id of a token, or None if it is not in the vocabulary."""
    number = tokenizer.convert_tokens_to_ids(token)
    known = number is not None and tokenizer.convert_ids_to_tokens(number) == token
    return number if known else None


def stop_token_ids(tokenizer: "PreTrainedTokenizerBase",
                   model_eos: int | Iterable[int] | None = None) -> tuple[int, ...]:
    """The ids that end a completion; SFT puts the first one at the end of a solution.

    These are the tokenizer's end-of-text token, the end of a turn in the chat template (base models
    such as Qwen2.5-0.5B have one too), and those of the model's generation configuration.

    Args:
        tokenizer: the model's tokenizer.
        model_eos: `eos_token_id` of the generation configuration: one id, several, or None.

    Raises:
        UserError: there is none, so no completion could end.
    """
    template = str(tokenizer.chat_template or "")
    turn_ends = [_id_of(tokenizer, token) for token in TURN_ENDS if token in template]
    named = [model_eos] if isinstance(model_eos, int) else list(model_eos or ())
    stops = [stop for stop in (tokenizer.eos_token_id, *turn_ends, *named) if stop is not None]
    if not stops:
        raise UserError("The model's tokenizer has no end-of-text token; set eos_token in its "
                        "tokenizer_config.json.")
    return tuple(dict.fromkeys(stops))


def pad_token_id(tokenizer: "PreTrainedTokenizerBase",
                 model_eos: int | Iterable[int] | None = None) -> int:
    """The id that fills the ends of a batch, if possible one that does not end a completion.

    The library masks by length, so any id works; a distinct one keeps batches readable.
    """
    stops = stop_token_ids(tokenizer, model_eos)
    candidates = [tokenizer.pad_token_id, *(_id_of(tokenizer, token) for token in PADDINGS),
                  tokenizer.unk_token_id]
    for candidate in candidates:
        if candidate is not None and candidate not in stops:
            return candidate
    return stops[0]
