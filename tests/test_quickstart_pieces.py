from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.prepare import prepare_gsm8k
from posttrain.errors import InputError
from posttrain.quickstart import problems
from posttrain.quickstart.problems import OPERANDS, THINGS, make_problems, write_problems
from posttrain.quickstart.tiny import write_tiny_model
from posttrain.rewards.gsm8k import final_answer, judge_strict
from posttrain.rewards.verdict import Verdict

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
RESULT: dict[str, Callable[[int, int], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def read_lines(file: Path) -> list[str]:
    return file.read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, (text for p in make_problems(2000, 0) for text in (p.question, p.answer)), seed=0)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def test_every_step_of_every_answer_is_right_and_the_last_is_the_answer() -> None:
    for problem in make_problems(3000, seed=1):
        *steps, last = problem.answer.split("\n")
        assert len(steps) in (1, 2)
        for step in steps:
            found = STEP.fullmatch(step)
            assert found is not None, step
            assert RESULT[found[2]](int(found[1]), int(found[3])) == int(found[4]) > 0
            assert found[3] in re.findall(r"\d+", problem.question)
        assert last == f"#### {found[4]}"
        assert judge_strict(problem.answer, final_answer(problem.answer)) is Verdict.RIGHT


def test_questions_are_whole_sentences_about_three_different_people() -> None:
    for problem in make_problems(3000, seed=2):
        assert re.fullmatch(r"([A-Z][^.?]*\. )+(How many [^.?]*\?)", problem.question), problem.question
        assert not re.search(r"[{}]|  | 1 ", problem.question)
        assert any(f" {things}" in problem.question for things in THINGS)
        people = set(re.findall(r"\b[A-Z][a-z]+\b", problem.question)) - {"How", "Then", "Monday", "Tuesday"}
        assert 1 <= len(people) <= 3


def test_no_question_appears_twice_and_the_same_seed_tells_the_same_stories() -> None:
    told = make_problems(5000, seed=3)
    assert len({problem.question for problem in told}) == 5000
    assert make_problems(5000, seed=3) == told
    assert make_problems(100, seed=3) == told[:100]
    assert make_problems(100, seed=4) != told[:100]


def test_more_problems_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "SHARE_OF_TWO_STEPS", 0.0)
    for name, few in {"OPENINGS": 1, "THINGS": 1, "GIRLS": 2, "BOYS": 1}.items():
        monkeypatch.setattr(problems, name, getattr(problems, name)[:few])
    num_questions = len(OPERANDS) ** 2 * 3
    assert len(make_problems(num_questions, seed=0)) == num_questions
    with pytest.raises(InputError, match=f"{num_questions} were found"):
        make_problems(num_questions + 1, seed=0)


def test_written_problems_are_disjoint_and_prepare_reads_them(tmp_path: Path) -> None:
    def written(folder: str, num_train: int) -> list[list[str]]:
        write_problems(tmp_path / folder, num_train, num_prompts=50, num_test=100, seed=0)
        return [read_lines(tmp_path / folder / f"{name}.jsonl") for name in ("train", "prompts", "test")]

    train, prompts, test = written("problems", 500)
    questions = [{json.loads(line)["question"] for line in lines} for lines in (train, prompts, test)]
    assert [*map(len, questions)] == [500, 50, 100] and len(set.union(*questions)) == 650
    assert written("more", 900)[2] == test  # the test does not depend on how much is trained
    bare = [json.loads(line)["answer"].startswith("####") for line in train]
    assert 0.5 < sum(bare) / 500 < 0.7
    assert not any(json.loads(line)["answer"].startswith("####") for line in prompts + test)
    summary = prepare_gsm8k(str(tmp_path / "problems"), str(tmp_path / "prepared"))
    assert (summary["train"]["rows"], summary["test"]["rows"]) == (500, 100)


@pytest.mark.parametrize(
    "text",
    [
        "Tom has 3 apples and buys 4 more.\n#### 7",
        "  two  spaces\n\n\nand\ttabs \r\n ",
        "héllo 世界 🎉🏽 \u200b\x00\x7f\U0010ffff don't",
        "<|im_start|>user\n$5 <<3+4=7>>7 ####",
        "",
    ],
)
def test_any_text_comes_back_from_its_tokens_as_it_was(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_of_the_problems_and_digits_are_one_token_each(tokenizer: Any) -> None:
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode(token) for token in tokenizer(text)["input_ids"]]

    assert pieces("Tom has 12 apples") == ["Tom", " has", " ", "1", "2", " apples"]
    assert pieces("12+7=19\n#### 19") == [*"12+7=19", "\n", "####", " ", *"19"]
    assert len(tokenizer) < 1000


def test_the_chat_template_writes_chatml_without_a_system_prompt(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "#### 7"}]
    prompt = "<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == prompt
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "#### 7<|im_end|>\n"
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2


def test_the_model_loads_and_stops_at_the_end_of_a_turn(tiny: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.config.model_type == "qwen2"
    assert model.config.vocab_size == len(tokenizer)
    end, padding = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == end
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id == padding


def test_the_same_seed_writes_the_same_model(tiny: Path, tmp_path: Path) -> None:
    import torch

    before = torch.random.get_rng_state()
    texts = [text for p in make_problems(2000, 0) for text in (p.question, p.answer)]
    write_tiny_model(tmp_path / "same", texts, seed=0)
    write_tiny_model(tmp_path / "other", texts, seed=1)
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "same" / file).read_bytes() == (tiny / file).read_bytes()
    assert (tmp_path / "other/model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()
    assert torch.equal(torch.random.get_rng_state(), before)
