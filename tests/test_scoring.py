"""Rewards as the loops ask for them: several at once, and functions of a user's own that do what they should not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.config.compose import compose
from posttrain.config.schema import RewardOptions
from posttrain.data.formats import Columns, conversation_of
from posttrain.errors import InputError
from posttrain.rewards.score import Answered, Verdict, open_scorer

RIGHT, WRONG, UNKNOWN = Verdict.RIGHT, Verdict.WRONG, Verdict.UNKNOWN

OWN = """
import ctypes, os, subprocess, sys, time
from decimal import Decimal
import numpy as np
import beside

class Odd:
    def __float__(self): return 1.0

def compute_score(data_source, solution_str, ground_truth, extra_info):
    print("printed", "x" * 10_000)
    sys.stdout.flush()
    return eval(solution_str)

def hang():
    child = subprocess.Popen(["sleep", "1000"])
    open(beside.PIDS, "a").write(f"{os.getpid()} {child.pid} ")
    time.sleep(1000)

def fail():
    raise ValueError("no way")

def deep():
    return deep()

def meeting(data_source, solution_str, ground_truth, extra_info):
    number, partner = extra_info["number"], extra_info["partner"]
    open(f"{beside.PIDS}-{number}", "w").close()
    while partner is not None and not os.path.exists(f"{beside.PIDS}-{partner}"):
        time.sleep(0.01)
    return number

def modules(data_source, solution_str, ground_truth, extra_info):
    return {"score": 1, **{name: name in sys.modules for name in ("torch", "transformers", "pydantic", "posttrain")}}

async def waiting(data_source, solution_str, ground_truth, extra_info): ...

def narrow(solution_str): ...

number = 3
"""
FAIL_LINE = OWN.splitlines().index('    raise ValueError("no way")') + 1

# what a function gives, the reward that it becomes, the verdict, and what is said
RETURNED = [
    ("1", 1.0, RIGHT, None),
    ("0.75", 0.75, WRONG, None),
    ("-2", -2.0, WRONG, None),
    ("True", 1.0, RIGHT, None),
    ("False", 0.0, WRONG, None),
    ("np.float32(1)", 1.0, RIGHT, None),
    ("np.bool_(True)", 1.0, RIGHT, None),
    ("np.array(0.5)", 0.5, WRONG, None),
    ("Decimal('1.5')", 1.5, RIGHT, None),
    ("{'score': 0.5, 'acc': True, 'length': 3, 'pred': 'text', 'bad': float('nan')}", 0.5, RIGHT, None),
    ("{'score': 1.0, 'acc': 0}", 1.0, WRONG, None),
    ("float('nan')", None, UNKNOWN, "it returned nan (float), expected a finite number or a dict with one as 'score'"),
    ("np.float64('nan')", None, UNKNOWN, "it returned nan"),
    ("float('-inf')", None, UNKNOWN, "it returned -inf"),
    ("10 ** 400", None, UNKNOWN, "it returned 1000"),
    ("1j", None, UNKNOWN, "it returned 1j (complex)"),
    ("'0.5'", None, UNKNOWN, "it returned the text '0.5'"),
    ("None", None, UNKNOWN, "it returned None"),
    ("[1.0]", None, UNKNOWN, "it returned a list"),
    ("np.ones(1)", None, UNKNOWN, "it returned a ndarray"),
    ("Odd()", None, UNKNOWN, "it returned a Odd"),
    ("{'reward': 1}", None, UNKNOWN, "it returned a dict without 'score', with reward"),
    ("{'score': None}", None, UNKNOWN, "it returned None"),
    ("fail()", None, UNKNOWN, f"it raised ValueError: no way (line {FAIL_LINE} of own.py)"),
    ("deep()", None, UNKNOWN, "it raised RecursionError"),
    ("input()", None, UNKNOWN, "it raised EOFError"),
    ("sys.exit(4)", None, UNKNOWN, "it raised SystemExit: 4"),
    ("os._exit(3)", None, UNKNOWN, "its process ended with exit code 3"),
    ("ctypes.string_at(0)", None, UNKNOWN, "its process was ended by SIGSEGV"),
    ("os.kill(os.getpid(), 9)", None, UNKNOWN, "its process was ended by SIGKILL"),
    ("os.closerange(3, 100)", None, UNKNOWN, "its process"),
    ("hang()", None, UNKNOWN, "time limit of 4 s"),
    ("1", 1.0, RIGHT, None),
]  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "beside.py").write_text(f"PIDS = {str(folder / 'pids')!r}\n")
    (folder / "own.py").write_text(OWN)
    return folder / "own.py"


def answered(text: str = "", truth: str | None = "7", num_tokens: int = 3, **extra_info: object) -> Answered:
    return Answered(text, truth, "source", extra_info, num_tokens, True)


def scores(answers: list[Answered], num_processes: int | None = None, **options: object):
    with open_scorer(RewardOptions(**options), num_processes) as scorer:
        return scorer.score(answers)


def pids(own: Path) -> list[int]:
    file = own.with_name("pids")
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def is_alive(pid: int) -> bool:
    """Not counting one that ended and that nobody has asked about yet."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


