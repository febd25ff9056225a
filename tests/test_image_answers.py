"""Answers to prompts with images: those of the model's own processor and generate, in evaluation, validation and GRPO."""

import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import forked
from conftest import records
from forked import run
from pictures import encoded, picture
from posttrain.data.formats import Columns
from posttrain.data.images.loader import ImageLoader
from posttrain.data.sources import Row
from posttrain.loops.answering import read_problems, requests_for
from posttrain.loops.policy_batches import Limits
from posttrain.loops.training_data import make_chat
from posttrain.models.load import load_model
from posttrain.records import Sample
from posttrain.rollout import transformers
from posttrain.rollout.rollout import Sampling
from posttrain.rollout.sampling import draw
from posttrain.rollout.transformers import TransformersRollout
from tiny import alone
from tiny_vision import VISION_CONFIGS, write_tiny_vision_model

LIMIT = 8
WARM = Sampling(temperature=1.5)
SIZES = [[(60, 84)], [], [(84, 60), (30, 30)], [(60, 84)], [(140, 56)]]  # of the images of each prompt
TEXTS = ["what is in this picture?", "what?", "and in that one, 1 2 3?", "what is in this picture?", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, rows with images as files and as bytes, and a reward."""
    forked.start_server()
    folder = tmp_path_factory.mktemp("seeing")
    for family in VISION_CONFIGS:
        write_tiny_vision_model(folder / family, family)
    rows = []
    for number, (pictures, text) in enumerate(zip(pictures_of(), TEXTS, strict=True)):
        names = [f"{number}-{place}.png" for place in range(len(pictures))]
        for name, image in zip(names, pictures, strict=True):
            image.save(folder / name)
        rows.append({"messages": [{"role": "user", "content": "<image>" * len(names) + text}], "images": names,
                     "reward_model": {"ground_truth": str(number)}})  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answered = [{**row, "messages": [*row["messages"], {"role": "assistant", "content": "1"}]} for row in rows]
    (folder / "answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    (folder / "reward.py").write_text(
        "def digits(data_source, solution_str, ground_truth, extra_info):\n"
        "    return sum(c.isdigit() for c in solution_str) / max(len(solution_str), 1)\n"
    )
    return folder


def pictures_of():
    """The images of each prompt; prompts 0 and 3 ask the same of others."""
    return [
        [picture(*size, seed=10 * row + place) for place, size in enumerate(sizes)] for row, sizes in enumerate(SIZES)
    ]


def problems_of(chat):
    rows = [
        Row("rows", number, {"messages": [{"role": "user", "content": "<image>" * len(images) + text}],
                             "images": [{"bytes": encoded(image), "path": None} for image in images]})
        for number, (images, text) in enumerate(zip(pictures_of(), TEXTS, strict=True))
    ]  # fmt: skip
    problems, report = read_problems(rows, Columns(answers_needed=False), chat, None)
    assert len(problems) == len(TEXTS), report.places
    return problems


def rollout_of(folder, family, batch_size=64):
    chat = make_chat(str(folder / family), None, None, False)
    model = load_model(str(folder / family), dtype=torch.float32)
    return TransformersRollout(model, chat.tokenizer, batch_size, images=chat.images), problems_of(chat), chat


def ids_of(completions):
    return [completion.segments[0].ids_T.tolist() for completion in completions]


def inputs_of(chat, row):
    """What the model's own processor makes of a prompt."""
    pictures, processor = pictures_of()[row], chat.images.processor
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": TEXTS[row]}]
    asked = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")


@pytest.mark.parametrize("family", VISION_CONFIGS)
def test_answers_are_those_of_the_models_own_processor_and_generate(folder, family, monkeypatch):
    rollout, problems, chat = rollout_of(folder, family)
    found = rollout.generate(requests_for(problems, 1, LIMIT), Sampling())
    assert not rollout.warnings
    config = GenerationConfig(
        max_new_tokens=LIMIT, eos_token_id=rollout.end_ids, pad_token_id=0, do_sample=False,
        suppress_tokens=[chat.images.token_id],
    )  # fmt: skip
    for row, completion in enumerate(found):
        theirs = inputs_of(chat, row)
        assert completion.prompt_ids_T.tolist() == theirs["input_ids"][0].tolist()
        whole = rollout.model.generate(**theirs, generation_config=config)[0].tolist()
        assert ids_of([completion])[0] == whole[len(completion.prompt_ids_T) :], row
    drawn = rollout.generate(requests_for(problems, 3, LIMIT), WARM)
    assert problems[0].prompt_ids_T.tolist() == problems[3].prompt_ids_T.tolist()  # with another image
    assert not np.isin(np.concatenate([c.segments[0].ids_T for c in drawn]), chat.images.token_id).any()
    few = rollout_of(folder, family, batch_size=2)[0].generate(requests_for(problems, 3, LIMIT), WARM)
    monkeypatch.setattr(transformers, "why_not_of", lambda *_: "so the test wants it")
    monkeypatch.setattr(transformers, "why_not", lambda *_: "so the test wants it")
    plain_rollout = rollout_of(folder, family, batch_size=4)[0]
    plain = plain_rollout.generate(requests_for(problems, 3, LIMIT), WARM)
    assert len(plain_rollout.warnings) == 2 and "to prompts with images" in plain_rollout.warnings[1]
    assert ids_of(drawn) == ids_of(few) == ids_of(plain)
    for number, completions in enumerate(zip(drawn, few, plain, strict=True)):
        expected = logprobs_of(rollout.model, chat, number // 3, completions[0].segments[0].ids_T)
        for completion in completions:
            np.testing.assert_allclose(completion.segments[0].logprobs_T, expected, atol=1e-4)


def logprobs_of(model, chat, row, answer_T):
    """Of each token of the answer at the temperature of WARM, by one forward pass over what the processor makes."""
    given = inputs_of(chat, row)
    answer = torch.from_numpy(answer_T).long()[None]
    given["input_ids"] = torch.cat([given["input_ids"], answer], 1)
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in given:
            filling = torch.full_like(answer, int(name == "attention_mask"))
            given[name] = torch.cat([given[name], filling], 1)
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits[0, -answer.shape[1] - 1 : -1] / WARM.temperature
    return logits.log_softmax(-1).gather(1, answer[0][:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_stands_for_an_image_is_never_drawn_however_likely(temperature):
    logits_BV = torch.tensor([[0.0, 1.0, 9.0, 2.0]]).repeat(50, 1)
    uniforms_B = torch.linspace(0.01, 0.99, 50)
    ids_B, logprobs_B = draw(logits_BV, uniforms_B, Sampling(temperature, never=(2,)))
    assert set(ids_B.tolist()) == ({3} if temperature == 0 else {0, 1, 3})
    expected_BV = logits_BV.log_softmax(-1)  # over all tokens, as the trainer's are
    torch.testing.assert_close(logprobs_B, expected_BV.gather(1, ids_B[:, None])[:, 0])


def test_prompts_with_images_are_neither_shared_nor_cut_through(folder):
    _, problems, chat = rollout_of(folder, "qwen2_5_vl")
    (first, _, second, *_), length = problems, len(problems[2].prompt_ids_T)
    assert second.question == "[image 84x60][image 30x30]and in that one, 1 2 3?"
    begin = second.images[0].begin
    assert second.cut(begin + 1, length) is None and second.cut(0, second.images[1].end - 1) is None
    kept = second.cut(begin, length)
    at = kept.images[1]
    assert (kept.prompt_ids_T[at.begin : at.end] == chat.images.token_id).any() and at.begin == second.images[
        1
    ].begin - begin
    sources = tuple(image.source for image in first.images)
    samples = [
        Sample(row, first.prompt_ids_T, np.ones(len(first.prompt_ids_T), np.float32), prompt_length=5, images=sources)
        for row in range(4)
    ]
    limits = Limits(None, 1000, share=True, loader=ImageLoader(chat.images))
    (part,) = limits.parts(samples, alone())
    assert part.documents == [[0], [1], [2], [3]] and part.sees
    (packed,) = limits.packed(samples, [part])
    arrays = packed.images()
    assert len(arrays) == 4 and all(a["pixel_values"].shape == arrays[0]["pixel_values"].shape for a in arrays)
    blind = [Sample(s.row, s.ids_T[:5], s.weights_T[:5]) for s in samples]
    assert not limits.parts(blind, alone())[0].sees and limits.parts(blind, alone(), trains_vision=True)[0].sees


def test_what_fills_up_a_micro_batch_for_the_vision_tower_has_signals_of_zero(folder):
    _, _, chat = rollout_of(folder, "qwen2_5_vl")
    text = Sample(0, np.arange(60, 65, dtype=np.int32), np.ones(5, np.float32), {"advantages": np.ones(5, np.float32)})
    packed = ImageLoader(chat.images).pack([text, text], take_part=True)
    assert packed.num_tokens == 10 and len(packed.images()) == 2 and packed.num_filling == len(packed.ids_T) - 10
    for values_T in (packed.weights_T, packed.signals["advantages"]):
        assert values_T.tolist() == [1, 1, 1, 1, 0] * 2 + [0] * packed.num_filling


def test_images_of_answers_to_one_prompt_are_read_once(folder, monkeypatch):
    _, problems, chat = rollout_of(folder, "qwen2_5_vl")
    samples = [
        Sample(i, p.prompt_ids_T, np.ones(len(p.prompt_ids_T), np.float32), images=tuple(x.source for x in p.images))
        for i, p in enumerate([problems[0], problems[3], problems[1], problems[0]])
    ]
    loader, read = ImageLoader(chat.images), []
    monkeypatch.setattr(loader, "read", lambda sample: read.append(sample.row) or ImageLoader.read(loader, sample))
    first, third, _, again = loader.pack(samples, take_part=True).images()
    assert sorted(read) == [0, 1]
    assert np.array_equal(first["pixel_values"], again["pixel_values"])
    assert not np.array_equal(first["pixel_values"], third["pixel_values"])  # of as many pixels


def test_evaluation_answers_rows_with_images_and_names_them(folder):
    options = ["--model", folder / "qwen3_vl", "rollout.max_new_tokens=6", "reward.name=math"]
    said = run(["evaluate", *options, "--test_file", folder / "rows.jsonl", "--output", folder / "found.jsonl"], folder)
    assert "accuracy" in said
    lines = [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]
    assert [line.get("images") for line in lines] == [
        [str(folder / f"{row}-{place}.png") for place in range(len(sizes))] or None for row, sizes in enumerate(SIZES)
    ]
    assert lines[0]["prompt"][0]["content"] == [{"type": "image"}, {"type": "text", "text": TEXTS[0]}]
    rollout, problems, _ = rollout_of(folder, "qwen3_vl")
    expected = rollout.generate(requests_for(problems, 1, 6, 0), Sampling())
    assert [line["answer"] for line in lines] == [completion.text for completion in expected]
    said = run(["generate", *options, "--prompts", folder / "rows.jsonl", "--output", folder / "shown.jsonl"], folder)
    assert f"--- [image 60x84]{TEXTS[0]}" in said and "PNG" not in said
    said = run(["evaluate", *options, "--test_file", folder / "rows.jsonl", "rollout.name=vllm"], folder, code=2)
    assert "rollout.name=vllm" in said and "Choose rollout.name=transformers" in said


def test_grpo_learns_from_answers_to_images(folder):
    options = {
        "algorithm.adv_estimator": "grpo", "model.path": folder / "qwen2_5_vl", "data.train_files": folder / "rows.jsonl",
        "data.val_files": folder / "rows.jsonl", "data.train_batch_size": 5, "rollout.n": 4, "rollout.max_new_tokens": 8,
        "trainer.total_training_steps": 2, "trainer.test_freq": 2, "trainer.num_val_generations": 5,
        "reward.path": folder / "reward.py", "reward.name": "digits", "optim.lr": 3e-3, "trainer.sample_freq": 1,
        "trainer.default_local_dir": folder / "run", "algorithm.kl_coef": 0.01, "algorithm.ppo_mini_batch_size": 3,
    }  # fmt: skip
    said = run(["grpo", *(f"{key}={value}" for key, value in options.items())], folder, size=2)
    assert "[image " in said
    for line in records(folder / "run", "rollout"):
        assert line["logprob_gap"] < 1e-5, line
    assert all(np.isfinite(line["loss"]) for line in records(folder / "run"))
    samples = [json.loads(line) for line in (folder / "run" / "samples" / "step-1.jsonl").read_text().splitlines()]
    assert {len(line.get("images", [])) for line in samples} == {0, 1, 2}
    assert "val_reward" in json.dumps(records(folder / "run", "val"))
    said = run(
        [
            "evaluate",
            "--model",
            folder / "run",
            "--test_file",
            folder / "rows.jsonl",
            "--output",
            folder / "after.jsonl",
        ],
        folder,
    )
    assert "accuracy" in said or "could not be judged" in said


def test_validation_of_fine_tuning_answers_rows_with_images(folder):
    options = {
        "model.path": folder / "qwen3_vl", "data.train_files": folder / "answered.jsonl", "data.train_batch_size": 5,
        "data.val_files": folder / "answered.jsonl", "data.cache_dir": folder / "cache", "reward.name": "math",
        "trainer.num_val_generations": 5, "trainer.total_training_steps": 1, "trainer.test_freq": 1,
        "trainer.default_local_dir": folder / "tuned", "rollout.max_new_tokens": 4,
    }  # fmt: skip
    run(["sft", *(f"{key}={value}" for key, value in options.items())], folder)
    assert "val_accuracy" in json.dumps(records(folder / "tuned", "val"))
