"""What the audit can find: every kind with its meaning and what to do, and the log that keeps findings."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import IO

EXAMPLES_A_KIND = 5


@dataclass(frozen=True)
class Kind:
    """`is_wrong`: no such row can be used, or should be; else it could be as it is meant, and a person should look."""

    meaning: str
    advice: str
    is_wrong: bool = False


KINDS = {
    "unusable": Kind(
        "rows that cannot be trained on",
        "Mend them; else they are left out (data.invalid_rows=drop), or stop the run (error).",
        is_wrong=True,
    ),
    "duplicate": Kind(
        "rows whose messages and images are those of an earlier row, but for white space",
        "Leave them out with `posttrain data clean`, unless they shall count more.",
        is_wrong=True,
    ),
    "leak": Kind(
        "rows whose question, with its images, is one of the validation rows'",
        "Leave them out with `posttrain data clean`: a validation that was trained on says nothing.",
        is_wrong=True,
    ),
    "near-duplicate": Kind(
        "rows whose text is nearly that of an earlier row",
        "Look at some. Leave them out with `posttrain data clean --drop near-duplicate`.",
    ),
    "near-leak": Kind(
        "rows whose text is nearly that of a validation row",
        "Look at some. Leave them out with `posttrain data clean --drop near-leak`.",
    ),
    "too-long": Kind(
        "samples longer than data.max_length",
        "Raise data.max_length if memory allows, or choose with data.truncation what becomes of them.",
    ),
    "huge-image": Kind(
        "images of more than 32 million pixels",
        "Scale them down: reading one takes a second, and its model never sees so many.",
    ),
    "tiny-image": Kind(
        "images with a side of fewer than 28 pixels", "Look at some: often a placeholder, or what a failed download left."
    ),
    "other-answer": Kind(
        "rows that ask the same of the same images as an earlier row, and are not the same otherwise",
        "Look at some: right where several answers are, such as descriptions; else one of two is wrong.",
    ),
    "cut-answer": Kind(
        "trained turns that truncation cuts or removes",
        "Raise data.max_length, or take data.truncation=drop: a model that sees cut answers learns to stop anywhere.",
    ),
    "end-untrained": Kind(
        "trained turns whose last token is not trained",
        "Do not train on this as it is: the model would not learn to stop. Look with `posttrain data show`.",
        is_wrong=True,
    ),
    "empty-turn": Kind("turns with no text but white space", "Mend or leave out such rows."),
    "repeated-turn": Kind("turns that repeat what the same role said the time before", "Look at some: often a fault of collecting."),
    "echo": Kind("answers that repeat the message before them", "Look at some: a model learns to repeat."),
    "no-final-answer": Kind(
        "conversations whose last message is not an assistant's", "Nothing after the last answer is trained. Cut it off, or add the answer."
    ),
    "wrong-arithmetic": Kind("calculations <<a+b=c>> that do not hold", "Look at them, and mend what is wrong."),
    "answer-mismatch": Kind("answers whose #### differs from what they work out", "Look at them, and mend what is wrong."),
    "truth-mismatch": Kind(
        "answers whose #### differs from the row's ground truth", "One of the two is wrong: mend it before evaluation or rewards use it."
    ),
    "control-character": Kind(
        "texts with characters that cannot be seen: control codes, half pairs, marks of direction or zero width, U+FFFD",
        "Usually a wrong decoding or copied from a page: mend the source.",
    ),
    "note": Kind("what the tokenizer says about rows", "Read what is said; it is not an error."),
}  # fmt: skip
NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
DROPPED_BY_DEFAULT = ("unusable", "duplicate", "leak")


@dataclass(frozen=True)
class Finding:
    """One thing found, as a line of findings.jsonl."""

    file: str
    row: int
    kind: str
    found: str


@dataclass
class Findings:
    """All findings, counted; the first of each kind are kept, and all go to `file` where there is one."""

    file: IO[str] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, finding: Finding, reason: str = "") -> None:
        """Count it. `reason` divides a kind, as the reasons of unusable rows do."""
        self.counts[finding.kind] += 1
        if reason:
            self.reasons.setdefault(finding.kind, Counter())[reason] += 1
        examples = self.examples.setdefault(finding.kind, [])
        if len(examples) < EXAMPLES_A_KIND:
            examples.append(finding)
        if self.file is not None:
            self.file.write(json.dumps(asdict(finding)) + "\n")
