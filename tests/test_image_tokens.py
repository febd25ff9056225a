"""Rows with images become the very ids that the model's own processor makes of them; only assistants' text is trained."""

from __future__ import annotations

import os
import pickle
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from pictures import FAMILIES, encoded, make_processor, picture
from posttrain.config.compose import compose
from posttrain.data import sources, workers
from posttrain.data.chat import ChatTokenizer, Rules
from posttrain.data.formats import Columns, RowError, to_conversation
from posttrain.data.images.processor import ImageText
from posttrain.data.images.reading import decode
from posttrain.data.sources import find_sources, read_rows
from posttrain.data.tokenized import _encode_chunk, load_tokenized
from posttrain.data.truncation import truncated
from posttrain.errors import InputError
from posttrain.records import Tokens

SIZES = [(100, 50), (28, 61), (280, 196)]
IMAGES = [encoded(picture(*size, seed)) for seed, size in enumerate(SIZES)]
MESSAGES = [
    {"role": "user", "content": "<image>What is this ?"},
    {"role": "assistant", "content": "A red circle"},
    {"role": "user", "content": "and that\n<image> and <image>\nin this ?"},
    {"role": "assistant", "content": "They are not the same"},
]
ROW = {"messages": MESSAGES, "images": IMAGES}


@pytest.fixture(params=FAMILIES)
def processor(request):
    return make_processor(request.param)


def chat_of(processor, **rules) -> ChatTokenizer:
    return ChatTokenizer(processor.tokenizer, Rules(**rules), ImageText(processor))


def in_parts(messages: list[dict]) -> list[dict]:
    """Texts as lists of one part: LLaVA's template sees nothing else."""
    return [m if isinstance(m["content"], list) else {**m, "content": [{"type": "text", "text": m["content"]}]}
            for m in messages]  # fmt: skip


def own_ids(processor, conversation, prompt: bool = False) -> list[int]:
    """What transformers itself makes of the conversation."""
    messages = in_parts(conversation.messages)
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    begins = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
    images = [decode(source) for source in conversation.images]
    return processor(text=[text], images=[images] if images else None, add_special_tokens=not begins)["input_ids"][0]


def answers_of(processor, conversation) -> str:
    """The text that is to be trained, with what ends each turn."""
    end = "<end_of_turn>" if "<end_of_turn>" in processor.chat_template else "<|im_end|>"
    return "".join(m["content"] + end for m in conversation.messages if m["role"] == "assistant")


def test_ids_are_the_processors_own_and_only_answers_are_trained(processor):
    chat, tokenizer = chat_of(processor), processor.tokenizer
    conversation = to_conversation(ROW, Columns())
    sample = chat.encode(conversation)
    assert sample.ids_T.tolist() == own_ids(processor, conversation)
    assert tokenizer.decode(sample.ids_T[sample.weights_T > 0]) == answers_of(processor, conversation)
    assert [(i.width, i.height) for i in sample.images] == SIZES
    pieces_T = sample.ids_T == chat.images.token_id
    for image in sample.images:
        expansion = tokenizer(chat.images.expansion(image.width, image.height), add_special_tokens=False)["input_ids"]
        assert sample.ids_T[image.begin : image.end].tolist() == expansion
        pieces_T[image.begin : image.end] = False
    assert not pieces_T.any()
    asked = replace(conversation, messages=conversation.messages[:-1])
    prompt = chat.prompt(asked)
    assert prompt.ids_T.tolist() == own_ids(processor, asked, prompt=True) and len(prompt.images) == 3
    assert chat.end_ids(sample.ids_T, sample.weights_T) == [sample.ids_T[t.end - 1] for t in sample.turns]
    arrays = chat.images.arrays([decode(source) for source in conversation.images])
    assert arrays and all(len(array) for array in arrays.values()) and "input_ids" not in arrays
    if "image_grid_thw" in arrays:
        merged = processor.image_processor.merge_size**2
        assert (sample.ids_T == chat.images.token_id).sum() == arrays["image_grid_thw"].prod(axis=1).sum() // merged


