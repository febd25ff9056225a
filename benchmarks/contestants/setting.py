"""What all contestants share: the same model, the same rows, the same trained tokens, and one line a step."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = "templates/Qwen-Qwen2.5-7B-Instruct.jinja"
IGNORED = -100
NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))

# 6.29M parameters in the blocks; with 8,192 words in the tied embedding 8.39M, the size of the first measurements
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Setting:
    """Where things lie and how each contestant trains; handed to every contestant as one JSON file."""

    model: str
    rows: str
    out: str
    batch_rows: int
    num_epochs: int
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0

    @classmethod
    def read(cls, file: str) -> Setting:
        return cls(**json.loads(Path(file).read_text()))

    @property
    def metrics(self) -> Path:
        return Path(self.out) / "metrics.jsonl"

    def conversations(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self.rows).read_text().splitlines()]


class StepLog:
    """metrics.jsonl as posttrain writes it: one line a step, whose seconds run from the end of the step before."""

    def __init__(self, setting: Setting) -> None:
        self.file = setting.metrics.open("w")
        self.ended = time.perf_counter()

    def write(self, step: int, loss: float, num_tokens: int) -> None:
        seconds, self.ended = time.perf_counter() - self.ended, time.perf_counter()
        line = {"step": step, "phase": "train", "loss": loss, "num_tokens": num_tokens, "step_seconds": seconds}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def tokenize(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids of a conversation and their labels: the answer and the `<|im_end|>` that ends it are trained, the line break
    that the template puts after it is not."""
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt and ids[-2] == tokenizer.eos_token_id
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) : -1] + [IGNORED]


def prepare(folder: Path, data: Path, num_rows: int, vocabulary: str) -> tuple[Path, Path]:
    """Writes the model (random weights) and the conversations; gives the model's folder and the file of rows.

    `vocabulary` small: Qwen2.5's tokenizer trained anew on GSM8K for 8,192 words, so that the body and not the embedding
    is most of the model. full: the real one, 151,665 words.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    problems = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "Qwen2.5")
    tokenizer.chat_template = (data / TEMPLATE).read_text()
    if vocabulary == "small":
        num_added_later = sum(not token.special for token in tokenizer.added_tokens_decoder.values())
        texts = [problem[key] for problem in problems for key in ("question", "answer")]
        tokenizer = tokenizer.train_new_from_iterator(texts, 8192 - num_added_later, show_progress=False)
    config = Qwen2Config(
        **SHAPE, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(0)
    model = folder / "model"
    Qwen2ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)

    rows = folder / "conversations.jsonl"
    with rows.open("w") as file:
        for problem in problems[:num_rows]:
            prompt = [{"role": "user", "content": problem["question"]}]
            answer = [{"role": "assistant", "content": problem["answer"]}]
            file.write(json.dumps({"messages": prompt + answer, "prompt": prompt, "completion": answer}) + "\n")
    return model, rows
