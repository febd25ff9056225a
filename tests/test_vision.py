"""A vision model on packed rows computes what transformers computes for each row by itself, in every layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import forked
from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.data.images.loader import ImageLoader
from posttrain.data.images.processor import ImageText
from posttrain.data.images.reading import decode
from posttrain.distributed.device import choose_device
from posttrain.distributed.world import World, join_world
from posttrain.engine.build import build_engine
from posttrain.engine.engine import Engine
from posttrain.engine.export import export_adapter
from posttrain.errors import InputError
from posttrain.loops.training_data import packed, trains_vision
from posttrain.losses.sft import sft_loss
from posttrain.models.attention import Documents
from posttrain.models.load import load_model, load_processor, model_class
from posttrain.models.lora import add_adapters, model_fingerprint
from posttrain.models.policy import Policy
from posttrain.models.vision import is_projector, vision_weights
from posttrain.records import Sample
from tiny import alone, clear, gradients
from tiny_vision import VISION_CONFIGS, image_samples, write_tiny_vision_model

LOSS_GAP, GRADIENT_GAP = 1e-6, 1e-5


@pytest.fixture(scope="session")
def seeing(tmp_path_factory) -> Path:
    """Folders with tiny vision models of several families."""
    folder = tmp_path_factory.mktemp("seeing")
    for family in VISION_CONFIGS:
        write_tiny_vision_model(folder / family, family)
    return folder


@dataclass(frozen=True)
class Layout:
    family: str = "qwen2_5_vl"
    sequence: int = 1
    fsdp_size: int | None = None
    recompute: bool = False
    compiled: bool = False
    options: tuple[tuple[str, object], ...] = ()  # of the model

    @property
    def engine(self) -> EngineOptions:
        return EngineOptions(fsdp_size=self.fsdp_size, ulysses_sequence_parallel_size=self.sequence)

    def model(self, seeing: Path) -> ModelOptions:
        recompute = {"enable_gradient_checkpointing": True} if self.recompute else {}
        return ModelOptions(
            path=str(seeing / self.family), torch_compile=self.compiled, **recompute, **dict(self.options)
        )


LORA = (("lora_rank", 4), ("lora_alpha", 8.0))
LAYOUTS = [
    Layout(),
    Layout("qwen3_vl"),
    Layout("gemma3"),
    Layout(sequence=2),
    Layout("qwen3_vl", sequence=2),
    Layout("gemma3", sequence=2),
    Layout(fsdp_size=1),
    Layout("qwen3_vl", recompute=True),
    Layout(options=(*LORA, ("lora_vision", True))),
    Layout(sequence=2, options=LORA),
    Layout(options=(("freeze_vision_tower", True),)),
]


def worst_gap(found: dict, expected: dict) -> float:
    """Largest ||g - g'|| / ||g'|| over the tensors; of those whose gradient is nothing but rounding (biases of keys, which attention
    does not feel) as a share of the whole gradient's."""
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-3 * whole)) for n in expected)


def images_of(layout: Layout, seeing: Path) -> ImageText:
    return ImageText(load_processor(str(seeing / layout.family)))


def build(layout: Layout, world: World, seeing: Path, images: ImageText, packing: bool = True) -> Engine:
    optim = OptimOptions(lr=1e-3, lr_scheduler_type="constant", lr_warmup_steps=0)
    return build_engine(
        layout.model(seeing), layout.engine, optim, 10, world, torch.float32,
        packing=packing, seed=0, images=images,
    )  # fmt: skip


def one_step(
    layout: Layout, engine: Engine, images: ImageText, samples: list[Sample], seeing: Path, **limits: int
) -> dict:
    loader = ImageLoader(images)
    micro_batches = packed(
        samples, engine.world, loader=loader, trains_vision=trains_vision(layout.model(seeing)), **limits
    )
    loader.expect(micro_batches)
    report = engine.forward_backward(micro_batches, sft_loss)
    found = {"loss": float(report.loss), "gradients": gradients(engine)}
    clear(engine)
    return found


