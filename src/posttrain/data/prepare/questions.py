"""Questions with worked answers: GSM8K and MATH.

question, answer -> data_source, prompt, response, messages, reward_model, extra_info
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.data.messages import RowError
from posttrain.data.prepare.data_set import DataSet, text_of
from posttrain.data.sources import Row
from posttrain.errors import InputError
from posttrain.rewards.gsm8k import ANSWER_MARK, final_answer

if TYPE_CHECKING:
    import pyarrow as pa

GSM8K_INSTRUCTION = f"Reason step by step, and give the result on a last line after {ANSWER_MARK}."
MATH_INSTRUCTION = r"Reason step by step, and put the result in \boxed{}."
TRAIN_AND_TEST = {"train": ("train",), "test": ("test",)}


def question_row(
    data_source: str, prompt: str, response: str, ground_truth: Any, extra_info: dict[str, Any]
) -> dict[str, Any]:
    """A row that SFT, evaluation and reinforcement learning can use."""
    asked = [{"role": "user", "content": prompt}]
    return {
        "data_source": data_source,
        "prompt": asked,
        "response": response,
        "messages": [*asked, {"role": "assistant", "content": response}],
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
    }


def question_schema(reward_model: dict[str, pa.DataType] | None = None) -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    messages = pa.list_(pa.struct({"role": text, "content": text}))
    return pa.schema(
        {
            "data_source": text,
            "prompt": messages,
            "response": text,
            "messages": messages,
            "reward_model": pa.struct(reward_model or {"style": text, "ground_truth": text}),
            "extra_info": pa.struct({"split": text, "index": pa.int64(), "question": text, "answer": text}),
        }
    )


def final_boxed(solution: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}, braces inside it balanced, or after a bare \boxed."""
    start = max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"))
    if start < 0:
        return None
    inside = solution[start:].partition("boxed" if solution.startswith(r"\boxed", start) else "fbox")[2]
    if not inside.startswith("{"):
        return inside.split("$")[0].strip() or None
    depth = 0
    for at, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[1:at].strip() or None
    return None


def _gsm8k_row(row: Row, split: str, index: int, *, data_source: str, instruction: str = "") -> dict[str, Any]:
    columns = "GSM8K has question and answer"
    question, answer = text_of(row, "question", columns), text_of(row, "answer", columns)
    ground_truth = final_answer(answer)
    if ground_truth is None:  # it could be neither judged nor rewarded
        raise InputError(
            f"{row.place}: the answer ends in {answer[-60:]!r}; expected a last line such as '{ANSWER_MARK} 18'. "
            "Mend or remove the row."
        )
    extra_info = {"split": split, "index": index, "question": question, "answer": answer}
    prompt = f"{question}\n{instruction}" if instruction else question
    return question_row(data_source, prompt, answer, ground_truth, extra_info)


def _math_row(row: Row, split: str, index: int) -> dict[str, Any]:
    columns = "MATH has problem and solution"
    problem, solution = text_of(row, "problem", columns), text_of(row, "solution", columns)
    ground_truth = final_boxed(solution)
    if ground_truth is None:
        raise RowError("no boxed result", rf"the solution ends in {solution[-60:]!r}, without \boxed{{...}}")
    extra_info = {"split": split, "index": index, "question": problem, "answer": solution}
    return question_row("math", f"{problem}\n{MATH_INSTRUCTION}", solution, ground_truth, extra_info)


GSM8K = DataSet("GSM8K", TRAIN_AND_TEST, partial(_gsm8k_row, data_source="gsm8k_sft"), question_schema,
                hub_name="openai/gsm8k", hub_config="main")  # fmt: skip
GSM8K_MULTITURN_SFT = DataSet("GSM8K", TRAIN_AND_TEST,
                              partial(_gsm8k_row, data_source="gsm8k_multiturn_sft", instruction=GSM8K_INSTRUCTION),
                              question_schema, hub_name="openai/gsm8k", hub_config="main")  # fmt: skip
MATH = DataSet("MATH", TRAIN_AND_TEST, _math_row, question_schema, hub_name="DigitalLearningGmbH/MATH-lighteval")
