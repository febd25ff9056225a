"""The rows of step k are a function of (data, seed, k); micro-batches hold each row once, within their limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.batches import Schedule, plan_steps, split
from posttrain.errors import InputError


def test_each_epoch_takes_every_row_once_the_tail_included():
    schedule = Schedule(num_rows=23, batch_size=5, num_steps=10, seed=1)
    epochs = [np.concatenate([schedule.rows(step) for step in range(e * 5, e * 5 + 5)]) for e in (0, 1)]
    for rows in epochs:
        assert sorted(rows) == list(range(23))
    assert epochs[0].tolist() != epochs[1].tolist()
    assert len(schedule.rows(4)) == 3


def test_rows_of_a_step_do_not_depend_on_what_was_asked_before_or_on_the_length_of_the_run():
    long, short = Schedule(50, 8, 100, seed=3), Schedule(50, 8, 4, seed=3)
    backwards = [long.rows(step).tolist() for step in reversed(range(40))]
    assert backwards[::-1] == [long.rows(step).tolist() for step in range(40)]
    assert long.rows(2).tolist() == short.rows(2).tolist()
    assert long.rows(2).tolist() != Schedule(50, 8, 100, seed=4).rows(2).tolist()


def test_without_shuffling_the_files_order_is_kept():
    schedule = Schedule(6, 4, 4, shuffle=False)
    assert [schedule.rows(step).tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5], [0, 1, 2, 3]]


def test_steps_instead_of_epochs_and_a_batch_larger_than_the_data():
    assert plan_steps(10, 4, 3, None, 0, True).num_steps == 9
    assert plan_steps(10, 4, 3, 5, 0, True).num_steps == 5
    with pytest.raises(InputError, match="train_batch_size=11"):
        plan_steps(10, 11, 1, None, 0, True)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    num_ranks=st.integers(1, 5),
    max_rows=st.none() | st.integers(1, 6),
    max_tokens=st.none() | st.integers(50, 120),
)
def test_a_split_holds_each_document_once_within_its_limits(lengths, num_ranks, max_rows, max_tokens):
    ranks = split(lengths, num_ranks, max_rows, max_tokens)
    assert len(ranks) == num_ranks and len({len(rank) for rank in ranks}) == 1 and ranks[0]
    assert sorted(i for rank in ranks for documents in rank for i in documents) == list(range(len(lengths)))
    for documents in (documents for rank in ranks for documents in rank):
        assert max_rows is None or len(documents) <= max_rows
        assert max_tokens is None or sum(lengths[i] for i in documents) <= max_tokens


def test_ranks_get_about_equally_many_tokens():
    lengths = np.random.default_rng(0).integers(10, 500, 256).tolist()
    loads = [sum(lengths[i] for documents in rank for i in documents) for rank in split(lengths, 4, max_tokens=4096)]
    assert max(loads) < 1.05 * min(loads)


def test_a_document_longer_than_a_micro_batch_is_refused_with_what_to_do():
    with pytest.raises(InputError, match="max_tokens_per_gpu=40"):
        split([50], 1, max_tokens=40)
