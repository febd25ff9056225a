"""The cache of tokenized rows: the same whoever makes it, keyed by what matters, truncated as asked."""

import json
from functools import partial

import numpy as np
import pytest

from posttrain.data import workers
from posttrain.data.formats import Columns
from posttrain.data.sources import find_sources
from posttrain.data.tokenized import load_tokenized
from posttrain.data.truncation import truncated
from posttrain.errors import InputError
from posttrain.loops.training_data import make_chat


@pytest.fixture
def chat(tiny):
    return partial(make_chat, str(tiny / "model"), None, None, False)


@pytest.fixture
def load(tiny, tmp_path, chat):
    def load(files=(tiny / "train.parquet",), columns=Columns(), make=chat, cache=tmp_path / "cache", **options):
        return load_tokenized(
            find_sources([str(f) for f in files], "data.train_files"), columns, make, str(cache), **options
        )

    return load


def test_workers_make_the_same_cache_as_one_process(load, tmp_path, monkeypatch):
    here = load(num_workers=0)
    monkeypatch.setattr(workers, "ROWS_BEFORE_WORKERS", 20)
    monkeypatch.setattr(workers, "ROWS_A_CHUNK", 16)
    there = load(num_workers=2, cache=tmp_path / "other")
    for name in ("ids", "weights", "begins_N", "ends_N", "rows_N"):
        assert np.array_equal(getattr(here, name), getattr(there, name)), name


def test_a_second_run_reads_the_cache_and_a_changed_row_makes_another(load, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1?", "response": "2"}) + "\n")
    counted = []
    first = load([rows], progress=counted.append)
    second = load([rows], progress=counted.append)
    assert sum(counted) == 1 and first.fingerprint == second.fingerprint
    rows.write_text(json.dumps({"prompt": "1+1?", "response": "11"}) + "\n")
    assert load([rows], progress=counted.append).fingerprint != first.fingerprint
    assert sum(counted) == 2


def test_the_cache_is_keyed_by_template_and_columns(load, tiny, tmp_path):
    template = tmp_path / "other.jinja"
    template.write_text((tiny / "model" / "chat_template.jinja").read_text() + "{# another #}")
    other = partial(make_chat, str(tiny / "model"), str(template), None, False)
    prompts = Columns(prompt="extra_info.question", response="response")
    assert len({load().fingerprint, load(make=other).fingerprint, load(columns=prompts).fingerprint}) == 3


def test_an_interrupted_build_leaves_nothing_that_is_taken_for_a_cache(load, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(rows):
        raise Killed

    with pytest.raises(Killed):
        load(progress=kill)
    assert list((tmp_path / "cache" / "tokenized").iterdir()) == []
    assert len(load()) == 200


def test_bad_rows_are_counted_with_their_places_or_stop(load, tmp_path):
    rows = tmp_path / "rows.jsonl"
    good = {"prompt": "1+1?", "response": "2"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in [good, {**good, "response": None}, good]))
    data = load([rows])
    assert data.rows_N.tolist() == [0, 2]
    assert data.report.rows_dropped == {"no answer": 1} and "rows.jsonl row 1" in data.report.places["no answer"][0]
    with pytest.raises(InputError, match=r"row 1"):
        load([rows], drop_invalid=False)


@pytest.mark.parametrize("how", ["left", "right"])
def test_truncation_cuts_the_end_it_names(load, how):
    whole, limit = load(), 40
    cut = truncated(whole, limit, how)
    by_row = {int(row): i for i, row in enumerate(whole.rows_N)}
    for i in range(len(cut)):
        before, after = whole[by_row[cut[i].row]].ids_T, cut[i].ids_T
        assert len(after) <= limit
        assert after.tolist() == (before[-limit:] if how == "left" else before[:limit]).tolist()
    counts = [int(cut[i].weights_T[1:].sum()) for i in range(len(cut))]
    assert cut.num_trained_N.tolist() == counts and min(counts) > 0
    assert cut.report.rows_used + sum(cut.report.rows_dropped.values()) == 200


def test_truncation_error_and_drop(load, tiny):
    whole = load()
    limit = int(np.percentile(whole.lengths_N, 50))
    over = int((whole.lengths_N > limit).sum())
    with pytest.raises(InputError, match=f"{over} of 200 rows"):
        truncated(whole, limit, "error")
    dropped = truncated(whole, limit, "drop")
    assert dropped.report.places["longer than data.max_length"][0].startswith(f"{tiny / 'train.parquet'} row ")
    assert len(dropped) == 200 - over and dropped.report.rows_dropped == {"longer than data.max_length": over}
    with pytest.raises(InputError, match="No row is left"):
        truncated(whole, 2, "drop")


def test_a_row_is_named_by_its_file_and_its_number_there(load, tiny):
    files = (tiny / "test.parquet", tiny / "train.parquet")
    report = load(files).report
    assert [report.place_of(row) for row in (39, 40, 239)] == [
        f"{files[0]} row 39", f"{files[1]} row 0", f"{files[1]} row 199"
    ]  # fmt: skip


def test_lengths_and_trained_counts_are_those_of_the_samples(load):
    data = load()
    samples = [data[i] for i in range(len(data))]
    assert data.lengths_N.tolist() == [len(s) for s in samples]
    assert data.num_trained_N.tolist() == [int(s.weights_T[1:].sum()) for s in samples]
