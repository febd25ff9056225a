"""From answers to samples and updates, on small hand-made answers."""

import json
import math

import numpy as np
import pytest

from posttrain.config.schema import AlgorithmOptions, DataOptions
from posttrain.data.batches import plan_steps
from posttrain.data.chat import ChatTokenizer
from posttrain.data.tokenized import Report
from posttrain.errors import InputError
from posttrain.loops.answering import Answer, Problem, answered
from posttrain.loops.answers_shown import record
from posttrain.loops.experience import experience, overlong_penalty, plan_updates, samples_of
from posttrain.loops.given import read_completions
from posttrain.loops.prompts import PromptData, _within
from posttrain.records import Completion, Conversation, Segment
from posttrain.rewards.accuracy import Accuracy, Difference, pass_at_k
from posttrain.rewards.score import Score
from posttrain.rewards.verdict import Verdict

RIGHT, WRONG, UNKNOWN = Verdict.RIGHT, Verdict.WRONG, Verdict.UNKNOWN


def segment(*ids, trained=True, known=True):
    logprobs = np.full(len(ids), -0.5, np.float32) if known and trained else None
    return Segment(np.array(ids, dtype=np.int32), logprobs, trained)


def completion(*segments, prompt=(1, 2), stopped=True, earlier=()):
    return Completion(np.array(prompt, dtype=np.int32), list(segments), "text", stopped, tuple(earlier))


def found(rewards, prompts, lengths=None, **algorithm):
    lengths = lengths or [2] * len(rewards)
    problem = Problem(Conversation([{"role": "user", "content": "q"}]), np.array([1, 2], np.int32))
    answers = [completion(segment(*range(3, 3 + length))) for length in lengths]
    scores = [Score(UNKNOWN if r is None else RIGHT if r else WRONG, r, {"x": r}) for r in rewards]
    given = [(prompt, problem, *pair) for prompt, *pair in zip(prompts, answers, scores, strict=True)]
    return experience(given, AlgorithmOptions(**algorithm), 10, {"rollout": 2.0, "reward": 1.0})


def test_what_a_tool_wrote_and_the_prompt_are_not_trained():
    (sample,) = samples_of(5, completion(segment(3, 4), segment(7, 7, 7, trained=False), segment(5, 6)))
    assert sample.ids_T.tolist() == [1, 2, 3, 4, 7, 7, 7, 5, 6]
    assert sample.weights_T.tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1]
    assert sample.signals["rollout_logprobs"].tolist() == [0, 0, -0.5, -0.5, 0, 0, 0, -0.5, -0.5]


def test_an_answer_whose_history_was_rewritten_becomes_several_samples():
    first = completion(segment(3, 4), prompt=(1, 2))
    last = completion(segment(5), prompt=(1, 2, 9), earlier=[first])
    one, two = samples_of(7, last)
    assert (one.ids_T.tolist(), two.ids_T.tolist(), one.row, two.row) == ([1, 2, 3, 4], [1, 2, 9, 5], 7, 7)


def test_lengths_count_what_the_model_wrote_in_all_pieces():
    """A reward of length and evaluation.jsonl too: not what tools wrote, nor the last piece alone."""
    last = completion(segment(5), segment(7, 7, trained=False), segment(6), earlier=[completion(segment(3, 4))])
    problem = Problem(Conversation([{"role": "user", "content": "q"}]), np.array([1, 2], np.int32))
    record = Answer(problem.conversation, last, None, Score(RIGHT, 1.0, {})).as_record()
    assert (last.num_trained, answered(problem, last).num_tokens, record["num_tokens"]) == (4, 4, 4)


def test_answers_without_log_probabilities_have_no_such_signal():
    (sample,) = samples_of(0, completion(segment(3, known=False)))
    assert sample.signals == {}


@pytest.fixture(scope="module")
def prompts(tiny):
    """One problem, asked with the ids 1 and 2."""
    from transformers import AutoTokenizer

    problem = Problem(Conversation([{"role": "user", "content": "q"}]), np.array([1, 2], np.int32))
    chat = ChatTokenizer(AutoTokenizer.from_pretrained(tiny / "model"))
    return PromptData([problem], [], Report(), Report(), plan_steps(1, 1, 1, 1, 0, False), chat, "")


