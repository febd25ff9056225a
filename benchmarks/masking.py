"""What masks cost: posttrain's encoding beside plain `apply_chat_template`, on the same conversations, in one run.

    python benchmarks/masking.py --tokenizer DIR --template FILE.jinja --gsm8k train.jsonl [--tools tau_bench.jsonl] [--rounds 7]

Plain: `tokenizer.apply_chat_template(messages, tools=None)`, one conversation after the other: rendering and tokenizing alone.
posttrain: `ChatTokenizer.encode_many` in chunks of 256, as training reads rows: rendering, masks, proof, tokenizing. Rounds
alternate; each one's ratio is its own, and the median, least and most are printed. Threads: those of the tokenizers library
(TOKENIZERS_PARALLELISM), which uses them for chunks alone; with `false` all is one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

CHUNK = 256


def main() -> None:
    options = _options()
    from transformers import AutoTokenizer

    from posttrain.data.chat import ChatTokenizer
    from posttrain.data.messages import RowError
    from posttrain.records import Conversation

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokenizer.chat_template = options.template.read_text()
    print(f"{options.template.stem}, threads of the tokenizer: {os.environ.get('TOKENIZERS_PARALLELISM', 'default')}")
    for name, chats in _sets(options).items():
        chat = ChatTokenizer(tokenizer)
        conversations = [Conversation(messages) for messages in chats]
        samples = chat.encode_many(conversations)
        refused = [sample for sample in samples if isinstance(sample, RowError)]
        tokens = sum(len(sample[0]) for sample in samples if not isinstance(sample, RowError))
        plain = partial(_plain, tokenizer, chats)
        masked = partial(_masked, chat, conversations)
        times = [(_seconds(plain), _seconds(masked)) for _ in range(options.rounds)]
        ratios = sorted(ours / theirs for theirs, ours in times)
        theirs, ours = (statistics.median(column) / len(chats) * 1000 for column in zip(*times, strict=True))
        print(
            f"{name}: {len(chats)} conversations, {tokens / len(chats):.0f} tokens each, {len(refused)} refused; plain "
            f"{theirs:.2f} ms, posttrain {ours:.2f} ms a conversation: {statistics.median(ratios):.2f} x "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--template", required=True, type=Path)
    parser.add_argument("--gsm8k", required=True, type=Path, help="rows with question and answer, as JSON lines")
    parser.add_argument("--tools", type=Path, help="rows with messages, as JSON lines")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def _sets(options: Any) -> dict[str, list[list[dict[str, Any]]]]:
    rows = [json.loads(line) for line in options.gsm8k.read_text().splitlines()[:1536]]
    turns = [[{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in rows]
    sets = {
        "one turn": turns,
        "six turns": [list(chain.from_iterable(turns[i : i + 6])) for i in range(0, len(turns), 6)],
    }
    if options.tools:
        sets["with tools"] = [
            [_plainly(message) for message in json.loads(line)["messages"]]
            for line in options.tools.read_text().splitlines()
        ]
    return sets


def _plainly(message: dict[str, Any]) -> dict[str, Any]:
    """In the form that all templates take: arguments as objects, no null text."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or []
    ]
    return {**message, "content": message["content"] or "", **({"tool_calls": calls} if calls else {})}


def _plain(tokenizer: Any, chats: list[list[dict[str, Any]]]) -> None:
    for messages in chats:
        tokenizer.apply_chat_template(messages)


def _masked(chat: Any, conversations: list[Any]) -> None:
    for i in range(0, len(conversations), CHUNK):
        chat.encode_many(conversations[i : i + CHUNK], origins=False)


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