def test_expansions_are_what_the_processor_writes_whatever_the_size(processor):
    images = ImageText(processor)
    has_grids = isinstance(processor, transformers.Idefics3Processor)
    assert (images._repeats is None) == has_grids
    rng = np.random.default_rng(0)
    for size in [*map(tuple, rng.integers(8, 700, (12, 2)).tolist()), (1, 1), (1400, 30), (30, 1400)]:
        assert images.expansion(*size) == images.expanded(images.mark, [size]), size


def test_what_is_written_for_large_images_alone_is_written_for_them():
    processor = make_processor.__wrapped__("gemma3")
    settings = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 512, "pan_and_scan_max_num_crops": 4}
    processor.tokenizer.init_kwargs |= settings
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    images = ImageText(processor)
    for size, count in (((640, 300), 1), ((3000, 600), 5)):
        assert (images.ids(*size) == images.token_id).sum() == count * 4
        assert images.arrays([Image.new("RGB", size)])["pixel_values"].shape[0] == count


def test_expansions_of_a_few_sizes_are_kept():
    images = ImageText(make_processor("qwen2_5_vl"))
    for width in range(60, 600):
        images.expansion(width, 60)
    assert 0 < images.expansion.cache_info().currsize < 500


def test_each_turn_of_its_own_has_the_images_of_its_messages(processor):
    first, second = chat_of(processor, expand_turns=True).encode_many([to_conversation(ROW, Columns())])[0]
    assert [(i.width, i.height) for i in first.images] == SIZES[:1] and len(second.images) == 3
    conversation = to_conversation(ROW, Columns())
    cut = replace(conversation, messages=conversation.messages[:2], images=conversation.images[:1])
    assert first.ids_T.tolist() == own_ids(processor, cut)
    assert second.ids_T.tolist() == own_ids(processor, conversation)


def test_rows_without_images_are_what_they_are_for_a_text_model(processor):
    row = {"messages": [{"role": "user", "content": "What is this ?"}, MESSAGES[1]]}
    conversation = to_conversation(row, Columns())
    sample = chat_of(processor).encode(conversation)
    assert sample.ids_T.tolist() == own_ids(processor, conversation) and sample.images == ()
    if not chat_of(processor)._parts_only:
        plain = ChatTokenizer(processor.tokenizer, Rules()).encode(conversation)
        assert np.array_equal(plain.ids_T, sample.ids_T) and np.array_equal(plain.weights_T, sample.weights_T)


def test_a_typed_mark_stays_text_and_an_answer_may_not_hold_one(processor):
    chat, mark = chat_of(processor), processor.image_token
    typed = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"this {mark} ?"}]},
                          MESSAGES[1]], "images": IMAGES[:1]}  # fmt: skip
    sample = chat.encode(to_conversation(typed, Columns()))
    (image,) = sample.images
    pieces_T = np.isin(sample.ids_T, [chat.images.token_id, processor.tokenizer.convert_tokens_to_ids(mark)])
    assert pieces_T.sum() == pieces_T[image.begin : image.end].sum() > 0
    assert mark in processor.tokenizer.decode(sample.ids_T[image.end :])
    assert any(repr(mark) in note for note in sample.notes)
    if chat.images.token_id != processor.tokenizer.convert_tokens_to_ids(mark):
        return  # Gemma's mark is a frame, which an answer may write
    said = {"messages": [{"role": "user", "content": [{"type": "image"}]},
                         {"role": "assistant", "content": f"this {mark}"}]}  # fmt: skip
    for row, control_strings in ((said, "text"), (typed, "allow")):
        with pytest.raises(RowError, match="stands for a piece of an image") as error:
            chat_of(processor, control_strings=control_strings).encode(
                to_conversation({**row, "images": IMAGES[:1]}, Columns())
            )
        assert error.value.kind == "control string typed"
    with pytest.raises(RowError, match=r"the row holds .* stands for a piece of an image"):
        chat.encode(Tokens(np.array([1, chat.images.token_id], np.int32), np.ones(2, np.float32)))


