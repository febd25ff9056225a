"""Tokenizers for chat templates of which only the text is known: byte-level, with every control string that it mentions."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

CONTROL = re.compile(
    r"〈\|[A-Z_]+\|〉|<[|｜][^<>|｜\s'\"{}]{1,40}[|｜]>"  # <|im_start|>
    r"|<\|[a-z_]{2,20}>|<[a-z_]{2,20}\|>"  # <|turn> and <turn|>
    r"|\[/?[A-Z][A-Z_]{2,30}\]"  # [INST]
    r"|</?seed:[a-z_]+>|\[\|[a-z]+\|\]|<SPECIAL_\d+>|\[e~\["
    r"|</?s>|<(?:bos|eos|pad|unk|sep|sop|eop)>|\[gMASK\]"
    r"|</?(?:think|tool_call|tool_response|tool_calls|assistant|user|system)>"
    r"|<(?:start|end|beginning|begin)_of_[a-z]+>|<end_message>|<extra_id_\d>"
    r"|<\|im_(?:start|end|sep)\|>"
)
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>",
    "<|return|>", "<|end|>", "<|eot|>", "<|endoftext|>", "<end_of_utterance>", "<|end_of_turn|>", "<|end_of_msg|>", "</s>", "<eos>", "<seed:eos>",
)  # fmt: skip
BEGINS = ("<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|startoftext|>", "<bos>", "<s>", "[gMASK]")


def tokenizer_for(template: str, folder: str | None = None) -> Any:
    """One to which the template belongs: the tokenizer in `folder`, or a tiny one, with the template's control strings."""
    controls = sorted(set(CONTROL.findall(template)))
    end = next((token for token in ENDS if token in controls), "</s>" if "[/INST]" in controls else "<|endoftext|>")
    begin = next((token for token in BEGINS if token in controls), "<s>")
    tokenizer = _tiny() if folder is None else _from(folder)
    tokenizer.add_special_tokens({"bos_token": begin, "eos_token": end, "pad_token": "<|pad|>", "unk_token": "<unk>"})
    tokenizer.add_tokens([_control(text) for text in controls])
    tokenizer.chat_template = template
    return tokenizer


def _control(text: str) -> Any:
    from tokenizers import AddedToken

    # as in Qwen's: tokens of their own, that no decoder skips
    part = re.fullmatch(r"</?(?:think|tool\w*)>", text)
    return AddedToken(text, normalized=False, special=not part)


def _tiny() -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_tiny_as_text()))


@lru_cache(1)
def _tiny_as_text() -> str:
    """Bytes, and merges of newlines and spaces, as real tokenizers have: they lie across borders if anything does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, line = "Ġ", "Ċ"
    merges = [(line, line), (space, space), ("t", "h"), ("i", "n")]
    vocabulary = {token: n for n, token in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def _from(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
