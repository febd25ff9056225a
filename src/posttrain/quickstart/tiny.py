"""A model of the Qwen2 architecture that has learnt nothing yet, with a tokenizer of its own, in one folder.

The tokenizer is Qwen2's in all but its vocabulary: digits alone, the words of its texts whole, bytes for the rest, so
that any text can be encoded. AutoTokenizer builds Qwen2's splitting for this architecture whatever the folder says, so
a splitting of our own would be lost on loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2Config

START_OF_TURN, END_OF_TURN, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
ROLES = ("system", "user", "assistant")
MAX_VOCABULARY = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_model(folder: Path, texts: Iterable[str], seed: int) -> None:
    """Write a transformers folder: a tokenizer of the words of `texts`, and random weights drawn with `seed`."""
    import torch
    from transformers import GenerationConfig, Qwen2ForCausalLM

    tokenizer = _tokenizer(texts)
    config = _config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        _with_roles(texts), MAX_VOCABULARY, new_special_tokens=[START_OF_TURN, END_OF_TURN], show_progress=False
    )
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = PADDING
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _with_roles(texts: Iterable[str]) -> Iterator[str]:
    yield from texts
    yield from ROLES * 1000  # often enough to become one token each


def _config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        # at a rate of 2e-3, 1,000 steps reach 89% of the quickstart's problems; 75% with Qwen2's own 0.02
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