def test_answers_written_to_a_file_are_read_back_as_they_were(prompts, tmp_path):
    first = completion(segment(3, 4), prompt=(1, 2))
    answers = [
        completion(segment(3), segment(7, 7, trained=False), segment(5)),
        completion(segment(5), segment(8, trained=False), segment(6), prompt=(1, 2, 9), earlier=[first]),
        completion(segment(5), prompt=(1, 9)),  # the prompt in another rendering
        completion(stopped=False),  # a prompt that left no room
    ]
    lines = []
    for answer, text in zip(answers, ("a", "a line \u2028 separator", "c", ""), strict=True):
        given = [(0, prompts.train[0], Completion(**{**vars(answer), "text": text}), Score(RIGHT, 1.0, {}))]
        lines.append(record(experience(given, AlgorithmOptions(), 10, {}), 0))
    assert ["pieces" in line for line in lines] == [False, True, True, False]
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    found = read_completions(str(file), prompts, 4)[0]
    assert [answer.text for answer in found] == [line["text"] for line in lines]
    assert [answer.stopped for answer in found] == [True, True, True, False]
    for answer, expected in zip(found, answers, strict=True):
        pairs = zip(samples_of(0, answer), samples_of(0, expected), strict=True)
        for sample, other in pairs:
            assert sample.prompt_length == other.prompt_length
            for name in ("ids_T", "weights_T"):
                np.testing.assert_array_equal(getattr(sample, name), getattr(other, name))
            np.testing.assert_array_equal(sample.signals["rollout_logprobs"], other.signals["rollout_logprobs"])


BAD_ANSWERS = {
    '{"ids": [[3], [4, 5]]}': "ids is [[3], [4, 5]], expected a list of token ids",
    '{"ids": [true, 3]}': "ids is [true, 3], expected",
    '{"ids": [3, 99999]}': "token id 99999 in ids, and this tokenizer has",
    '{"ids": []}': "ids is [], expected",
    '{"ids": [3], "logprobs": ["x"]}': 'logprobs is ["x"], expected a list of finite numbers',
    '{"ids": [3], "logprobs": [NaN]}': "logprobs is [NaN], expected",
    '{"ids": [3], "logprobs": [-1, [2]]}': "logprobs is [-1, [2]], expected",
    '{"ids": [3], "logprobs": [-1, -2]}': "2 logprobs for 1 ids",
    '{"ids": [3], "trained": ["no"]}': 'trained is ["no"], expected',
    '{"ids": [3], "row": true}': "row True is none of the 1 prompts",
    '{"pieces": [[3]]}': "pieces is [[3]], expected a list of objects",
    '{"pieces": [{"ids": [3]}]}': "prompt_ids is null, expected a list of token ids",
    '{"text": ""}': "the text is empty",
}


def test_answers_that_cannot_be_read_are_said_with_their_line(prompts, tmp_path):
    file = tmp_path / "bad.jsonl"
    vars(prompts)["end_ids"] = []  # as of a template without an end token
    for line, said in BAD_ANSWERS.items():
        file.write_text(f'{{"row": 0, "ids": [3], "logprobs": [-1]}}\n{{"row": 0, {line[1:]}\n')
        with pytest.raises(InputError) as error:
            read_completions(str(file), prompts, 4)
        assert f"{file} line 2: {said}" in str(error.value), line


def test_groups_are_dealt_whole_to_updates_and_weights_are_made_of_whole_answers():
    answers = found([1, 0, 1, 0, 1, 0], [4, 4, 9, 9, 2, 2], lengths=[1, 2, 3, 4, 5, 6])
    usable = np.array([True, True, True, False, True, True])
    first, second = plan_updates(answers, usable, 2, "seq-mean-token-mean", 10, np.array([2, 0, 1]))
    assert (first.numbers, second.numbers) == ([0, 1, 4, 5], [2])
    np.testing.assert_allclose(first.weights, [1, 1 / 2, 1 / 5, 1 / 6])
    assert (first.total_weight, second.total_weight) == (4, 1)


def test_the_end_of_long_answers_costs_in_a_straight_line():
    lengths = np.array([4, 6, 7, 8, 10])
    np.testing.assert_allclose(overlong_penalty(lengths, 10, 4, 2.0), [0, 0, 0.5, 1.0, 2.0])
    shaped = found([1, 1], [0, 0], lengths=[10, 4], overlong_buffer_tokens=4, overlong_penalty=0.5)
    np.testing.assert_allclose(shaped.rewards_N, [0.5, 1.0])


