"""What `data show` shows: every token once, with why it is trained or not, in colour, as JSON and as a page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.text import Text
from transformers import AutoTokenizer

from posttrain.data.encoded import NO_MESSAGE, Encoded, Part
from posttrain.data.show.blocks import apart_of, blocks_of
from posttrain.data.show.page import Summary, page
from posttrain.data.show.samples import Group, Length, Refused, shown_sample
from posttrain.data.show.terminal import coloured
from posttrain.data.sources import Row
from posttrain.errors import InputError
from shown import NOTES, ROLES, encoded_from, whole_story

ROW = Row("folder/chat.jsonl", 7, {})
WHOLE = Length(4096, "error")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<tool_call>", "</tool_call>"]})
    return tokenizer


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return encoded_from(tokenizer, whole_story(), notes=NOTES)


def at(encoded, text, nth=0):
    """The token that holds the nth place of the text."""
    place = [found.start() for found in re.finditer(re.escape(text), encoded.text)][nth]
    return int(np.flatnonzero(encoded.offsets_TC[:, 1] > place)[0])


REASONS = [
    ("<|im_start|>", 0, "not trained: written by the template"),
    ("system", 0, "not trained: a name in the header of message 0 (system)"),
    ("Answer", 0, "not trained: text of message 0 (system)"),
    ("Weather", 0, "not trained: the description of a tool"),
    ("Wie", 0, "not trained: text of message 1 (user)"),
    ("<|im_end|>", 1, "not trained: written by the template"),
    ("<|im_start|>", 2, "not trained: the header of message 2 (assistant), which the generation prompt writes"),
    ("assistant", 0, "not trained: the header of message 2 (assistant), which the generation prompt writes"),
    ("<think>", 0, "trained: what the template writes within message 2 (assistant)"),
    ("The user", 0, "trained: thinking of message 2 (assistant)"),
    ("Zürich", 2, "trained: a tool call of message 2 (assistant)"),
    ("<|im_end|>", 2, "trained: the token that ends message 2 (assistant)"),
    ("It is", 0, "not trained: text of message 4 (assistant), a turn that is left out (data.train_on=last)"),
    ("Tomorrow", 0, "trained: text of message 6 (assistant)"),
    ("<|im_end|>", 6, "trained: the token that ends message 6 (assistant)"),
]


def test_each_token_says_why_it_is_trained_or_not(tokenizer, encoded):
    sample = shown_sample(encoded, ROLES, tokenizer, WHOLE, ROW)
    found = {(text, nth): sample.reasons_T[at(encoded, text, nth)] for text, nth, _ in REASONS}
    assert found == {(text, nth): reason for text, nth, reason in REASONS}
    assert all((weight > 0) == reason.startswith("trained:")
               for weight, reason in zip(sample.targets_T, sample.reasons_T, strict=True))  # fmt: skip


def test_weights_and_parts_of_a_turn_that_are_left_out_are_said(tokenizer):
    story = [(text, m, part, 0.0 if part is Part.REASONING or "think" in text else weight)
             for text, m, part, weight in whole_story(0.5)]  # fmt: skip
    encoded = encoded_from(tokenizer, story)
    reasons = shown_sample(encoded, ROLES, tokenizer, WHOLE, ROW).reasons_T
    assert reasons[at(encoded, "Tomorrow")] == "trained: text of message 6 (assistant), with weight 0.5"
    assert reasons[at(encoded, "The user")] == "not trained: thinking of message 2 (assistant), which is left out"
    assert "around a part of message 2 (assistant) that is left out" in reasons[at(encoded, "<think>")]


def test_a_row_that_came_as_ids_has_its_own_weights_as_reason(tokenizer):
    ids_T = np.array(tokenizer.encode("3+4? 7"), dtype=np.int32)
    none_T = np.zeros(len(ids_T))
    given = Encoded("", ids_T, (np.arange(len(ids_T)) > 2).astype(np.float32), np.zeros((len(ids_T), 2), np.int32),
                    none_T.astype(np.int32) + NO_MESSAGE, none_T.astype(np.uint8) + Part.UNKNOWN)  # fmt: skip
    sample = shown_sample(given, (), tokenizer, WHOLE, ROW)
    assert sample.as_json()["reasons"][0] == "not trained: the row's own weights say so"
    assert sample.as_json()["reasons"][-1] == "trained: the row's own weights say so"
    assert "".join(sample.pieces_T) == "3+4? 7" and set(sample.roles_T) == {"tokens"}
    assert page_of([sample]).tokens == sample.pieces_T


def test_blocks_hold_every_token_once_and_begin_with_the_header(tokenizer, encoded):
    blocks = blocks_of(encoded)
    assert [t for block in blocks for t in range(block.begin, block.end)] == list(range(len(encoded)))
    assert [block.message for block in blocks] == [0, 1, 2, 3, 4, 5, 6]
    for block, role in zip(blocks, ROLES, strict=True):
        text = encoded.text[encoded.offsets_TC[block.begin, 0] : encoded.offsets_TC[block.end - 1, 1]]
        assert text.startswith(f"<|im_start|>{role}\n") and text.endswith("<|im_end|>\n")


def test_a_system_prompt_that_the_template_writes_is_a_block_of_its_own(tokenizer):
    T, X = Part.TEMPLATE, Part.TEXT
    encoded = encoded_from(tokenizer, [
        ("<|im_start|>system\nYou are.<|im_end|>\n<|im_start|>user\n", None, T, None), ("Hello", 0, X, None),
        ("<|im_end|>\n<|im_start|>assistant\n", None, T, None), ("Hi", 1, X, 1.0), ("<|im_end|>", 1, Part.END, 1.0),
        ("\n", None, T, None),
    ])  # fmt: skip
    assert [block.message for block in blocks_of(encoded)] == [NO_MESSAGE, 0, 1]


def test_thinking_and_tool_calls_stand_apart_with_their_brackets(tokenizer, encoded):
    sample = shown_sample(encoded, ROLES, tokenizer, WHOLE, ROW)
    apart_T = apart_of(encoded, sample.controls_T)
    texts = {
        name: "".join(new for new, apart in zip(sample.new_T, apart_T, strict=True) if apart == name)
        for name in ("thinking", "tool call")
    }
    assert texts["thinking"].startswith("<think>") and texts["thinking"].rstrip().endswith("</think>")
    assert texts["tool call"].startswith("<tool_call>") and texts["tool call"].endswith("</tool_call>")


@pytest.mark.parametrize("how", ["left", "right", "drop", "error"])
def test_what_a_run_cuts_is_cut(tokenizer, encoded, how):
    most = len(encoded) - 30
    sample = shown_sample(encoded, ROLES, tokenizer, Length(most, how), ROW)
    told = sample.as_json()
    assert len(told["ids"]) == len(encoded) and told["trained"] == encoded.trained_T.tolist()  # whole, whatever is cut
    if how in ("drop", "error"):
        assert sample.num_used == sample.num_trained == 0 and f"data.max_length={most}" in told["unused"]
        assert all(reason.startswith("left out with its sample; ") for reason in sample.reasons_T)
        return
    kept = slice(30, None) if how == "left" else slice(0, most)
    assert told["truncated"] == 30 and (sample.begin, sample.end) == (kept.start, kept.stop or len(encoded))
    assert sample.num_trained == encoded.trained_T[kept].sum()
    cut = [reason.startswith("cut: the sample is 30 tokens too long") for reason in sample.reasons_T]
    assert sum(cut) == 30 and all(cut[:30] if how == "left" else cut[-30:])


def test_the_first_token_that_is_kept_is_nobodys_target(tokenizer, encoded):
    first = at(encoded, "The user") + 1
    assert encoded.weights_T[first] == 1
    sample = shown_sample(encoded, ROLES, tokenizer, Length(len(encoded) - first, "left"), ROW)
    assert sample.targets_T[first] == 0 and "nothing before it predicts" in sample.reasons_T[first]


def test_a_sample_without_a_trained_token_is_said_to_be_dropped(tokenizer, encoded):
    cut = shown_sample(encoded, ROLES, tokenizer, Length(20, "right"), ROW)
    assert cut.unused == "dropped: no trained token is left"


class Read(HTMLParser):
    """The tokens of a page as their texts, without the marks; its tags; its facts."""

    def __init__(self, text):
        super().__init__()
        self.tokens, self.tags, self.facts, self.marks = [], [], [], []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.inside.append(tag if attributes.get("type") is None else attributes["type"])
        if tag == "i" and "x" not in attributes and self.in_text():
            self.tokens.append("")

    def handle_endtag(self, tag):
        while self.inside and not (self.inside.pop() == tag or tag == "script"):
            pass

    def handle_data(self, text):
        if "application/json" in self.inside:
            self.facts.append(json.loads(text))
        elif "u" in self.inside:
            self.marks.append(text)
        elif "i" in self.inside and self.in_text():
            self.tokens[-1] += text

    def in_text(self):
        return "article" in self.inside


def page_of(samples, **given):
    return Read(page(Summary("A <b>title</b>", {"files": "a&b"}), [Group([samples], **given)]))


def test_the_page_holds_every_token_once_with_its_id_and_reason(tokenizer, encoded):
    sample = shown_sample(encoded, ROLES, tokenizer, WHOLE, ROW)
    read = page_of([sample])
    assert len(read.tokens) == len(encoded)
    (told,) = read.facts
    assert told["ids"] == encoded.ids_T.tolist()
    said = [told["texts"][reason] for count, reason, *_ in told["runs"] for _ in range(count)]
    assert said == sample.reasons_T
    shown = "".join("" if token == "◦" else token for token in read.tokens)  # the rest of a character
    hidden = {"\t": "", "\u00a0": "", "  ": ""}  # stand as marks
    expected = encoded.text
    for text, mark in hidden.items():
        expected = expected.replace(text, mark)
    assert shown == expected
    assert {"↵", "⇥", "U+00A0", "·"} == set(read.marks)


def test_nothing_that_a_row_holds_becomes_markup(tokenizer):
    nasty = "</script><script>alert(1)</script></textarea><!-- &lt; \u202e ]]> <img src=x onerror=alert(1)>"
    encoded = encoded_from(tokenizer, whole_story(question=nasty), notes=[nasty])
    samples = [shown_sample(encoded, ("system", nasty, *ROLES[2:]), tokenizer, WHOLE, Row(nasty, 0, {}))]
    rows = [samples, Refused("a.jsonl", 1, nasty)]
    text = page(Summary(nasty, {nasty: nasty}, {nasty: nasty}), [Group(rows, nasty, nasty)])
    read = Read(text)
    assert not [tag for tag, attributes in read.tags if tag in ("img", "textarea") or "onerror" in attributes]
    assert [tag for tag, _ in read.tags].count("script") == 2  # the facts of the sample, and the page's own
    assert "alert(1)" in "".join(read.tokens) and "U+202E" in read.marks


def test_the_page_needs_nothing_but_itself(tokenizer, encoded):
    text = page(Summary("title"), [Group([[shown_sample(encoded, ROLES, tokenizer, WHOLE, ROW)]])])
    assert not re.search(r"(src|href)=|url\(|https?:|@import|fetch\(|import\(", text)


def test_an_emoji_of_several_tokens_is_shown_once_and_framed(tokenizer, encoded):
    sample = shown_sample(encoded, ROLES, tokenizer, WHOLE, ROW)
    assert any(sample.joined_T) and "".join(sample.new_T) == encoded.text
    assert all("\ufffd" not in piece for piece in sample.pieces_T) and sample.pieces_T.count("🤖") > 1
    frames = [attributes for tag, attributes in page_of([sample]).tags if attributes.get("class") == "g"]
    assert frames


def test_the_terminal_shows_trained_tokens_notes_cuts_and_refusals(tokenizer, encoded):
    (text,) = coloured([shown_sample(encoded, ROLES, tokenizer, Length(len(encoded) - 5, "right"), ROW)])
    assert "chat.jsonl row 7: " in text.plain and NOTES[0] in text.plain and "the last 5 of" in text.plain
    assert styles_at(text, "Tomorrow") == "bold green" and styles_at(text, "The user") == "bold green italic"
    assert styles_at(text, "Wie ist") == "blue" and "strike" in styles_at(text, "··<|im_end|>")
    assert "Zürich?··↵\n" in text.plain and "‹U+00A0›" in text.plain
    (text,) = coloured(Refused("folder/chat.jsonl", 4, "no answer: the answer is null"))
    assert text.plain == "chat.jsonl row 4 refused: no answer: the answer is null\n"


def styles_at(text: Text, words: str) -> str:
    place = text.plain.index(words)
    return " ".join(str(span.style) for span in text.spans if span.start <= place < span.end)


@pytest.fixture
def show(tiny, capsys, tmp_path):
    """Runs `posttrain data ...` in this process; gives what it prints."""
    from posttrain.cli.app import app

    def run(command, *arguments):
        options = (f"data.cache_dir={tmp_path}/cache", f"model.tokenizer_path={tiny}/model")
        app(["data", command, *map(str, (*options, *arguments))], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_batch_of_a_step_is_that_of_data_batches(show, tiny, tmp_path):
    run = (f"data.train_files={tiny}/train.parquet", "data.train_batch_size=12", "data.max_tokens_per_gpu=200",
           "data.max_length=60", "data.truncation=right")  # fmt: skip
    (batch,) = [json.loads(line) for line in show("batches", *run, "--steps", "2:3", "--json").splitlines()]
    samples = [json.loads(line) for line in show("show", *run, "--step", 2, "--json").splitlines()]
    assert sorted(sample["row"] for sample in samples) == sorted(batch["rows"])
    tokens: dict[int, int] = {}
    for sample in samples:
        used = len(sample["ids"]) - sample.get("truncated", 0)
        tokens[sample["micro_batch"]] = tokens.get(sample["micro_batch"], 0) + used
    assert len(tokens) > 1 and max(tokens.values()) <= 200
    said = show("show", *run, "--step", 2, "--html", tmp_path / "step.html")
    assert f"step.html: 12 samples, {sum(tokens.values()):,} tokens" in said
    text = (tmp_path / "step.html").read_text()
    for number, count in tokens.items():
        assert f"Micro-batch {number + 1} of {len(tokens)}<small>{count:,} tokens of at most 200" in text
    assert "The batch of step 2" in text and "<code>data.truncation=right</code>" in text
    said = show("show", *run, "--step", 2, "--rows", 1)
    assert said.count("tokens, ") == 1 and f"Micro-batch {len(tokens)} of {len(tokens)}" in said
    with pytest.raises(InputError, match="this run has steps 0 to"):
        show("show", *run, "--step", 1000)


def test_samples_of_one_row_are_told_apart_in_a_micro_batch(tokenizer, encoded):
    from posttrain.data.batches import pack
    from posttrain.loops.showing import _documents
    from posttrain.records import Sample

    length = Length(100, "left")
    samples = [shown_sample(encoded_from(tokenizer, whole_story()[:end]), ROLES, tokenizer, length, ROW, number)
               for number, end in enumerate((-2, None))]  # fmt: skip
    packed = pack(
        [Sample(3, s.encoded.ids_T[s.begin : s.end], s.encoded.weights_T[s.begin : s.end]) for s in samples[::-1]]
    )
    assert [sample.number for sample in _documents(packed, {3: samples})] == [1, 0]
    with pytest.raises(InputError, match="other tokens than in the cache"):
        _documents(packed, {3: samples[:1]})


def test_rows_are_shown_or_refused_with_the_reason(show, tmp_path):
    rows = [{"prompt": "3+4?", "response": "#### 7"}, {"prompt": "3+4?", "response": None}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ("--files", tmp_path / "rows.jsonl")
    first, second = map(json.loads, show("show", *files, "--json").splitlines())
    assert "".join(p for p, t in zip(first["pieces"], first["trained"], strict=True) if t) == "#### 7<|im_end|>"
    assert {role for role, t in zip(first["roles"], first["trained"], strict=True) if t} == {"assistant"}
    assert second["row"] == 1 and second["refused"].startswith("no answer: ")
    said = show("show", *files, "--html", tmp_path / "page.html")
    assert "1 sample," in said and "1 row refused" in said
    assert "Refused: no answer" in (tmp_path / "page.html").read_text()
    assert "rows.jsonl row 1 refused: no answer" in show("show", *files)
    with pytest.raises(InputError, match="cannot be written"):
        show("show", *files, "--html", tmp_path / "nowhere" / "page.html")
    with pytest.raises(InputError, match="give one of them"):
        show("show", *files, "--html", tmp_path / "page.html", "--json")
