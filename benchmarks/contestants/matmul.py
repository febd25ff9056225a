"""The machine's own rate: float32 products in the shapes of this model's training step, and nothing else.

python -m contestants.matmul SETTING.json writes {"gflops": rate} to the run folder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig

from contestants.setting import NUM_THREADS, Setting

NUM_ROWS = 3700  # tokens of a micro-batch of the plain loop
HEAD_ROWS = 512  # tokens of a chunk of its vocabulary head
REPEATS = 15


def linear_shapes(config) -> list[tuple[int, int, int, int]]:
    """(rows, in, out, how often) for each linear layer of a micro-batch; the head sees trained tokens only, half of all."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    width = hidden // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads * width, config.num_key_value_heads * width
    blocks = [(hidden, heads, 1), (hidden, kv_heads, 2), (heads, hidden, 1), (hidden, inner, 2), (inner, hidden, 1)]
    head = (HEAD_ROWS, hidden, config.vocab_size, NUM_ROWS // 2 // HEAD_ROWS)
    return [(NUM_ROWS, num_in, num_out, times * layers) for num_in, num_out, times in blocks] + [head]


def median_seconds(product) -> float:
    product()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[REPEATS // 2]


def main(setting: Setting) -> None:
    torch.set_num_threads(NUM_THREADS)
    flops, seconds = 0.0, 0.0
    for rows, num_in, num_out, times in linear_shapes(AutoConfig.from_pretrained(setting.model)):
        x, weight, y = torch.randn(rows, num_in), torch.randn(num_out, num_in), torch.randn(rows, num_out)
        x_out, weight_out, y_out = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(y)
        forward = median_seconds(lambda x=x, w=weight, out=y_out: torch.mm(x, w.T, out=out))
        to_input = median_seconds(lambda y=y, w=weight, out=x_out: torch.mm(y, w, out=out))
        to_weight = median_seconds(lambda y=y, x=x, out=weight_out: torch.mm(y.T, x, out=out))
        flops += times * 6 * rows * num_in * num_out
        seconds += times * (forward + to_input + to_weight)
    Path(setting.out, "matmul.json").write_text(json.dumps({"gflops": flops / seconds / 1e9}))


if __name__ == "__main__":
    main(Setting.read(sys.argv[1]))