def test_metrics_say_what_the_answers_were():
    answers = found([1, 0, None, 1, 1, 1], [0, 0, 0, 3, 3, 3], lengths=[1, 2, 3, 4, 5, 6])
    told = answers.metrics()
    assert told["reward_mean"] == pytest.approx(4 / 5) and told["rewards_unknown"] == 1
    assert told["no_signal_share"] == 0.5 and told["right_share"] == pytest.approx(4 / 5)
    assert told["answer_tokens_mean"] == 3.5 and told["rollout_tokens_per_second"] == 21 / 2
    assert math.isnan(answers.rewards_N[2])


def test_first_groups_keep_whole_groups_in_their_order():
    answers = found([1, 0, 1, 0, 1, 0], [4, 9, 4, 9, 2, 2])
    assert answers.first_groups(2).prompts_N.tolist() == [4, 9, 4, 9]
    assert answers.taken(answers.signal_N).prompts_N.tolist() == [2, 2]
    assert len(answers.taken(np.zeros(6, dtype=bool)).first_groups(3)) == 0


def test_a_prompt_that_is_too_long_is_told_with_the_option_that_decides():
    problem = Problem(Conversation([{"role": "user", "content": "q"}]), np.zeros(9, np.int32), "rows.jsonl row 3")
    limits = {
        "data.max_length - 1 = 8": DataOptions(max_length=9),
        "data.max_prompt_length = 8": DataOptions(max_prompt_length=8),
    }
    for said, data in limits.items():
        with pytest.raises(InputError, match=f"row 3 has 9 tokens, more than {said}"):
            _within([problem], Report(), 8, data, "data.train_files")


def test_pass_at_k_by_hand():
    assert pass_at_k(1, 4, 1) == 0.25
    assert pass_at_k(1, 4, 2) == 0.5  # of 6 pairs 3 hold the right one
    assert pass_at_k(0, 4, 4) == 0 and pass_at_k(1, 4, 4) == 1


def test_accuracy_over_several_answers_counts_problems_not_answers():
    told = Accuracy.of([RIGHT, RIGHT, WRONG, WRONG, *[WRONG] * 4, *[RIGHT] * 4, *[UNKNOWN] * 4], answers_a_problem=4)
    assert (told.share, told.num_problems, told.num_unknown) == (0.5, 4, 4)
    assert told.pass_at == {2: pytest.approx((5 / 6 + 0 + 1) / 3), 4: pytest.approx(2 / 3)}
    half = 1.959964 * 0.5 / math.sqrt(3)
    assert (told.low, told.high) == (0, pytest.approx(min(0.5 + half, 1)))
    odd = Accuracy.of([RIGHT, WRONG, WRONG, UNKNOWN], answers_a_problem=2)
    assert (odd.num_judged, odd.pass_at) == (3, {})


@pytest.mark.parametrize("all_alike", [RIGHT, WRONG])
def test_where_problems_do_not_differ_the_interval_is_wilsons_of_so_many_problems(all_alike):
    told = Accuracy.of([*[all_alike] * 16, *[UNKNOWN] * 4], answers_a_problem=4)
    of_four = Accuracy(4 if all_alike is RIGHT else 0, 4)
    assert (told.low, told.high) == (of_four.low, of_four.high) and told.high - told.low == pytest.approx(
        0.49, abs=0.01
    )
    alone = Accuracy.of([all_alike] * 4, answers_a_problem=4)
    assert alone.high - alone.low > 0.7


def test_a_difference_is_paired_by_problem():
    before, after = [RIGHT, WRONG, WRONG, UNKNOWN, WRONG], [RIGHT, RIGHT, WRONG, RIGHT, RIGHT]
    gain = Difference.of(before, after)
    assert gain.mean == 0.5
    assert gain.high - gain.mean == pytest.approx(1.959964 * math.sqrt((4 * 0.25 / 3) / 4))


def test_groups_may_be_filtered_by_the_score_or_the_verdict():
    algorithm = {"filter_groups": True, "overlong_buffer_tokens": 4}
    for metric, kept in {"reward": [4, 4, 9, 9, 2, 2], "score": [9, 9, 2, 2], "right": [9, 9]}.items():
        answers = found(
            [1, 1, 1, 0, 1, 0.5], [4, 4, 9, 9, 2, 2], lengths=[10, 4, 4, 4, 4, 4], filter_metric=metric, **algorithm
        )
        assert answers.taken(answers.signal_N).prompts_N.tolist() == kept, metric
        assert answers.joined(answers).signal_N.tolist() == [*answers.signal_N, *answers.signal_N]