def test_a_text_begins_as_the_processor_begins_it():
    from tokenizers.processors import TemplateProcessing

    processor = make_processor.__wrapped__("llava")
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<bos>"
    begins = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    conversation = to_conversation(ROW, Columns())
    sample = chat_of(processor).encode(conversation)
    assert sample.ids_T.tolist() == own_ids(processor, conversation) and sample.ids_T[0] == tokenizer.bos_token_id
    assert {*sample.ids_T[sample.images[1].begin : sample.images[1].end].tolist()} == {processor.image_token_id}
    assert tokenizer.decode(sample.ids_T[sample.weights_T > 0]) == answers_of(processor, conversation)


def test_the_recipe_of_llava_ends_its_answers():
    """The template of the model itself ends them with a blank, which no row could be learnt from."""
    processor = make_processor.__wrapped__("llava")
    processor.tokenizer.chat_template = compose(["model=llava1.5-7b"], "sft").config.data.chat_template
    conversation = to_conversation({**ROW, "system": "You are a helpful assistant ."}, Columns())
    sample = chat_of(processor).encode(conversation)
    assert sample.ids_T.tolist() == own_ids(processor, conversation)
    image = processor.tokenizer.decode(sample.ids_T[sample.images[0].begin : sample.images[0].end])
    # as https://huggingface.co/docs/transformers/model_doc/llava has it, where the token that ends a text is </s>
    assert processor.tokenizer.decode(sample.ids_T).startswith(
        f"You are a helpful assistant . USER: {image}\nWhat is this ? ASSISTANT: A red circle<|im_end|>USER: "
    )
    assert (
        processor.tokenizer.decode(sample.ids_T[sample.trained_T])
        == " A red circle<|im_end|> They are not the same<|im_end|>"
    )
    asked = replace(conversation, messages=conversation.messages[:-1])
    assert chat_of(processor).prompt(asked).text.endswith("in this ? ASSISTANT:")


def test_what_cannot_be_shown_is_refused_with_the_reason():
    processor = make_processor("qwen2_5_vl")
    chat = chat_of(processor)

    def refusal(chat, row, kind, said):
        with pytest.raises(RowError, match=said) as error:
            chat.encode(to_conversation(row, Columns()))
        assert error.value.kind == kind

    row = {"messages": MESSAGES[:2], "images": IMAGES[:1]}
    refusal(
        ChatTokenizer(processor.tokenizer),
        row,
        "images for a text model",
        "1 image, and the model takes none: .* model.path",
    )
    strip = {**row, "images": [encoded(picture(4000, 2))]}
    refusal(chat, strip, "image refused by the processor", "4000 x 2 pixels: the processor says: .*aspect ratio")
    refusal(chat, {**row, "images": ["gone.png"]}, "image not found", "gone.png does not exist")
    trained = {**row, "messages": [{"role": "user", "content": "What <image> ?", "weight": 1}, MESSAGES[1]]}
    refusal(chat, trained, "image in an answer", "message 0 is trained and holds an image")
    blind = copy(processor.tokenizer)
    blind.chat_template = blind.chat_template.replace("<|image_pad|>", "")
    refusal(
        ChatTokenizer(blind, images=ImageText(processor)),
        row,
        "refused by the template",
        "writes 0 marks .* for 1 image",
    )
    assert chat.encode(to_conversation({**row, "images": [encoded(picture(1, 1))]}, Columns())).images[0].width == 1
    with pytest.raises(InputError, match="names no mark of images"):
        ImageText(processor.tokenizer)


def chat_for_workers() -> ChatTokenizer:
    return chat_of(make_processor("qwen2_5_vl"))


