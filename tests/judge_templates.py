"""Judge the masks of many chat templates on every shape of conversation: what is exact, what is refused and why, what is wrong.

    python tests/judge_templates.py --templates DIR [--tokenizer DIR] [--shapes a,b] [--only name] [--table FILE.md] [--jobs 2]

DIR holds *.jinja files. Exit code 1 if any mask is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

EXACT, REFUSED, TEMPLATE_REFUSES = "exact", "refused", "template refuses"
KINDS = {"mask": "WRONG", "ids": "WRONG", "lost": "lost", "garbage": "garbage", "unsure": "unsure"}
MARKS = {EXACT: "✓", TEMPLATE_REFUSES: "·", "WRONG": "✗", "lost": "l", "garbage": "g", "unsure": "u"}


PAGE = """# What is exact, and what is refused

{templates} published chat templates, {shapes} shapes of conversations (`tests/shapes.py`): {counts}.

A mask is called exact if an oracle that renders each case again by plain transformers agrees (`tests/oracle.py`): the ids are
those of `apply_chat_template`; every turn is trained from where the generation prompt ends to the token that ends the turn, and
nothing else; replacing any message's text by a random word changes just the text of that message. Each template has a tiny
tokenizer of bytes to which the control strings that it mentions were added. The page is written by
`python tests/judge_templates.py --templates DIR --table docs/templates.md`, and a test holds it true.
"""


@dataclass
class Case:
    template: str
    shape: str
    verdict: str  # exact, refused, template refuses, or the gravest kind of complaint
    reason: str = ""  # why it was refused, without what differs from row to row
    said: list[str] = field(default_factory=list)


def judge_template(path: Path, shapes: list[str], tokenizer_folder: str | None, probes: bool) -> list[Case]:
    from posttrain.data.chat import ChatTokenizer
    from shapes import SHAPES
    from templated import tokenizer_for

    template = path.read_text()
    tokenizer = tokenizer_for(template, tokenizer_folder)
    try:
        chat: Any = ChatTokenizer(tokenizer_for(template, tokenizer_folder))
    except Exception as error:
        chat = error
    return [judge_case(path.stem, name, SHAPES[name], tokenizer, chat, probes) for name in shapes]


def judge_case(template: str, name: str, conversation: Any, tokenizer: Any, chat: Any, probes: bool = True) -> Case:
    from oracle import complaints

    try:
        tokenizer.apply_chat_template(
            conversation.messages, tools=conversation.tools, tokenize=False, **conversation.template_kwargs
        )
    except Exception as error:
        return Case(template, name, TEMPLATE_REFUSES, said=[str(error)[:200]])
    try:
        if isinstance(chat, Exception):
            raise chat
        outcome = chat.encode_many([conversation])[0]
    except Exception as error:
        outcome = error
    if type(outcome).__name__ in ("RowError", "InputError"):
        return Case(template, name, REFUSED, _kind_of_refusal(outcome), [str(outcome)])
    found = complaints(tokenizer, conversation, outcome, probes)
    if not found:
        return Case(template, name, EXACT)
    kinds = {KINDS[text.partition(":")[0]] for text in found}
    return Case(template, name, next(kind for kind in MARKS if kind in kinds), said=found)


def _kind_of_refusal(error: Exception) -> str:
    """The error without names and numbers, so that like ones count together."""
    kind = getattr(error, "kind", type(error).__name__)
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "…", str(error))
    return f"{kind}: {re.sub(r'[0-9]+', 'N', text)}"[:140]


def judge_all(paths: list[Path], shapes: list[str], tokenizer: str | None, probes: bool, jobs: int) -> list[Case]:
    if jobs < 2:
        made = (judge_template(path, shapes, tokenizer, probes) for path in paths)
        return [case for cases in _shown(made, len(paths)) for case in cases]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        waiting = [pool.submit(judge_template, path, shapes, tokenizer, probes) for path in paths]
        return [case for cases in _shown((w.result() for w in waiting), len(paths)) for case in cases]


def _shown(made: Any, total: int) -> Any:
    for number, cases in enumerate(made, 1):
        if sys.stderr.isatty() or number % 50 == 0:
            print(f"\r{number}/{total}", end="", file=sys.stderr, flush=True)
        yield cases
    print(file=sys.stderr)


def print_report(cases: list[Case], seconds: float, long: bool) -> None:
    verdicts = Counter(case.verdict for case in cases)
    rendered = len(cases) - verdicts[TEMPLATE_REFUSES]
    print(f"{len({c.template for c in cases})} templates x {len({c.shape for c in cases})} shapes, {seconds:.0f} s: "
          f"{rendered} cases render, {verdicts[TEMPLATE_REFUSES]} the template refuses")  # fmt: skip
    for verdict, count in verdicts.most_common():
        if verdict != TEMPLATE_REFUSES:
            print(f"  {count:6} {count / rendered:6.1%}  {verdict}")
    print("\nRefused, by reason:")
    for reason, count in Counter(case.reason for case in cases if case.verdict == REFUSED).most_common(40):
        where = [c for c in cases if c.reason == reason]
        print(f"  {count:6}  {reason}   e.g. {where[0].template} / {where[0].shape}")
    for verdict in ("WRONG", "lost", "garbage", "unsure"):
        bad = [case for case in cases if case.verdict == verdict]
        if bad:
            print(f"\n{verdict}: {len(bad)} cases, {len({c.template for c in bad})} templates")
        for reason, count in Counter(_plain(case.said[0]) for case in bad).most_common(30):
            where = [c for c in bad if _plain(c.said[0]) == reason]
            print(f"  {count:6}  {reason}   e.g. {where[0].template} / {where[0].shape}")
        for case in bad if long else []:
            print(f"    {case.template} / {case.shape}: {'; '.join(case.said)[:300]}")


def _plain(text: str) -> str:
    return re.sub(r"[0-9]+", "N", re.sub(r"'(?:[^'\\]|\\.)*'", "…", text))[:110]


def table(cases: list[Case]) -> str:
    """The page docs/templates.md: a row a shape, a column a template, and below what the marks mean."""
    templates = sorted(dict.fromkeys(case.template for case in cases))
    reasons = [reason for reason, _ in Counter(c.reason for c in cases if c.verdict == REFUSED).most_common()]
    letters = {reason: f"r{n}" for n, reason in enumerate(reasons, 1)}
    marks = {(c.shape, c.template): letters[c.reason] if c.verdict == REFUSED else MARKS[c.verdict] for c in cases}
    verdicts = Counter(case.verdict for case in cases)
    counts = ", ".join(
        f"{count} {'refused by the template' if verdict == TEMPLATE_REFUSES else verdict}"
        for verdict, count in verdicts.most_common()
    )
    lines = [
        PAGE.format(templates=len(templates), shapes=len({case.shape for case in cases}), counts=counts),
        *(f"{n}. {name}" for n, name in enumerate(templates, 1)), "",
        "| conversation | " + " | ".join(str(n) for n in range(1, len(templates) + 1)) + " |",
        "|---|" + ":-:|" * len(templates),
        *(f"| {shape} | {' | '.join(marks[shape, name] for name in templates)} |"
          for shape in dict.fromkeys(case.shape for case in cases)), "",
        "| mark | meaning |", "|---|---|",
        f"| {MARKS[EXACT]} | ids and mask are exact |",
        f"| {MARKS[TEMPLATE_REFUSES]} | the template itself raises an error: `apply_chat_template` does too |",
        *(f"| {letters[reason]} | refused: {_as_cell(reason)} |" for reason in reasons),
        *(f"| {MARKS[kind]} | {kind} |" for kind in MARKS if verdicts[kind] and kind not in (EXACT, TEMPLATE_REFUSES)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _as_cell(reason: str) -> str:
    return reason.removeprefix("template cannot be masked: ").replace("|", "\\|")


def main() -> int:
    from shapes import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--tokenizer", help="folder of a real tokenizer, instead of a tiny one of bytes")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="names, separated by commas")
    parser.add_argument("--only", default="", help="templates whose name contains this")
    parser.add_argument("--table", type=Path, help="where to write the Markdown table")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="without differential probes")
    parser.add_argument("--long", action="store_true", help="list every wrong case")
    options = parser.parse_args()
    paths = [path for path in sorted(options.templates.glob("*.jinja")) if options.only in path.stem]
    start = perf_counter()
    shapes = [name.strip() for name in options.shapes.split(",")]
    cases = judge_all(paths, shapes, options.tokenizer, not options.quick, options.jobs)
    print_report(cases, perf_counter() - start, options.long)
    if options.table:
        options.table.write_text(table(cases))
    return int(any(case.verdict == "WRONG" for case in cases))


if __name__ == "__main__":
    sys.exit(main())
