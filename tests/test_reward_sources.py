"""Rewards that a row's data_source chooses, arguments of functions of one's own, and how validation draws."""

import sys

import pytest

from posttrain.config.schema import RewardOptions, RolloutOptions
from posttrain.errors import InputError
from posttrain.loops import validation
from posttrain.rewards.built_in import SOURCES, load_by_source
from posttrain.rewards.score import Answered, Verdict, open_scorer
from tiny import alone


def answer(text, truth, source):
    return Answered(text, truth, source, {}, 9, True)


def test_each_row_is_judged_as_its_source_asks():
    asked = [
        (answer("3+4\n#### 7", "7", "openai/gsm8k"), 1.0, Verdict.RIGHT),
        (answer("\\boxed{7}", "7", "openai/gsm8k"), 0.0, Verdict.WRONG),
        (answer("so \\boxed{0.5}", "\\frac{1}{2}", "lighteval/MATH"), 1.0, Verdict.RIGHT),
        (answer("so \\boxed{2}", "\\frac{1}{2}", "lighteval/MATH"), 0.0, Verdict.WRONG),
        (answer("Answer: 34", "34", "math_dapo"), 1.0, Verdict.RIGHT),
        (answer("Answer: 35", "34", "aime2025_x8"), -1.0, Verdict.WRONG),
        (answer("so \\boxed{0.5}", "1/2", "hiyouga/geometry3k"), 1.0, Verdict.RIGHT),
        (answer("Red", "red", "shapes"), 1.0, Verdict.RIGHT),
        (answer("#### 7", None, "openai/gsm8k"), None, Verdict.UNKNOWN),
        (answer("#### 7", "7", "my/own"), None, Verdict.UNKNOWN),
        (answer("#### 7", "7", None), None, Verdict.UNKNOWN),
    ]
    with open_scorer(RewardOptions(name=["data_source"]), 1) as scorer:
        scores = scorer.score([given for given, *_ in asked])
    assert [(score.reward, score.verdict) for score in scores] == [(reward, verdict) for _, reward, verdict in asked]
    assert "no reward is known for data_source 'my/own'" in scores[-2].problem
    assert "the row has no data_source" in scores[-1].problem
    assert {name for name, _ in SOURCES.values()} == {"gsm8k_strict", "math", "exact_match"}


def test_rows_of_gsm8k_do_without_math_verify(monkeypatch):
    monkeypatch.delitem(sys.modules, "posttrain.rewards.maths", raising=False)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    judge = load_by_source()
    assert judge(answer("#### 7", "7", "openai/gsm8k")).value == 1
    missing = judge(answer("7", "7", "lighteval/MATH"))
    assert missing.verdict is Verdict.UNKNOWN and "pip install 'posttrain[math]'" in missing.problem


def test_a_function_gets_further_arguments(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def mine(data_source, solution_str, ground_truth, extra_info, bonus=0):\n    return len(solution_str) + bonus\n"
    )
    asked = [answer("abc", None, None)]
    for kwargs, reward in (({}, 3), ({"bonus": 0.5}, 3.5)):
        with open_scorer(RewardOptions(path=str(file), name=["mine"], kwargs=kwargs), 1) as scorer:
            assert scorer.score(asked)[0].reward == reward
    wrong = {"factor": "an unexpected keyword argument 'factor'", "ground_truth": "reward.kwargs sets ground_truth"}
    for name, said in wrong.items():
        options = RewardOptions(path=str(file), name=["mine"], kwargs={name: 1})
        with pytest.raises(InputError, match=said), open_scorer(options, 1):
            pass


def test_validation_may_draw_otherwise_than_training(monkeypatch):
    asked = []

    def answer_all(answerer, problems, requests, sampling, *rest):
        asked.append((sampling.temperature, sampling.top_p, sampling.top_k))
        raise InterruptedError

    monkeypatch.setattr(validation, "answer_all", answer_all)
    for more in ({}, {"val_top_p": 0.7, "val_top_k": 0}):
        options = RolloutOptions(top_p=0.9, top_k=50, val_temperature=1.0, **more)
        with pytest.raises(InterruptedError):
            validation.accuracy_of([], None, None, alone(), options, 1, print)
    assert asked == [(1.0, 0.9, 50), (1.0, 0.7, 0)]