def load(rows: Path, cache: Path, **options):
    return load_tokenized(find_sources([str(rows)], "files"), Columns(), chat_for_workers, str(cache), **options)


@pytest.fixture
def rows(tmp_path) -> Path:
    """Five rows: a path, the bytes of another image, both and the first again, a text row, and a broken image."""
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "1.png").write_bytes(IMAGES[0])
    path, data = {"bytes": None, "path": "1.png"}, {"bytes": IMAGES[2], "path": "gone.png"}
    images = [[path], [data], [path, data, path], [], [{"bytes": b"none", "path": None}]]
    messages = [[{"role": "user", "content": "<image>" * len(i) + "What is this ?"}, MESSAGES[1]] for i in images]
    table = pa.table({"messages": messages, "images": images})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_the_cache_gives_back_ids_and_images(rows, tmp_path):
    data = load(rows, tmp_path / "cache")
    assert (
        data.report.rows_dropped == {"broken image": 1}
        and "rows.parquet row 4" in data.report.places["broken image"][0]
    )
    chat = chat_for_workers()
    for sample, row in zip((data[i] for i in range(4)), read_rows(find_sources([str(rows)], "files")), strict=False):
        conversation = to_conversation(row.values, Columns(), row.folder)
        expected = chat.encode(conversation)
        assert np.array_equal(sample.ids_T, expected.ids_T) and np.array_equal(sample.weights_T, expected.weights_T)
        assert len(sample.images) == len(conversation.images)
        for kept, source in zip(sample.images, conversation.images, strict=True):
            assert kept.path == source.path and (kept.data is None or bytes(kept.data) == source.data)
            assert np.array_equal(decode(kept), decode(source)) and kept.size == decode(source).size
    kept = next((tmp_path / "cache").rglob("images.bin")).read_bytes()
    assert len(kept) == len(IMAGES[2]) + len(data[0].images[0].path)  # each once
    assert len(data[3].images) == 0
    later = data.kept(np.array([False, True, True, False]))
    assert [later[i].images for i in range(2)] == [data[1].images, data[2].images]
    assert later.images.num_tokens_N().tolist() == data.images.num_tokens_N()[1:3].tolist()
    assert data.kept(np.array([False, False, False, True])).images is None  # so that a run knows that it sees none
    everything = tuple(read_rows(find_sources([str(rows)], "files")))
    for outcome in pickle.loads(pickle.dumps(_encode_chunk(chat, Columns(), everything)))[
        :4
    ]:  # as from a worker process
        ((ids_T, _, _, images),) = outcome.samples
        assert np.array_equal(ids_T, data[outcome.number].ids_T)
        assert tuple(image.source for image in images) == data[outcome.number].images


def test_a_cache_that_lacks_images_is_made_anew_once_they_are_there(rows, tmp_path):
    (tmp_path / "1.png").unlink()
    assert load(rows, tmp_path / "cache").report.rows_dropped == {"image not found": 2, "broken image": 1}
    made = next((tmp_path / "cache").rglob("report.json")).stat().st_mtime_ns
    load(rows, tmp_path / "cache")
    assert next((tmp_path / "cache").rglob("report.json")).stat().st_mtime_ns == made
    (tmp_path / "1.png").write_bytes(IMAGES[0][:100])
    assert load(rows, tmp_path / "cache").report.rows_dropped == {"broken image": 3}
    others = {
        "image refused by the processor": encoded(picture(300, 1)),
        "image of more than 8 bits": encoded(Image.fromarray(np.arange(9999, 10008, dtype=np.uint16).reshape(3, 3))),
    }
    for changed, (kind, image) in enumerate(others.items()):
        (tmp_path / "1.png").write_bytes(image)
        os.utime(tmp_path / "1.png", (changed, changed))
        assert load(rows, tmp_path / "cache").report.rows_dropped == {kind: 2, "broken image": 1}
    (tmp_path / "1.png").write_bytes(IMAGES[0])
    os.utime(tmp_path / "1.png", (9, 9))
    assert load(rows, tmp_path / "cache").report.rows_dropped == {"broken image": 1}


