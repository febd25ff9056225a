"""The audit finds each kind of fault in the row that has it, and nothing in sound rows; cleaning leaves out just those."""

import json
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data import sources as reading
from posttrain.data import workers
from posttrain.data.audit import chunk, duplicates
from posttrain.data.audit.arithmetic import disagreeing_answer, disagreeing_truth, wrong_calculations
from posttrain.data.audit.audit import audit
from posttrain.data.audit.chunk import Checks
from posttrain.data.audit.clean import checked_kinds, clean
from posttrain.data.audit.duplicates import near_duplicates, signatures
from posttrain.data.audit.findings import DROPPED_BY_DEFAULT, EXAMPLES_A_KIND
from posttrain.data.audit.report import report
from posttrain.data.audit.rows import check_conversation
from posttrain.data.chat import ChatTokenizer
from posttrain.data.formats import Columns
from posttrain.data.sources import find_sources
from posttrain.errors import InputError, RunError
from posttrain.loops.training_data import make_chat
from posttrain.records import Conversation, Tokens


def turns(*texts, roles=("user", "assistant"), system=None):
    messages = [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


PROMPT = (
    "You are a helpful teacher who explains each step with patience and care, and who never gives a bare answer. " * 5
)
LONG = (
    "Mira walks to the market with nine baskets and sells all of them before noon, so she returns home with empty hands"
)
SOUND = [
    {"question": "How many legs have 3 cats?", "answer": "3 cats have 3*4=<<3*4=12>>12 legs.\n#### 12"},
    {"question": "Half of 5?", "answer": "5/2 = <<5/2=2.5>>2.5, a third <<5/3=1.67>>1.67, cut <<5/3=1.66>>1.66\n#### 2.5"},
    {"question": "The cost in cents?", "answer": "It costs 1/4 = $<<1/4=.25>>.25\n#### 25"},
    {"question": "20% of 1,000?", "answer": "That is $<<20%*1,000=200>>200 of it, for $1 000\n#### 200"},
    turns("Do you like tea?", "yes", "And coffee?", "yes", system=PROMPT),
    turns("Which colour has the sky?", "Blue, on most days.", system=PROMPT),
    turns("Write a heading.", "#### 3. How to begin\nFirst, sit down."),
    turns("Wie heißt du? 👩\u200d💻", "می\u200cروم\tund\r\n Ende"),
    {"messages": [
        {"role": "user", "content": "Which weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "sunny"}]},
]  # fmt: skip
# row -> what is found in it, beside nothing else
FAULTS = [
    ({"question": "q", "answer": None}, {"unusable": "no answer: the answer is null"}),
    ({"other": "q"}, {"unusable": "the columns are other"}),
    ({"question": "a", "answer": "1+1=<<1+1=3>>3\n#### 3"}, {"wrong-arithmetic": "<<1+1=3>>, where 1+1 is 2"}),
    ({"question": "b", "answer": "1+1=<<1+1=2>>2\n#### 5"}, {"answer-mismatch": "#### 5, and the work ends with 2"}),
    ({"question": "c", "answer": "#### 5", "reward_model": {"ground_truth": "6"}}, {"truth-mismatch": "ground truth is 6"}),
    ({"question": "d\x07", "answer": "e"}, {"control-character": "message 0 (user): U+0007 at character 1"}),
    ({"question": "h", "answer": "\u200btwo"}, {"control-character": "U+200B zero width space"}),
    ({"question": "i", "answer": " \n"}, {"empty-turn": "message 1 (assistant) is ' \\n'"}),
    ({"question": "j!", "answer": "j!"}, {"echo": "message 1 repeats message 0: 'j!'"}),
    (turns("k", LONG, "l", LONG), {"repeated-turn": "message 3 (assistant) says what message 1 said"}),
    (turns("m", "m", roles=("user", "user")), {"repeated-turn": "message 1 (user)", "no-final-answer": "from 'user'"}),
    ({"question": "Half of  5?", "answer": SOUND[1]["answer"]}, {"duplicate": "row 1 of this file"}),
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl", end=""):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
        return find_sources([str(file)], "data.train_files")

    return write


@pytest.fixture
def chat(tiny):
    return partial(make_chat, str(tiny / "model"), None, None, False)


def check(sources, val=(), make=None, file=None, num_workers=0, columns=Columns(), **limits):
    return audit(sources, list(val), Checks(columns, make, **limits), file=file, num_workers=num_workers)


def found_in(audited):
    return {(e.row, e.kind): e.found for of_kind in audited.findings.examples.values() for e in of_kind}


def test_each_fault_is_found_in_its_row_and_nothing_in_sound_rows(write):
    rows = [*SOUND, *(row for row, _ in FAULTS)]
    audited = check(write(rows))
    expected = {(len(SOUND) + i, kind): said for i, (_, kinds) in enumerate(FAULTS) for kind, said in kinds.items()}
    found = found_in(audited)
    assert found.keys() == expected.keys()
    for place, said in expected.items():
        assert said in found[place], place
    told = report(audited, Checks(Columns()))
    assert (told["rows_read"], told["rows_used"]) == (len(rows), len(rows) - 2)
    assert told["rows_dropped"] == {"no answer": 1, "no conversation recognised": 1} and told["tokens"] is None
    assert len(told["not_checked"]) == 2
    json.dumps(told, ensure_ascii=False).encode()  # no half pair in it


def test_half_a_character_pair_is_named_and_never_printed():
    conversation = Conversation([{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "a\ud83d"}])
    found = dict(check_conversation(conversation))
    assert found["control-character"] == "message 1 (assistant): U+D83D at character 1"
    "".join(found.values()).encode()


def test_a_changed_word_makes_a_near_duplicate_and_a_common_system_prompt_does_not(write):
    story = " ".join(f"word{i} and then" for i in range(40))
    rows = [turns(story, "a"), turns("Another?", "b", system=story), turns("More?", "c", system=story),
            turns(story.replace("word9 ", "word8 "), "a", system=PROMPT), turns(story, "a")]  # fmt: skip
    found = found_in(check(write(rows)))
    assert found.keys() == {(3, "near-duplicate"), (4, "duplicate")}
    assert "row 0 of this file" in found[3, "near-duplicate"]


def test_estimated_similarity_is_the_share_of_common_shingles_and_bands_find_what_is_similar():
    rng = np.random.default_rng(0)
    pairs, shares = [], []
    for _ in range(200):
        words = rng.integers(0, 10**6, 150).astype(str)
        other = words.copy()
        other[rng.integers(0, 150, rng.integers(1, 12))] = "x"
        a, b = ({tuple(w[i : i + 3]) for i in range(148)} for w in (words, other))
        shares.append(len(a & b) / len(a | b))
        pairs += [" ".join(words), " ".join(other)]
    made = signatures(pairs)
    estimates = (made[::2] == made[1::2]).mean(axis=1)
    assert abs(np.mean(estimates - shares)) < 0.01 and np.std(estimates - shares) < 0.07
    assert {row for row, _, _ in near_duplicates(made, np.zeros(len(made), bool))} == {
        2 * i + 1 for i in np.flatnonzero(np.round(estimates * 60) >= 48)
    }


def test_rows_that_leak_from_validation_are_found_by_question_and_by_likeness(write, monkeypatch):
    monkeypatch.setattr(duplicates, "ROWS_MATCHED_AT_ONCE", 2)
    val = [turns("What is 3+4?", "It is 7."), turns(LONG + LONG, "b")]
    rows = [
        turns("What  is 3+4?", "Seven!", system=PROMPT),
        turns("Who are you?", "A model."),
        turns(LONG + LONG[:-6], "b"),
    ]
    found = found_in(check(write(rows), val=write(val, "val.jsonl")))
    assert found.keys() == {(0, "leak"), (2, "near-leak")}
    assert "val.jsonl row 0" in found[0, "leak"] and "val.jsonl row 1" in found[2, "near-leak"]


CALCULATIONS = {
    "2+2=4": None, "2+2=5": 4, "10/3=3.33": None, "10/3=3.34": 10 / 3, "48/5=9": 9.6, "48/5=10": None, "50*20%=10": None,
    "1/4=25%": None, "1,000*2=2,000": None, "$5x2=$10": None, "05+1=6": None, "2*-3=-6": None, "(2+3)*4=21": 20,
    "560//10=56": None, "9**9=3": None, "a+b=c": None, "1/0=3": None, "2+2": None, "__import__('os')=1": None, "((((=1": None,
}  # fmt: skip


@pytest.mark.parametrize("calculation", CALCULATIONS)
def test_a_calculation_is_wrong_when_it_differs_by_more_than_rounding(calculation):
    right = CALCULATIONS[calculation]
    assert list(wrong_calculations(f"so <<{calculation}>>.")) == (
        [] if right is None else [f"<<{calculation}>>, where {calculation.split('=')[0]} is {right:.10g}"]
    )


def test_a_conclusion_in_words_is_no_mismatch():
    assert disagreeing_answer("It takes 6/2 = <<6/2=3>>3 each, which is 4 rounded up.\n#### 4") is None
    assert disagreeing_answer("He chooses the first, so 9 hours.\n#### 9") is None
    assert disagreeing_answer("#### 9") is None
    assert disagreeing_truth("2+2 = 4\n#### 4.0", "4") is None and disagreeing_truth("four", "5") is None


def test_real_gsm8k_has_twelve_answers_that_disagree_and_one_unseen_character(shared_data):
    sources = find_sources([str(shared_data / "gsm8k" / "train.jsonl")], "data.train_files")
    val = find_sources([str(shared_data / "gsm8k" / "test.jsonl")], "data.val_files")
    audited = check(sources, val)
    assert audited.findings.counts == {"answer-mismatch": 12, "control-character": 1}
    rows = np.flatnonzero(audited.rows_with(("answer-mismatch",))).tolist()
    assert rows == [356, 786, 1154, 2770, 3334, 3409, 4796, 5350, 6157, 6760, 7182, 7444]  # each was read


def test_ready_made_tokens_that_the_tokenizer_lacks_are_found_as_training_finds_them(chat, tmp_path):
    rows = [{"input_ids": [1, 2, last], "labels": [-100, 2, last]} for last in (3, 10**6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = find_sources([str(tmp_path / "rows.jsonl")], "data.train_files")
    checks = Checks(Columns(), chat)
    assert report(audit(sources, [], checks, num_workers=0), checks)["rows_dropped"] == {"token id out of range": 1}


@pytest.mark.parametrize("truncation", ["left", "right", "drop"])
def test_counts_are_those_that_training_has(truncation, tiny, chat, tmp_path):
    from posttrain.data.tokenized import load_tokenized
    from posttrain.data.truncation import truncated

    sources = find_sources([str(tiny / "train.parquet")], "data.train_files")
    whole = load_tokenized(sources, Columns(), chat, str(tmp_path / "cache"))
    limit = int(np.percentile(whole.lengths_N, 60))
    data = truncated(whole, limit, truncation)
    checks = Checks(Columns(), chat, limit, truncation)
    audited = audit(sources, [], checks, num_workers=0)
    told = report(audited, checks)
    tokens = told["tokens"]
    assert (told["rows_used"], told["rows_dropped"]) == (len(data), data.report.rows_dropped)
    assert tokens["num_tokens"] == data.lengths_N.sum() and tokens["num_trained_tokens"] == data.num_trained_N.sum()
    assert tokens["length_percentiles"]["50"] == int(np.percentile(whole.lengths_N, 50))
    assert sum(bar["samples"] for bar in tokens["lengths"]) == 200
    assert sum(part["tokens"] for part in tokens["parts"]) == whole.lengths_N.sum()
    assert {(p["role"], p["part"]) for p in tokens["parts"] if p["trained"]} == {
        ("assistant", "text"),
        ("assistant", "end"),
    }
    assert audited.findings.counts["too-long"] == (whole.lengths_N > limit).sum()
    assert tokens["padded_tokens"]["to_longest"] == limit * len(data) or truncation == "drop"
    cut = audited.findings.counts["cut-answer"]
    assert cut > 0 if truncation == "right" else cut == 0  # answers come last


class OddChat(ChatTokenizer):
    """Trains no token that ends a turn, and has something to say of each row."""

    def encode_many(self, conversations):
        samples = super().encode_many(conversations)
        for (sample,) in samples:
            sample.weights_T[sample.turns[-1].end - 1] = 0
        return [[replace(sample, notes=("message 3: '<|im_end|>' is encoded as text",))] for (sample,) in samples]


def test_turns_without_a_trained_end_and_notes_are_found(write, tiny, chat):
    audited = check(write([turns("a", "b"), turns("c", "d")]), make=lambda: OddChat(chat().tokenizer))
    assert audited.findings.counts == {"end-untrained": 2, "note": 2}
    assert audited.findings.reasons["note"] == {"'<|im_end|>' is encoded as text": 2}


def test_rows_that_are_tokens_already_are_counted_and_compared(write, monkeypatch):
    def tokens(row, columns, folder):
        return Tokens(np.array(row["ids"], dtype=np.int32), np.array(row["weights"], dtype=np.float32))

    monkeypatch.setattr(chunk, "conversation_or_error", tokens)
    rows = [{"ids": [1, 2, 3], "weights": [0, 1, 1]}, {"ids": [4, 5], "weights": [1, 0]}]
    audited = check(write([*rows, rows[0]]), max_length=2, truncation="right")
    assert audited.findings.counts == {"too-long": 2, "unusable": 1, "duplicate": 1}
    assert audited.tokens == {("pre-tokenized", "text"): 8} and audited.num_trained == 2  # the first token is no target


def test_worker_processes_find_the_same_as_one(write, monkeypatch):
    rows = write([*SOUND, *(row for row, _ in FAULTS)] * 3)
    alone = check(rows)
    monkeypatch.setattr(workers, "ROWS_BEFORE_WORKERS", 8)
    monkeypatch.setattr(workers, "ROWS_A_CHUNK", 4)
    together = check(rows, num_workers=2)
    assert asdict(together.findings) == asdict(alone.findings)
    assert np.array_equal(together.kinds_R, alone.kinds_R)


def test_findings_beyond_the_first_of_a_kind_are_on_disk_and_not_in_memory(write, tmp_path):
    rows = [{"question": f"{i} {LONG}" * (1 + i % 3), "answer": None} for i in range(2000)]
    with open(tmp_path / "findings.jsonl", "w") as file:
        audited = check(write(rows), file=file)
    assert audited.findings.counts["unusable"] == 2000
    assert sum(map(len, audited.findings.examples.values())) == EXAMPLES_A_KIND
    lines = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(2000)) and lines[7]["kind"] == "unusable"
    bytes_a_row = sum(
        len(getattr(audited.train, c).values.tobytes()) for c in ("row_hashes", "question_hashes", "signatures")
    )
    assert bytes_a_row / 2000 <= 136


def run_clean(sources, output, val=(), drop=DROPPED_BY_DEFAULT, find_again=None):
    return clean(
        sources, list(val), Checks(Columns()), drop, output, find_again=find_again or (lambda: sources), num_workers=0
    )


def parquet_file(file, rows):
    schema = pa.schema(
        {"extra": pa.struct({"i": pa.int32(), "tags": pa.list_(pa.large_string())}), "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))},
        metadata={"made": "by a test"},
    )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd", row_group_size=3)


def test_cleaning_keeps_schema_order_and_bytes_and_says_what_it_left_out(write, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BYTES_A_READ", 200)
    rows = [
        {"extra": {"i": i, "tags": ["a", None]}, **turns(f"Question {i % 5}?", f"Answer {i % 5}.")} for i in range(7)
    ]
    rows[3]["messages"] = None
    parquet_file(tmp_path / "rows.parquet", rows)
    as_written = '\n  {"question" : "h\\u00e4?",   "answer": "ja"}'
    others = [turns("Question 4?", "Is the answer 4?"), turns("One", "two"), turns("One ", "two"), FAULTS[0][0]]
    sources = [*find_sources([str(tmp_path / "rows.parquet")], "x"), *write(others, end=as_written)]
    before = [(tmp_path / name).read_bytes() for name in ("rows.parquet", "rows.jsonl")]
    told = run_clean(sources, tmp_path / "out", val=write([turns("Question 2?", "?")], "val.jsonl"))

    assert [(tmp_path / name).read_bytes() for name in ("rows.parquet", "rows.jsonl")] == before
    table = pq.read_table(tmp_path / "out/rows.parquet")
    assert table.to_pylist() == [rows[i] for i in (0, 1, 4)]
    assert table.schema.equals(pq.read_schema(tmp_path / "rows.parquet"), check_metadata=True)
    written = pq.ParquetFile(tmp_path / "out/rows.parquet").metadata
    assert written.row_group(0).column(0).compression == "ZSTD"
    assert written.num_row_groups == 3  # never more than a few large rows at a time
    kept = before[1].split(b"\n")
    assert (tmp_path / "out/rows.jsonl").read_bytes().splitlines() == [kept[0], kept[1], kept[5]]
    left_out = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert sorted((line["file"].rpartition(".")[2], line["row"], line["kind"]) for line in left_out) == [
        ("jsonl", 2, "duplicate"), ("jsonl", 3, "unusable"), ("parquet", 2, "leak"), ("parquet", 3, "unusable"),
        ("parquet", 5, "duplicate"), ("parquet", 6, "duplicate"),
    ]  # fmt: skip
    assert (told["rows_written"], told["rows_left_out"]) == (6, 6)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"rows.parquet", "rows.jsonl", "left_out.jsonl", "findings.jsonl", "report.json"}
    assert json.loads((tmp_path / "out/report.json").read_text()) == told


def test_json_lists_and_arrow_files_are_cleaned_in_their_own_form(tmp_path):
    rows = [turns("a", "b"), turns("a", "b"), turns("c", "d")]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)))
    table = pa.Table.from_pylist(rows)
    for name, make in (("c.arrow", pa.ipc.new_file), ("d.arrow", pa.ipc.new_stream)):
        with make(str(tmp_path / name), table.schema) as file:
            file.write_table(table, max_chunksize=2)
    for name in ("a.json", "b.json", "c.arrow", "d.arrow"):
        sources = find_sources([str(tmp_path / name)], "x")
        run_clean(sources, tmp_path / "out")
        begin = (tmp_path / name).read_bytes()[:1]
        assert (tmp_path / "out" / name).read_bytes()[:1] == begin
        left = check(find_sources([str(tmp_path / "out" / name)], "x"))
        assert left.train.num_rows == 2 and not left.findings.counts


def test_files_of_one_name_keep_their_folders(write, tmp_path):
    sources = [*write([turns("a", "b")], "x/rows.jsonl"), *write([turns("a", "b"), turns("c", "d")], "y/rows.jsonl")]
    run_clean(sources, tmp_path / "out")
    assert [len((tmp_path / "out" / n).read_text().splitlines()) for n in ("x/rows.jsonl", "y/rows.jsonl")] == [1, 1]


def test_cleaning_refuses_what_would_lose_rows(write, tmp_path):
    sources = write([turns("a", "b")], "in/deep/rows.jsonl")
    for output in (tmp_path / "in/deep", tmp_path / "in"):
        with pytest.raises(InputError, match="holds the source"):
            run_clean(sources, output)
    with pytest.raises(InputError, match="Two files would be written as report"):
        run_clean(write([turns("a", "b")], "other/report.json"), tmp_path / "o")
    with pytest.raises(InputError, match=r"--drop near: there is no such kind. There are unusable, duplicate"):
        checked_kinds(["duplicate,near"])
    changed = [replace(sources[0], fingerprint="another")]
    with pytest.raises(RunError, match="changed while they were read"):
        run_clean(sources, tmp_path / "out", find_again=lambda: changed)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_set_whose_columns_are_not_recognised_is_an_error(write):
    with pytest.raises(InputError, match=r"rows.jsonl row 0: no conversation recognised.*the columns are text"):
        check(write([{"text": "a"}] * 3))
    with pytest.raises(InputError, match="no rows in it"):
        check(write([], "blank.jsonl", "\n\n"))


@pytest.mark.slow
def test_the_commands_print_find_and_write(posttrain, tiny, write):
    bad = write([turns("a", "b"), turns("a", "b"), turns("c", "d"), *(row for row, _ in FAULTS)])[0].name
    both = ("--files", tiny / "train.parquet", "--files", bad, "--val_files", tiny / "test.parquet")
    tokenizer = ("--tokenizer", tiny / "model", "data.max_length=60", "data.truncation=right")
    told = json.loads(
        posttrain(
            "data", "check", *both, *tokenizer, "--json", "--output", "$HERE/found", HERE=str(posttrain.folder)
        ).stdout
    )
    assert told["rows_read"] == 200 + 3 + len(FAULTS) and told["not_checked"] == []
    assert told["findings"]["cut-answer"]["count"] > 0 and told["tokens"]["num_trained_tokens"] > 0
    assert json.loads((posttrain.folder / "found/report.json").read_text()) == told
    lines = [json.loads(line) for line in (posttrain.folder / "found/findings.jsonl").read_text().splitlines()]
    assert len(lines) == sum(of_kind["count"] for of_kind in told["findings"].values())
    assert all(line.keys() == {"file", "row", "kind", "found"} for line in lines)

    printed = posttrain("data", "check", *both, *tokenizer).stdout
    for said in (
        "rows.jsonl row 1: the same as row 0 of this file",
        "trained turns that truncation cuts",
        "beyond data.max_length",
        "█",
    ):
        assert said in printed, said
    done = posttrain("data", "clean", "--files", bad, "--output", "out", "--drop", "duplicate,control-character").stdout
    assert "written 12 rows" in done and "not checked: tokens" in done
    for arguments, said in {
        ("--files", "absent.jsonl"): "absent.jsonl does not exist",
        ("--files", bad, "--drop", "x", "--output", "o"): "no such kind",
        ("--files", bad, "--output", "."): "holds the source",
        ("--files", bad, "--output", "o", "--chat_template", bad): "--tokenizer",
    }.items():
        done = posttrain("data", "clean", *arguments, *(() if "--output" in arguments else ("--output", "o")), code=2)
        assert said in done.stderr