@pytest.mark.parametrize("num_processes", [1, 3])
def test_whatever_a_function_does_costs_its_own_answer_alone(own, num_processes, capfd):
    own.with_name("pids").unlink(missing_ok=True)
    start = time.monotonic()
    answers = [answered(code) for code, *_ in RETURNED]
    found = scores(answers, num_processes, path=str(own), timeout_seconds=4)
    for score, (code, reward, verdict, problem) in zip(found, RETURNED, strict=True):
        assert (score.reward, score.verdict, score.parts["compute_score"]) == (reward, verdict, reward), (code, score)
        assert (score.problem is None) == (problem is None) == (reward is not None), (code, score)
        assert score.problem is None or score.problem.startswith(f"compute_score: {problem}"), (code, score)
    assert time.monotonic() - start < 60
    with_keys = next(score for score in found if len(score.parts) > 2)
    assert with_keys.parts == {"compute_score": 0.5, "compute_score/acc": 1.0, "compute_score/length": 3.0}
    assert len(pids(own)) == 2 and wait_until(lambda: not any(map(is_alive, pids(own)))), "what hung lives on"
    said = capfd.readouterr()
    assert "printed" not in said.out and "printed" in said.err


def test_answers_keep_their_order_and_are_judged_side_by_side(own):
    partners = {0: 1, 1: 2, 2: 0, 17: 39, 39: 17}  # judged at the same time, or never
    answers = [answered(number=n, partner=partners.get(n)) for n in range(40)]
    heard: list[int] = []
    with open_scorer(RewardOptions(path=str(own), name=["meeting"]), 3) as scorer:
        assert [score.reward for score in scorer.score(answers, heard.append)] == [float(n) for n in range(40)]
        assert [score.reward for score in scorer.score(answers[:3])] == [0.0, 1.0, 2.0]
        assert scorer.score([]) == []
    assert sum(heard) == 40