def test_one_file_in_two_folders_has_the_images_of_each(rows, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "1.png").write_bytes(IMAGES[1])
    (other / "rows.parquet").symlink_to(rows)
    for file in (rows, other / "rows.parquet"):
        assert load(file, tmp_path / "cache")[0].images[0].path == str(file.parent / "1.png")


def test_rows_with_large_images_are_held_a_few_at_a_time(rows, monkeypatch):
    found = [row.values for row in read_rows(find_sources([str(rows)], "files"))]
    monkeypatch.setattr(sources, "BYTES_A_READ", 1)
    assert [row.values for row in read_rows(find_sources([str(rows)], "files"))] == found
    assert (sources._rows_a_read(5, 0), sources._rows_a_read(10_000, 2_000)) == (5, 5)
    monkeypatch.setattr(workers, "BYTES_A_CHUNK", len(IMAGES[2]))
    sizes = [len(chunk) for chunk in workers.chunks(read_rows(find_sources([str(rows)], "files")))]
    assert sizes == [2, 1, 2]


def test_truncation_never_cuts_an_image(rows, tmp_path):
    data = load(rows, tmp_path / "cache")
    row = [row for row in read_rows(find_sources([str(rows)], "files"))][2]
    sample = chat_for_workers().encode(to_conversation(row.values, Columns(), row.folder))
    fits = {"left": len(sample) - sample.images[0].begin, "right": sample.turns[0].begin + 1, "drop": len(sample)}
    for how, limit in fits.items():
        cut = truncated(data, limit, how)
        assert 2 in cut.rows_N and len(cut[cut.rows_N.tolist().index(2)].images) == 3
    fits["right"] = sample.images[2].end
    for how, limit in fits.items():
        cut = truncated(data, limit - 1, how)
        assert cut.rows_N.tolist() == [0, 1, 3] and [len(cut[i].images) for i in range(3)] == [1, 1, 0]
        reason = "longer than data.max_length" if how == "drop" else "an image does not fit data.max_length"
        assert cut.report.rows_dropped[reason] == 1 and "row 2" in cut.report.places[reason][0]
        largest = data.images.largest(1)[2]
        places = truncated(data, largest - 1, how).report.places["an image does not fit data.max_length"]
        said = f"an image of 280 x 196 pixels makes {largest} tokens, more than data.max_length={largest - 1} alone"
        assert any("row 1: " + said in place for place in places)
    with pytest.raises(InputError, match=r"model.processor_kwargs={max_pixels: 786432}"):
        truncated(data, largest - 1, "error")


def test_the_key_of_the_cache_changes_with_the_processor():
    small, large = make_processor("qwen2_5_vl"), copy(make_processor("qwen2_5_vl"))
    large.image_processor = type(small.image_processor)(min_pixels=28 * 28, max_pixels=28 * 28 * 100)
    assert ImageText(small).key == ImageText(small).key != ImageText(large).key


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_real_rows_with_images(family, shared_data, tmp_path):
    """LLaMA-Factory's demo, whose rows name pictures in a folder beside their file."""
    source = shared_data / "conversations" / "mllm"
    (tmp_path / "mllm_demo_data").symlink_to(source)
    (tmp_path / "rows.json").symlink_to(source / "mllm_demo.json")
    processor = make_processor(family)
    conversations = [to_conversation(row.values, Columns(), row.folder)
                     for row in read_rows(find_sources([str(tmp_path / "rows.json")], "files"))]  # fmt: skip
    samples = chat_of(processor).encode_many(conversations)
    assert len(samples) == 6
    for conversation, (sample,) in zip(conversations, samples, strict=True):
        assert sample.ids_T.tolist() == own_ids(processor, conversation) and sample.images
        assert processor.tokenizer.decode(sample.ids_T[sample.weights_T > 0]) == answers_of(processor, conversation)
