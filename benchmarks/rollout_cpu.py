"""Answers a second of posttrain's rollout beside transformers' `generate`, on the quickstart's model, in one run, on one thread.

    python benchmarks/rollout_cpu.py [--rounds 7] [--batch_sizes 64 512] [--write benchmarks/results/rollout_cpu.json]

64 prompts of 40 to 60 random tokens, 8 answers each, temperature 1, weights drawn at random: their tokens are nearly evenly likely,
so that with 30 of 445 tokens as ends answers have 15 tokens on average and end anywhere (`ends`); with one end and a limit of 15
nearly all have 15 (`even`). transformers gets the same prompts in the same batches, sorted by length too, with
`num_return_sequences=8`; log-probabilities, which only posttrain returns, and text, which neither makes here, are not asked of it.
Rounds alternate; each round's ratio is its own. `parts` are shares of posttrain's time. `matmul_share` is the time that the
products with weights would take at the speed of a large product, over all of the time.
"""

# P prompts, T longest prompt

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from posttrain.distributed.device import measured_matmul_flops
from posttrain.rollout import decoding
from posttrain.rollout.rollout import Request, Sampling
from posttrain.rollout.transformers import TransformersRollout

VOCABULARY, PROMPTS, ANSWERS = 445, 64, 8
CASES = {"even": (range(1), 15), "ends": (range(30), 64)}  # end tokens, limit


class NoText:
    """In place of a tokenizer: turning ids into text is the same for both."""

    eos_token_id = None

    def decode(self, ids: np.ndarray, skip_special_tokens: bool) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cases": [_measure(case, size, options.rounds) for case in CASES for size in options.batch_sizes],
    }
    if options.write:
        options.write.write_text(json.dumps(found, indent=2) + "\n")


def _measure(case: str, batch_size: int, rounds: int) -> dict[str, Any]:
    ends, limit = CASES[case]
    model, prompts = _model(), _prompts()
    rollout = TransformersRollout(model, NoText(), batch_size, list(ends))
    times: list[tuple[float, float]] = []
    tokens: list[tuple[int, int]] = []
    for number in range(rounds + 1):
        begin = time.perf_counter()
        theirs = _generate(model, prompts, batch_size, list(ends), limit, number)
        middle = time.perf_counter()
        ours = _answer(rollout, prompts, limit, number)
        times.append((middle - begin, time.perf_counter() - middle))
        tokens.append((theirs, ours))
    times, tokens = times[1:], tokens[1:]  # the first round warms up
    count = PROMPTS * ANSWERS
    # their answers are others: seconds are per token, so that one side's luck with lengths does not count
    ratios = sorted((t[0] / n[0]) / (t[1] / n[1]) for t, n in zip(times, tokens, strict=True))
    seconds = statistics.median(t[1] for t in times)
    written = statistics.mean(n[1] for n in tokens)
    case_found = {
        "case": case,
        "batch_size": batch_size,
        "tokens_per_answer": round(written / count, 1),
        "answers_per_second": round(count / seconds),
        "tokens_per_second": round(statistics.median(n[1] / t[1] for t, n in zip(times, tokens, strict=True))),
        "generate_tokens_per_second": round(statistics.median(n[0] / t[0] for t, n in zip(times, tokens, strict=True))),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_least": round(ratios[0], 2),
        "ratio_most": round(ratios[-1], 2),
        "parts": _parts(rollout, prompts, limit),
        "matmul_share": round(_products(model, prompts, written) / seconds, 2),
    }
    print(json.dumps(case_found), flush=True)
    return case_found


def _model() -> Any:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
        )
    )
    model.generation_config = GenerationConfig()
    return model.eval()


def _prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = [rng.integers(30, VOCABULARY, rng.integers(40, 61)).astype(np.int32) for _ in range(PROMPTS)]
    return sorted(drawn, key=len)


def _answer(rollout: TransformersRollout, prompts: list[np.ndarray], limit: int, seed: int) -> int:
    """Tokens written."""
    requests = [Request(p, (seed, row, n), limit) for row, p in enumerate(prompts) for n in range(ANSWERS)]
    return sum(completion.num_tokens for completion in rollout.generate(requests, Sampling(temperature=1.0)))


def _generate(model: Any, prompts: list[np.ndarray], batch_size: int, ends: list[int], limit: int, seed: int) -> int:
    """Tokens written."""
    torch.manual_seed(seed)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=limit,
        eos_token_id=ends,
        pad_token_id=VOCABULARY - 1,
        num_return_sequences=ANSWERS,
    )
    count, together = 0, batch_size // ANSWERS
    for start in range(0, len(prompts), together):
        batch = prompts[start : start + together]
        longest = max(map(len, batch))
        ids_PT = torch.full((len(batch), longest), VOCABULARY - 1)
        mask_PT = torch.zeros_like(ids_PT)
        for row, prompt in enumerate(batch):
            ids_PT[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask_PT[row, longest - len(prompt) :] = 1
        with torch.no_grad():
            out = model.generate(input_ids=ids_PT, attention_mask=mask_PT, generation_config=config)
        ended = np.isin(out[:, longest:].numpy(), ends)
        count += int(np.where(ended.any(1), ended.argmax(1) + 1, ended.shape[1]).sum())
    return count


def _parts(rollout: TransformersRollout, prompts: list[np.ndarray], limit: int) -> dict[str, float]:
    """Shares of the time, in one more round that is looked into."""
    spent: Counter[str] = Counter()
    with (
        _timed(spent, decoding, "_read", "prompts"),
        _timed(spent, decoding.Rows, "write", "noting tokens"),
        _timed(spent, rollout.model, "forward", "tokens through the model"),
        _timed(spent, decoding, "draw", "drawing"),
        _timed(spent, decoding.Cache, "keep", "leaving"),
    ):
        begin = time.perf_counter()
        _answer(rollout, prompts, limit, 99)
        whole = time.perf_counter() - begin
    spent["tokens through the model"] -= spent["prompts"]
    spent["around"] = whole - sum(spent.values())
    return {name: round(seconds / whole, 3) for name, seconds in spent.most_common()}


@contextmanager
def _timed(spent: Counter[str], owner: Any, name: str, part: str) -> Iterator[None]:
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(*given: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return inner(*given, **named)
        finally:
            spent[part] += time.perf_counter() - begin

    setattr(owner, name, outer)
    yield
    if isinstance(owner, torch.nn.Module):
        delattr(owner, name)
    else:
        setattr(owner, name, inner)


def _products(model: Any, prompts: list[np.ndarray], written: float) -> float:
    """Seconds of the products with weights, at the speed of a large one."""
    head = model.lm_head.weight.numel()
    body = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
    flops = 2 * body * (sum(map(len, prompts)) + written) + 2 * head * written
    return flops / measured_matmul_flops(torch.device("cpu"), torch.float32)


if __name__ == "__main__":
    main()
