"""Small processors of images of several families, all with one tiny tokenizer, and pictures that the tests share."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

WORDS = (
    "system user assistant model You are a helpful assistant . What is to be seen in this picture and that one ? A red circle "
    "on a blue ground , a green square : They are not the same , the first is round . which colour shape two"
)
CONTROLS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<bos>")
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = """{{ bos_token }}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}"""
# sees parts only, and writes a message's images before its texts
LLAVA = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS = LLAVA.replace("<image>\n", "<image>")
INTERNVL = QWEN.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
TEMPLATES = {
    "qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "gemma3": GEMMA, "llava": LLAVA, "idefics3": IDEFICS, "internvl": INTERNVL,
}  # fmt: skip
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TOKENS = {
    "qwen2_5_vl": QWEN_TOKENS,
    "qwen3_vl": QWEN_TOKENS,
    "llava": ("<image>",),
    "idefics3": (
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
        *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    ),
}  # fmt: skip
NAMED_TOKENS = {  # by the names that processors look for
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}  # fmt: skip
FAMILIES = tuple(TEMPLATES)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a slope, so that no two are alike."""
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    return Image.fromarray((noise + np.linspace(0, 127, width)[None, :, None]).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@cache
def make_processor(family: str) -> Any:
    """The family's processor of transformers, with images of a few dozen tokens."""
    import transformers as t

    tokenizer, square = _tokenizer(family), {"height": 56, "width": 56}
    given: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    match family:
        case "qwen2_5_vl":
            images = t.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
            return t.Qwen2_5_VLProcessor(images, video_processor=t.Qwen2VLVideoProcessor(), **given)
        case "qwen3_vl":
            images = t.Qwen2VLImageProcessor(min_pixels=32 * 32, max_pixels=32 * 32 * 64, patch_size=16)
            return t.Qwen3VLProcessor(images, video_processor=t.Qwen3VLVideoProcessor(), **given)
        case "gemma3":
            return t.Gemma3Processor(t.Gemma3ImageProcessor(size=square), image_seq_length=4, **given)
        case "llava":
            images = t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=square)
            rule = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
            return t.LlavaProcessor(images, patch_size=14, **rule, **given)
        case "idefics3":
            images = t.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
            return t.Idefics3Processor(images, image_seq_len=4, **given)
        case "internvl":
            images, videos = t.GotOcr2ImageProcessor(size=square, max_patches=4), t.InternVLVideoProcessor()
            return t.InternVLProcessor(images, video_processor=videos, image_seq_length=4, **given)


def _tokenizer(family: str) -> Any:
    """Words whole, bytes for the rest, and the control strings of the family."""
    from transformers import Qwen2Tokenizer

    named = NAMED_TOKENS.get(family, {})
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [WORDS] * 100, 512, show_progress=False,
        new_special_tokens=[*CONTROLS, *TOKENS.get(family, ()), *named.values()],
    )  # fmt: skip
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    if family == "gemma3":
        tokenizer.bos_token = "<bos>"
    tokenizer._set_model_specific_special_tokens(named)
    tokenizer.init_kwargs["extra_special_tokens"] = named  # so that it is saved with them
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer
