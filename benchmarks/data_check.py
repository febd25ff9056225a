"""What `posttrain data check` costs: seconds and peak memory over many made-up rows like GSM8K's.

    python benchmarks/data_check.py --folder FOLDER --rows 1000000 --tokenizer DIR

Rows are word problems of 3 to 8 steps whose words and numbers are drawn; one in a hundred repeats an earlier row, one in a
hundred has a wrong calculation, and one in a thousand has no answer. Validation rows are 1,000, a tenth of them leaked.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = [
    "Ana",
    "Bo",
    "Carla",
    "Deniz",
    "Eli",
    "Femi",
    "Greta",
    "Hugo",
    "Ines",
    "Jamal",
    "Kira",
    "Liam",
    "Mona",
    "Noor",
    "Otto",
    "Petra",
    "Quinn",
    "Rosa",
    "Sami",
    "Tara",
]
THINGS = [
    "apples",
    "books",
    "candles",
    "drums",
    "eggs",
    "flowers",
    "glasses",
    "hats",
    "inks",
    "jars",
    "kites",
    "lamps",
    "maps",
    "nails",
    "oranges",
    "pens",
]
ACTIONS = [
    "buys",
    "finds",
    "paints",
    "sells",
    "counts",
    "carries",
    "borrows",
    "wraps",
    "plants",
    "mends",
    "packs",
    "collects",
    "draws",
    "loses",
    "trades",
]
WHERE = [
    "at the market",
    "in the garden",
    "on Monday",
    "after school",
    "before lunch",
    "with a friend",
    "for the fair",
    "at home",
]


def make_rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    recent: deque[dict[str, Any]] = deque(maxlen=5000)
    for _ in range(count):
        row = rng.choice(recent) if recent and rng.random() < 0.01 else make_row(rng)
        recent.append(row)
        yield row


def make_row(rng: random.Random) -> dict[str, Any]:
    name, total = rng.choice(NAMES), 0
    story, work = [], []
    for _ in range(rng.randint(3, 8)):
        each, many, thing = rng.randint(2, 99), rng.randint(2, 40), rng.choice(THINGS)
        story.append(f"{name} {rng.choice(ACTIONS)} {many} boxes of {each} {thing} {rng.choice(WHERE)}.")
        shown = each * many + (rng.random() < 0.002)
        work.append(f"The {many} boxes hold {many} * {each} = <<{many}*{each}={shown}>>{shown} {thing}.")
        work.append(
            f"With these there are {total} + {shown} = <<{total}+{shown}={total + shown}>>{total + shown} in all."
        )
        total += shown
    question = " ".join(story) + f" How many things has {name} had in hand?"
    answer = None if rng.random() < 0.001 else "\n".join([*work, f"#### {total}"])
    return {"question": question, "answer": answer}


def write_rows(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    leaked = []
    with open(folder / "train.jsonl", "w") as file:
        for number, row in enumerate(make_rows(count, seed=0)):
            file.write(json.dumps(row) + "\n")
            if number % (count // 100) == 0:
                leaked.append(row)
    with open(folder / "test.jsonl", "w") as file:
        for row in [*make_rows(900, seed=1), *leaked]:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokenizer", help="folder with a tokenizer and chat template; not given: texts alone")
    options, more = parser.parse_known_args()
    data = options.folder / str(options.rows)
    if not (data / "test.jsonl").exists():
        write_rows(data, options.rows)
    command = [sys.executable, "-m", "posttrain", "data", "check", "--json", "--output", str(data / "found"), *more]
    command += ["--files", str(data / "train.jsonl"), "--val_files", str(data / "test.jsonl")]
    command += ["--tokenizer", options.tokenizer] if options.tokenizer else []
    begin = time.monotonic()
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    seconds = time.monotonic() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss / 2**20  # of the process that had most
    found = {kind: of_kind["rows"] for kind, of_kind in told["findings"].items()}
    print(f"{options.rows:,} rows, {(data / 'train.jsonl').stat().st_size / 2**20:,.0f} MiB: {seconds:.0f} s, "
          f"{options.rows / seconds:,.0f} rows/s, {used.ru_utime + used.ru_stime:.0f} s of all cores; at most {peak:.2f} GiB in a process; found {found}")  # fmt: skip


if __name__ == "__main__":
    main()