def one_by_one(folder: Path, images: ImageText, samples: list[Sample]) -> dict:
    """The same loss and gradients by transformers alone, each row by itself with what the processor makes of it."""
    lm = load_model(str(folder), dtype=torch.float32).train()
    total, loss = sum(float(sample.weights_T[1:].sum()) for sample in samples), torch.zeros(())
    for sample in samples:
        ids = torch.from_numpy(sample.ids_T.astype(np.int64))[None]
        seen: dict = {}
        if sample.images:
            made = images.processor(
                text=[images.mark * len(sample.images)],
                images=[[decode(image) for image in sample.images]],
                return_tensors="pt",
            )
            types = [name for name in ("mm_token_type_ids", "token_type_ids") if name in made]
            seen = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask", *types)}
            seen |= {name: (ids == lm.config.image_token_id).int() for name in types}
        logits = lm(input_ids=ids, use_cache=False, **seen).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        loss = loss - (logprobs * torch.from_numpy(sample.weights_T[1:])).sum() / total
    loss.backward()
    weights = {name: weight.grad for name, weight in lm.named_parameters() if weight.grad is not None}
    return {"loss": loss.item(), "gradients": weights}


@pytest.mark.parametrize("family", VISION_CONFIGS)
def test_packed_rows_with_images_learn_what_transformers_learns_one_by_one(family, seeing):
    layout = Layout(family)
    images = images_of(layout, seeing)
    samples = image_samples(images, 6)
    expected = one_by_one(seeing / family, images, samples)
    seen = [name for name, _ in vision_weights(load_model(str(seeing / family), dtype=torch.float32))]
    assert any(expected["gradients"][name].norm() > 1e-3 for name in seen if name in expected["gradients"])
    for packing in (True, False):
        found = one_step(layout, build(layout, alone(), seeing, images, packing), images, samples, seeing)
        assert found["loss"] == pytest.approx(expected["loss"], rel=LOSS_GAP)
        assert worst_gap(found["gradients"], expected["gradients"]) < GRADIENT_GAP


def test_how_rows_with_images_become_micro_batches_changes_nothing(seeing):
    layout = Layout()
    images = images_of(layout, seeing)
    samples = image_samples(images, 7)
    engine = build(layout, alone(), seeing, images)
    whole = one_step(layout, engine, images, samples, seeing)
    for limits in ({"max_rows": 1}, {"max_rows": 3}, {"max_tokens": 60}):
        found = one_step(layout, engine, images, samples, seeing, **limits)
        assert found["loss"] == pytest.approx(whole["loss"], rel=LOSS_GAP)
        assert worst_gap(found["gradients"], whole["gradients"]) < GRADIENT_GAP


def test_a_step_without_images_gives_what_sees_a_gradient_of_zero(seeing):
    layout = Layout()
    images = images_of(layout, seeing)
    texts = [sample for sample in image_samples(images, 9) if not sample.images]
    engine = build(layout, alone(), seeing, images)
    found = one_step(layout, engine, images, texts, seeing)["gradients"]
    for name, _ in vision_weights(engine.policy.lm):
        assert not found[name].any()
    assert packed(texts, alone(), loader=ImageLoader(images), trains_vision=True)[0].num_tokens == sum(map(len, texts))


def worker(rank: int, size: int, seeing: Path, results: Path) -> None:
    torch.set_num_threads(1)
    for number, layout in enumerate(LAYOUTS):
        forked.meet_again(number)
        with join_world(choose_device("cpu"), torch.float32, layout.engine) as world:
            images = images_of(layout, seeing)
            engine = build(layout, world, seeing, images)
            found = [one_step(layout, engine, images, samples, seeing, **limits) for samples, limits in STEPS(images)]
            if rank == 0:
                torch.save(found, results / f"{number}.pt")


def STEPS(images: ImageText) -> list:
    """All kinds of rows; a process without an image; a step without any; a row that processes share, and nothing else."""
    mixed = image_samples(images, 6)
    texts = [sample for sample in image_samples(images, 9, seed=1) if not sample.images]
    return [
        (mixed, {}), (mixed, {"max_rows": 1}), ([mixed[0], mixed[2]], {"max_rows": 1}), (texts, {}), ([mixed[1]], {}),
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_see_and_learn_what_one_does(seeing, tmp_path):
    torch.set_num_threads(1)
    forked.start_server()
    group = forked.start(worker, 2, seeing, tmp_path, said=tmp_path / "said")
    group.ends([0, 0], seconds=400)
    for number, layout in enumerate(LAYOUTS):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=False)
        plain = replace(layout, sequence=1, fsdp_size=None, recompute=False)
        images = images_of(layout, seeing)
        engine = build(plain, alone(), seeing, images)
        for step, (samples, _) in zip(found, STEPS(images), strict=True):
            expected = one_step(plain, engine, images, samples, seeing)
            assert step["loss"] == pytest.approx(expected["loss"], rel=LOSS_GAP), layout
            assert worst_gap(step["gradients"], expected["gradients"]) < GRADIENT_GAP, layout