def test_workers_import_neither_torch_nor_the_options(own):
    (score,) = scores([answered()], path=str(own), name=["modules"])
    assert score.parts == {
        "modules": 1.0, "modules/torch": 0.0, "modules/transformers": 0.0, "modules/pydantic": 0.0, "modules/posttrain": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_run(own, ending, tmp_path):
    own.with_name("pids").unlink(missing_ok=True)
    script = (
        "from posttrain.config.schema import RewardOptions\n"
        "from posttrain.rewards.score import Answered, open_scorer\n"
        f"with open_scorer(RewardOptions(path={str(own)!r}, timeout_seconds=100), 2) as scorer:\n"
        "    scorer.score([Answered('hang()', None, None, {}, 1, True)] * 2)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as run:
        assert wait_until(lambda: len(pids(own)) == 4)
        assert all(map(is_alive, pids(own)))
        run.send_signal(ending)
    assert wait_until(lambda: not any(map(is_alive, pids(own))))


def test_a_scorer_goes_on_after_an_interrupted_call(own):
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with open_scorer(RewardOptions(path=str(own)), 2) as scorer:
        scorer.score([answered("time.sleep(0.5) or 1")] * 4)  # until both are there
        with pytest.raises(KeyboardInterrupt):
            scorer.score([answered("1"), answered("time.sleep(0.5) or 2"), answered("3")], interrupt)
        assert [score.reward for score in scorer.score([answered("4"), answered("time.sleep(1) or 5")])] == [4.0, 5.0]


BROKEN = [
    (
        {"path": "absent.py"},
        ["reward.path=absent.py: there is no such file", "compute_score(data_source, solution_str"],
    ),
    ({"name": ["grade"]}, ["reward.name=grade", "has no such function", "compute_score", "meeting"]),
    ({"name": ["number"]}, ["reward.name=number", "has no such function"]),
    ({"name": ["waiting"]}, ["reward.name=waiting", "is async", "expected a plain function"]),
    ({"name": ["narrow"]}, ["reward.name=narrow", "takes (solution_str)", "Expected (data_source, solution_str"]),
]


@pytest.mark.parametrize(("options", "said"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_function_that_cannot_be_asked_is_an_error_at_once(own, options, said):
    with pytest.raises(InputError) as error, open_scorer(RewardOptions(**{"path": str(own), **options})):
        pass
    assert all(part in str(error.value) for part in said), error.value


FILES = [
    ("x = 1\nimport absent_package\n", ["cannot be imported", "No module named 'absent_package'", "line 2 of bad.py"]),
    ("def f(:\n", ["cannot be imported", "SyntaxError", "line 1 of bad.py"]),
    ("\n\n1 / 0\n", ["cannot be imported", "ZeroDivisionError: division by zero (line 3 of bad.py)"]),
    ("import os\nos._exit(5)\n", ["while the rewards were loaded, its process ended with exit code 5"]),
]


@pytest.mark.parametrize(("text", "said"), FILES, ids=[said[0][:20] + text[:8] for text, said in FILES])
def test_a_file_that_does_not_import_is_quoted_with_its_line(tmp_path, text, said):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(InputError) as error, open_scorer(RewardOptions(path=str(tmp_path / "bad.py"))):
        pass
    assert all(part in str(error.value) for part in said), error.value


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reward.name=gsm8k_strickt"], ["there is no reward 'gsm8k_strickt', nearest is gsm8k_strict", "reward.path"]),
        (["reward.name=[math,length,math]"], ["reward.name has math twice", "reward.weights"]),
        (["reward.name=[math,length]", "reward.weights=[1]"], ["reward.weights has 1 numbers, and reward.name 2: math, length"]),
        (["reward.weights=[1,2]"], ["reward.weights has 2 numbers, and reward.name 1: gsm8k_strict"]),
        (["reward.format_pattern='(a'"], ["reward.format_pattern", "is no regular expression"]),
        (["reward.timeout_seconds=0"], ["reward.timeout_seconds", "float > 0"]),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_said_before_anything_is_loaded(arguments, said):
    with pytest.raises(InputError) as error:
        compose(arguments)
    assert all(part in str(error.value) for part in said), error.value


def test_options_of_rewards_that_are_not_used_are_said():
    given = ["path=x.py", "right_at=2", "answer_mark=A:", "format_pattern=a", "length_target=9", "timeout_seconds=1", "num_workers=1"]  # fmt: skip

    def ignored(*names: str) -> set[str]:
        resolved = compose([f"reward.name=[{','.join(names)}]", *(f"reward.{option}" for option in given)])
        return {note["key"].removeprefix("reward.") for note in resolved.ignored if note["key"].startswith("reward.")}

    everywhere = {"path", "right_at"}
    rest = {"timeout_seconds", "num_workers"}
    assert ignored("gsm8k_strict") == everywhere | {"format_pattern", "length_target"} | rest
    assert ignored("gsm8k_flexible", "length") == everywhere | {"answer_mark", "format_pattern"} | rest
    assert ignored("math", "format") == everywhere | {"answer_mark", "length_target"}
    assert ignored("format") == {"path", "answer_mark", "length_target"}
    assert ignored("compute_score") == {"answer_mark", "format_pattern", "length_target"}


def test_verls_names_for_a_function_are_understood():
    reward = compose(["custom_reward_function.path=x.py", "custom_reward_function.name=grade"]).config.reward
    assert (reward.path, reward.names) == ("x.py", ["grade"])


def test_a_reward_is_the_weighted_sum_of_its_parts_and_the_verdict_that_of_the_judge():
    answers = [
        answered("3+4\n#### 7", num_tokens=15),
        answered("7", num_tokens=5),
        answered("so\n#### 8", truth="seven"),
    ]
    found = scores(answers, name=["format", "gsm8k_flexible", "length"], weights=[0.1, 1, 0.2], length_target=10)
    assert [score.reward for score in found] == [pytest.approx(1.2), pytest.approx(1.2), None]
    assert [score.verdict for score in found] == [RIGHT, RIGHT, UNKNOWN]
    assert found[0].parts == {"format": 1.0, "gsm8k_flexible": 1.0, "length": 0.5}
    assert found[2].parts == {"format": 1.0, "gsm8k_flexible": None, "length": 1.0}
    assert found[2].problem == "gsm8k_flexible: the ground truth 'seven' is no number"
    unweighted = scores(answers, name=["format", "gsm8k_flexible"], weights=[1, 0])
    assert [score.reward for score in unweighted] == [1.0, 0.0, 1.0]


def test_without_a_judge_the_first_reward_is_measured():
    answers = [answered(num_tokens=n) for n in (0, 10, 15, 20, 40)]
    assert [score.reward for score in scores(answers, name=["length"], length_target=10)] == [1, 1, 0.5, 0, 0]
    half = scores(answers, name=["length", "format"], length_target=10, right_at=0.5)
    assert [score.verdict for score in half] == [RIGHT, RIGHT, RIGHT, WRONG, WRONG]
    assert {score.parts["format"] for score in half} == {0.0}


FORMATS = [
    ("3+4=7\n#### 7", 1), ("#### 7", 1), ("a\n#### $1,234.50\n", 1), ("a\n#### -3.", 1), ("a\n#### 25%", 1),
    ("", 0), ("7", 0), ("a #### 7", 0), ("#### 7\nmore", 0), ("#### seven", 0), ("####", 0), ("#### 7 8", 0),
]  # fmt: skip


def test_format_wants_the_last_line_to_be_the_answer_or_the_pattern_that_is_given(own):
    assert [int(score.reward) for score in scores([answered(text) for text, _ in FORMATS], name=["format"])] == [
        fits for _, fits in FORMATS
    ]
    marked = scores([answered("a\nA: 7"), answered("#### 7")], name=["format"], answer_mark="A:")
    assert [score.reward for score in marked] == [1.0, 0.0]
    thinking = [answered("<think>3+4\nis 7</think>7"), answered("7"), answered("a" * 40 + "!")]
    pattern = r"<think>.*</think>.+|(a+)+b"
    found = scores(thinking, name=["format"], format_pattern=pattern, timeout_seconds=4)
    assert [score.reward for score in found] == [1.0, 0.0, None]
    assert found[2].problem == "format: time limit of 4 s"


def test_cheap_rewards_start_no_process_and_judge_a_megabyte_in_linear_time(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    names = ["gsm8k_strict", "gsm8k_flexible", "format", "length"]
    texts = [
        piece * (2**20 // len(piece)) for piece in ("a", "\n#### 1", "#### 1\n", "\n####9,", "\n", "9", "\n#### 9.")
    ]
    start = time.monotonic()
    assert len(scores([answered(text) for text in texts], name=names)) == len(texts)
    assert time.monotonic() - start < 60


def test_labels_of_real_solutions_agree_with_the_reward_when_told_their_mark(shared_data):
    lines = (shared_data / "rewards" / "gsm8k_labelled_solutions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = scores([answered(row["solution"], row["gold_answer"]) for row in rows], answer_mark="A:")
    assert [score.verdict is RIGHT for score in found] == [row["is_correct"] for row in rows]
    assert {score.reward for score in found} == {0.0, 1.0}


MATHS = [
    (r"first \boxed{1}, then \boxed{\frac{1}{2}}", "0.5", RIGHT),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", RIGHT),
    (r"\boxed{1,234}", "1234", RIGHT),
    (r"\boxed{18}", r"\$18", RIGHT),
    (r"\boxed{18}", r"so it is \boxed{18}", RIGHT),
    (r"\boxed{\{1,2\}}", r"\{2,1\}", RIGHT),
    (r"\boxed{east}", r"\text{east}", RIGHT),
    (r"\boxed{seat}", "east", WRONG),
    ("the answer is 0.5", r"\frac12", RIGHT),
    (r"\boxed{5", "6", WRONG),
    (r"\boxed{}", "5", WRONG),
    (r"\boxed{1/0}", "5", WRONG),
    (r"\boxed{5}", "1/0", UNKNOWN),
    ("", "5", WRONG),
    ("gibberish", "5", WRONG),
    (r"\boxed{5}", "", UNKNOWN),
    (r"\boxed{5}", "???", UNKNOWN),
    ("???", "???", UNKNOWN),
    (r"\boxed{\frac{1}{}", r"\frac{1}{", UNKNOWN),
    (r"\boxed{1/0}", "1/0", UNKNOWN),
    (r"\boxed{5}", None, UNKNOWN),
    (r"\boxed{10^{10^{10}}}", "5", UNKNOWN),  # hangs
    (r"\boxed{5}", "5", RIGHT),
]


def test_math_compares_expressions_and_knows_what_it_cannot_read():
    pytest.importorskip("math_verify")
    answers = [answered(text, truth) for text, truth, _ in MATHS]
    found = scores(answers, 2, name=["math"], timeout_seconds=8)
    wrong = [(case, score) for case, score in zip(MATHS, found, strict=True) if score.verdict is not case[2]]
    assert wrong == []
    assert "math: time limit of 8 s" in [score.problem for score in found]
    assert all((score.reward is None) == (score.verdict is UNKNOWN) for score in found)


def test_a_row_brings_what_a_reward_is_told():
    row = {"prompt": "3+4?", "response": "7", "data_source": "sums", "extra_info": {"index": 3, "tags": ["a"]}}
    assert conversation_of(row, Columns()).extra_info == {"index": 3, "tags": ["a"]}
    for extra_info in (None, "text", []):
        assert conversation_of({**row, "extra_info": extra_info}, Columns()).extra_info == {}


def test_evaluate_asks_a_function_of_ones_own_on_two_processes(posttrain, tiny):
    (posttrain.folder / "my.py").write_text(
        "import time\n"
        "def grade(data_source, solution_str, ground_truth, extra_info):\n"
        "    print('judging', data_source)\n"
        "    index = extra_info['index']\n"
        "    if index == 3: time.sleep(1000)\n"
        "    if index == 4: raise KeyError('four')\n"
        "    return {'score': index, 'truth': float(ground_truth)}\n"
    )
    options = ["reward.path=my.py", "reward.name=[grade,length]", "reward.weights=[1,10]", "reward.timeout_seconds=2"]
    given = ["--model", tiny / "model", "--test_file", tiny / "test.parquet", "--limit", "7", "--output", "out.jsonl"]
    done = posttrain("evaluate", *given, *options, "rollout.max_new_tokens=4", "trainer.n_gpus_per_node=2", "--json")
    told = json.loads(done.stdout)
    assert (told["num_problems"], told["num_correct"], told["num_unknown"]) == (7, 4, 2)
    assert "2 answers could not be told, such as: grade: " in done.stderr and "means: grade 2.8" in done.stderr
    assert "judging gsm8k_sft" in done.stderr
    lines = [json.loads(line) for line in (posttrain.folder / "out.jsonl").read_text().splitlines()]
    assert [line["verdict"] for line in lines] == ["wrong", "right", "right", "unknown", "unknown", "right", "right"]
    assert [line["reward"] for line in lines] == [10, 11, 12, None, None, 15, 16]
    assert lines[3]["problem"] == "grade: time limit of 2 s"
    assert lines[4]["problem"] == "grade: it raised KeyError: 'four' (line 6 of my.py)"
    assert "problem" not in lines[0]
    assert lines[1]["rewards"] == {"grade": 1, "grade/truth": float(lines[1]["ground_truth"]), "length": 1}
