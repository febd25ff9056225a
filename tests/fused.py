"""Liger's kernels beside the model's own modules, in numbers: on a GPU, or on the CPU in Triton's interpreter.

Run as a program with TRITON_INTERPRET=1 it prints what differs, as JSON; Triton reads that before its first import, so that no test
can set it for itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    LlavaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.distributed.device import choose_device
from posttrain.distributed.world import World
from posttrain.engine.build import build_engine
from posttrain.losses.sft import sft_loss
from posttrain.models.kernels import fused_parts, use_liger
from tiny import CONFIGS, SHAPE, gradients, packed, random_samples

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
TEXTS = {name: CONFIGS[name] for name in ("qwen2", "qwen3", "llama", "gemma2")} | {
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=8),
    "phi3": lambda: Phi3Config(**SHAPE, pad_token_id=0),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
}
QWEN_EYES = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MARK, BEGIN = 90, 91  # token ids of an image's places and of its beginning
WITH_IMAGES = {
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=SHAPE | {"rope_parameters": MROPE}, image_token_id=MARK, vision_start_token_id=BEGIN,
        vision_config=QWEN_EYES | {"fullatt_block_indexes": [1], "window_size": 16},
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config=SHAPE | {"rope_parameters": MROPE, "head_dim": 8}, image_token_id=MARK, vision_start_token_id=BEGIN,
        vision_config=QWEN_EYES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "gemma3 with images": lambda: Gemma3Config(
        text_config=SHAPE | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}, image_token_id=MARK,
        mm_tokens_per_image=4, vision_config=SIGLIP | {"image_size": 16, "patch_size": 4},
    ),
    "llava": lambda: LlavaConfig(
        text_config=SHAPE | {"model_type": "llama"}, image_token_index=MARK,
        vision_config=SIGLIP | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 32},
    ),
}  # fmt: skip


def tiny_model(kind: Any, config: Any) -> Any:
    """Of random weights, larger than usual so that mistakes show, and norms that are not all alike."""
    torch.manual_seed(0)
    lm = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.mul_(4) if weight.dim() >= 2 else weight.add_(torch.randn_like(weight), alpha=0.1)
    return lm


def compare_training(family: str, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """Packed rows through the engine with Liger and without: largest difference of log-probabilities, mean difference, largest
    relative difference of a gradient tensor, and what Liger says that it computes."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(AutoModelForCausalLM, TEXTS[family]()).save_pretrained(folder)
        found = {}
        for on in (False, True):
            model = ModelOptions(path=str(folder), use_liger=on, **options)
            engine = build_engine(
                model, EngineOptions(), OptimOptions(), 1, World(choose_device(device)), dtype, packing=True, seed=0
            )
            assert bool(fused_parts(engine.policy.lm)) is on or not on
            rows = packed(random_samples(4, longest=7), max_rows=3)  # short: an interpreter takes its time
            logprobs = np.concatenate(engine.forward(rows))
            engine.forward_backward(rows, sft_loss)
            found[on] = logprobs, gradients(engine)
    gaps = np.abs(found[True][0] - found[False][0])
    return {
        "logprobs": float(gaps.max()),
        "mean": float(gaps.mean()),
        "gradients": gradient_gap(found[True][1], found[False][1]),
        "parts": fused_parts(engine.policy.lm),
    }


def compare_images(family: str, device: str) -> dict[str, Any]:
    """The same of a whole model that is given an image and some text, by transformers' own forward pass."""
    found = {}
    for on in (False, True):
        lm = tiny_model(AutoModelForImageTextToText, WITH_IMAGES[family]()).to(device)
        if on:
            use_liger(lm)
        inputs = {name: value.to(device) for name, value in picture(family).items()}
        logprobs = lm(**inputs, use_cache=False).logits.log_softmax(-1)
        logprobs[..., 5].sum().backward()
        every = {name: weight.grad for name, weight in lm.named_parameters() if weight.grad is not None}
        found[on] = logprobs.detach(), every
    gaps = (found[True][0] - found[False][0]).abs()
    return {
        "logprobs": float(gaps.max()),
        "mean": float(gaps.mean()),
        "gradients": gradient_gap(found[True][1], found[False][1]),
        "parts": fused_parts(lm),
    }


def gradient_gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest ||g - g'|| / ||g'|| over the tensors; those that are zero but for rounding (keys' biases) count by the largest."""
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    return max(float((found[n] - g).norm()) / max(float(g.norm()), floor) for n, g in expected.items())


def picture(family: str) -> dict[str, torch.Tensor]:
    """A picture of 16 patches (llava: 4), of which the language model sees 4 tokens, between two pieces of text."""
    ids = torch.tensor([[3, 14, 25, BEGIN, MARK, MARK, MARK, MARK, 36, 47, 58]])
    torch.manual_seed(1)
    if family.startswith("qwen"):
        pixels = torch.randn(16, 3 * 2 * 4 * 4)
        kinds = (ids == MARK).int()
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": kinds,
        }
    size = 8 if family == "llava" else 16
    kinds = {} if family == "llava" else {"token_type_ids": (ids == MARK).int()}
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size), **kinds}


def interpret() -> None:
    """Let Liger's kernels run on the CPU. Triton's interpreter has no functions of CUDA's own library, of which two are used."""
    import triton.language as tl
    from liger_kernel.ops import geglu, layer_norm, rms_norm
    from triton.runtime import interpreter

    from posttrain.distributed import device

    def with_floats(argument):  # as numbers of the kernel: else their own methods are missing there
        if not isinstance(argument, float):
            return converted(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    converted = interpreter._implicit_cvt
    interpreter._implicit_cvt = with_floats
    device.LIGER = (*device.LIGER, "cpu")
    layer_norm.rsqrt = rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # looked up when called: the interpreter replaces it
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def main() -> None:
    interpret()
    found = {family: compare_training(family, "cpu") for family in TEXTS}
    found["LoRA"] = compare_training("qwen3", "cpu", lora_rank=4)
    found["recomputed"] = compare_training("qwen3", "cpu", enable_gradient_checkpointing=True)
    found |= {family: compare_images(family, "cpu") for family in WITH_IMAGES}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