def test_tower_and_projector_are_frozen_each_on_its_own(seeing):
    images = images_of(Layout(), seeing)
    samples = image_samples(images, 3)
    for options, learn in (
        ((("freeze_vision_tower", True),), {"projector"}),
        ((("freeze_projector", True),), {"tower"}),
        ((("freeze_vision_tower", True), ("freeze_projector", True)), set()),
    ):
        layout = Layout(options=options)
        engine = build(layout, alone(), seeing, images)
        found = one_step(layout, engine, images, samples, seeing)["gradients"]
        sees = {
            "projector" if is_projector(name) else "tower"
            for name, _ in vision_weights(engine.policy.lm)
            if name in found
        }
        assert sees == learn
        assert any("language_model" in name for name in found)


def test_adapters_stand_on_the_language_part_or_on_both(seeing):
    for family in ("qwen2_5_vl", "gemma3"):
        for both in (False, True):
            layout = Layout(family, options=(*LORA, ("lora_vision", both)))
            engine = build(layout, alone(), seeing, images_of(layout, seeing))
            names = [name for name, weight in engine.policy.lm.named_parameters() if weight.requires_grad]
            assert all("lora_" in name for name in names)
            assert any("language_model" in name for name in names)
            assert any("visual" in name or "vision_tower" in name for name in names) == both
    adapted, frozen = (
        Layout(options=LORA).model(seeing),
        Layout(options=(*LORA, ("freeze_projector", True))).model(seeing),
    )
    config = engine.policy.lm.config
    assert model_fingerprint(config, adapted) == model_fingerprint(config, frozen)  # all but adapters is frozen in both


def test_adapters_of_what_sees_are_gone_on_with_whether_a_step_has_images_or_not(seeing, tmp_path):
    images = images_of(Layout(), seeing)
    texts = [sample for sample in image_samples(images, 9) if not sample.images]
    export_adapter(build(Layout(options=(*LORA, ("lora_vision", True))), alone(), seeing, images), tmp_path)
    layout = Layout(options=(("lora_adapter_path", str(tmp_path / "adapter")),))
    engine = build(layout, alone(), seeing, images)
    trained = {name for name, weight in engine.policy.lm.named_parameters() if weight.requires_grad}
    assert one_step(layout, engine, images, texts, seeing)["gradients"].keys() == trained
    assert any("visual" in name for name in trained)


def test_adapters_leave_out_a_projector_that_is_one_layer(seeing):
    lm = load_model(str(seeing / "llava"), dtype=torch.float32)
    lm.model.multi_modal_projector = torch.nn.Linear(8, 8)
    add_adapters(lm, ModelOptions(lora_rank=4, lora_alpha=8.0), torch.float32)
    adapted = [name for name, weight in lm.named_parameters() if weight.requires_grad]
    assert adapted and not any("multi_modal_projector" in name for name in adapted)


def test_a_vision_model_caps_its_logits_as_its_language_model_is_told_to():
    from transformers import Gemma4Config

    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
              "global_head_dim": 16}  # fmt: skip
    config = Gemma4Config(
        text_config={**narrow, "num_hidden_layers": 6, "vocab_size": 300, "hidden_size_per_layer_input": 0,
                     "num_kv_shared_layers": 0, "final_logit_softcapping": 0.1},
        vision_config={**narrow, "num_hidden_layers": 1}, audio_config=None, image_token_id=299,
    )  # fmt: skip
    policy = Policy(model_class(config).from_config(config, dtype=torch.float32)).eval()
    ids, chosen = torch.arange(3, 15), torch.arange(12)
    with torch.no_grad():
        ours, _ = policy(ids, chosen, ids, chosen, Documents.of((12,), ids.device))
        theirs = policy.reference_logprobs(ids, ids, [12])
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_text_model_has_nothing_to_freeze(models):
    model = ModelOptions(path=str(models / "qwen2"), freeze_vision_tower=True)
    with pytest.raises(InputError, match="freeze_vision_tower: Qwen2ForCausalLM has no such part"):
        build_engine(model, EngineOptions(), OptimOptions(), 1, alone(), torch.float32, packing=True, seed=0)
