from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from posttrain.rewards.gsm8k import final_answer, judge_flexible, judge_strict
from posttrain.rewards.verdict import Verdict

RIGHT, WRONG, UNKNOWN = Verdict.RIGHT, Verdict.WRONG, Verdict.UNKNOWN

STRICT_CASES = [
    ("3+4=<<3+4=7>>7\n#### 7", "7", RIGHT),
    ("#### 1,234", "1234", RIGHT),
    ("#### 1234", "1,234", RIGHT),
    ("#### $18", "18", RIGHT),
    ("####18", "18", RIGHT),
    ("#### 18.", "18", RIGHT),
    ("#### 18.0", "18", RIGHT),
    ("#### 18 dollars", "18", RIGHT),
    ("#### 25%", "25", RIGHT),
    ("#### 25", "25%", RIGHT),
    ("#### -3", "-3", RIGHT),
    ("#### −3", "-3", RIGHT),
    ("#### -$3", "-3", RIGHT),
    ("#### $-3", "-3", RIGHT),
    ("#### 0.5", ".5", RIGHT),
    ("#### $.50", "0.5", RIGHT),
    ("#### 5\nNo, wait.\n#### 7", "7", RIGHT),
    ("#### 7\nNo, wait.\n#### 5", "7", WRONG),
    ("#### 7\n#### ", "7", WRONG),
    ("#### 3", "-3", WRONG),
    ("#### 18.5", "18", WRONG),
    ("#### 1,2", "12", WRONG),
    ("#### 16 - 3", "16", WRONG),
    ("#### 1/2", "1", WRONG),
    ("#### 1e3", "1", WRONG),
    ("#### seven", "7", WRONG),
    ("The answer is 7.", "7", WRONG),
    ("7 #### 8", "7", WRONG),
    ("####\n7", "7", WRONG),
    ("", "7", WRONG),
    ("#### 7", None, UNKNOWN),
    ("#### 7", "", UNKNOWN),
    ("#### 7", "seven", UNKNOWN),
    ("#### 7", "7 or 8", UNKNOWN),
    ("", None, UNKNOWN),
    # equal as floats
    ("#### 9007199254740993", "9007199254740992", WRONG),
    ("#### 0.1000000000000000055511151231257827", "0.1", WRONG),
]

FLEXIBLE_CASES = [
    ("The answer is 7.", "7", RIGHT),
    ("So she has $1,234.50 left.", "1234.5", RIGHT),
    ("3+4=7", "7", RIGHT),
    ("10-3", "3", RIGHT),
    ("It falls to -3 degrees.", "-3", RIGHT),
    ("#### 7", "7", RIGHT),
    ("7 apples and 8 pears", "7", WRONG),
    ("no number at all", "7", WRONG),
    ("", "7", WRONG),
    ("7", "unreadable", UNKNOWN),
]


@pytest.mark.parametrize(("text", "truth", "verdict"), STRICT_CASES)
def test_strict_judges_the_number_after_the_last_mark(text: str, truth: str | None, verdict: Verdict) -> None:
    assert judge_strict(text, truth) is verdict


@pytest.mark.parametrize(("text", "truth", "verdict"), FLEXIBLE_CASES)
def test_flexible_judges_the_last_number(text: str, truth: str, verdict: Verdict) -> None:
    assert judge_flexible(text, truth) is verdict


@pytest.mark.parametrize("judge", [judge_strict, judge_flexible])
@pytest.mark.parametrize("piece", ["a", "1 ", "1,", "1.", "9", "-", "$-", "#### ", "####9,", " "])
def test_a_megabyte_is_judged_in_linear_time(judge, piece: str) -> None:
    text = "#### " + piece * (2**20 // len(piece))
    start = time.perf_counter()
    judge(text, "2")
    assert time.perf_counter() - start < 10  # about a second here; anything quadratic takes minutes


def test_a_million_digits_are_compared_to_the_last() -> None:
    digits = "7" * 2**20
    assert judge_strict(f"#### {digits}", digits) is RIGHT
    assert judge_strict(f"#### {digits}", digits[:-1] + "8") is WRONG


def test_another_mark_can_be_told() -> None:
    assert judge_strict("3+4=7\nA: 7", "7", mark="A:") is RIGHT
    assert judge_strict("3+4=7\n#### 7", "7", mark="A:") is WRONG


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("... #### 1,234", "1234"), ("#### $18.50", "18.50"), ("#### -3.", "-3"), ("seven", None), ("#### x", None)],
)
def test_final_answer_is_the_plain_number(answer: str, truth: str | None) -> None:
    assert final_answer(answer) == truth


def test_verdicts_agree_with_the_label_of_every_real_solution(shared_data: Path) -> None:
    """All 2,640 agree; the solutions were written by four models and end in `A: N`."""
    lines = (shared_data / "rewards" / "gsm8k_labelled_solutions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2640
    judged = [judge_strict(row["solution"], row["gold_answer"], mark="A:") is RIGHT for row in rows]
    disagreeing = [row for row, right in zip(rows, judged, strict=True) if right is not row["is_correct"]]
    assert disagreeing == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gsm8k_answer_is_right_for_itself_and_wrong_for_another(shared_data: Path, split: str) -> None:
    lines = (shared_data / "gsm8k" / f"{split}.jsonl").read_text("utf-8").splitlines()
    for answer in (json.loads(line)["answer"] for line in lines):
        truth = final_answer(answer)
        assert truth is not None
        assert judge_strict(answer, truth) is judge_flexible(answer, truth) is RIGHT
        assert judge_strict(answer, truth + "1") is judge_flexible(answer, truth + "1") is WRONG


def test_accuracy_has_wilsons_interval_which_ends_at_zero_and_one():
    from posttrain.rewards.accuracy import Accuracy

    half = Accuracy(5, 10, num_unknown=3)
    assert (half.share, half.num_problems) == (0.5, 13)
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert Accuracy(0, 24).low == 0.0 and Accuracy(24, 24).high == 1.0
