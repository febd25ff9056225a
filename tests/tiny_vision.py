"""Tiny vision models of several families, from configurations alone, with the processors of pictures.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from pictures import encoded, make_processor, picture
from posttrain.data.images.processor import ImageText
from posttrain.records import ImageSource, Sample

PLAIN_IDS = (60, 300)  # tokens of text in every tokenizer here
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
QWEN_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
    "image_size": 56,
}  # fmt: skip
VISION_CONFIGS: dict[str, Callable] = {
    "qwen2_5_vl": lambda text, id_of: Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": MROPE},
        vision_config=QWEN_TOWER | {"depth": 2, "fullatt_block_indexes": [1], "window_size": 56}, **_qwen(id_of),
    ),
    "qwen3_vl": lambda text, id_of: Qwen3VLConfig(
        text_config=text | {"rope_parameters": MROPE | {"mrope_interleaved": True}, "head_dim": 8, "num_hidden_layers": 3},
        vision_config=QWEN_TOWER | {"depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        **_qwen(id_of),
    ),
    "gemma3": lambda text, id_of: Gemma3Config(
        text_config=text | {
            "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=id_of("<image_soft_token>"),
        boi_token_index=id_of("<start_of_image>"), eoi_token_index=id_of("<end_of_image>"),
    ),
    "llava": lambda text, id_of: LlavaConfig(
        text_config=text | {"model_type": "llama"},
        vision_config=SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=id_of("<image>"), image_seq_length=16, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    ),
    "idefics3": lambda text, id_of: Idefics3Config(
        text_config=text | {"model_type": "llama"}, vision_config=SIGLIP, image_token_id=id_of("<image>"), scale_factor=2,
    ),
}  # fmt: skip


def write_tiny_vision_model(folder: Path, family: str = "qwen2_5_vl") -> Path:
    """A transformers folder with random weights, larger than usual so that mistakes show."""
    processor = make_processor(family)
    tokenizer = processor.tokenizer
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = TEXT | ends | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(VISION_CONFIGS[family](text, tokenizer.convert_tokens_to_ids))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(4)
    model.generation_config.update(**ends)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def image_samples(images: ImageText, count: int, seed: int = 0) -> list[Sample]:
    """Samples of random text with no image (every third, and the last), one or two of random sizes; their texts are trained in part."""
    rng = np.random.default_rng(seed)
    samples = []
    for row in range(count):
        pieces, weights, sources = [], [], []
        for image in range(0 if row % 3 == 2 or row == count - 1 else 1 + row % 2):
            width, height = (int(side) for side in rng.integers(30, 140, 2))
            sources.append(ImageSource(data=encoded(picture(width, height, 2 * row + image))))
            ids = images.ids(width, height)
            pieces += [rng.integers(*PLAIN_IDS, 2 + image), ids]
            weights += [np.zeros(2 + image), np.zeros(len(ids))]
        length = int(rng.integers(3, 12))
        pieces.append(rng.integers(*PLAIN_IDS, length))
        weights.append(np.arange(length) >= length // 3)
        ids_T, weights_T = (np.concatenate(each) for each in (pieces, weights))
        samples.append(Sample(row, ids_T.astype(np.int32), weights_T.astype(np.float32), images=tuple(sources)))
    return samples


def _qwen(id_of: Callable[[str], int]) -> dict:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {"tie_word_embeddings": True} | {name: id_of(token) for name, token in names.items()}
