"""Adapters: peft's own format in and out, merged exactly, nothing else moves."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhimoeConfig, Qwen3MoeConfig

import forked
from conftest import Command, records
from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.engine.build import build_engine
from posttrain.engine.check import check_export, probe
from posttrain.engine.export import export
from posttrain.errors import InputError, RunError
from posttrain.losses.sft import sft_loss
from tiny import SHAPE, VOCABULARY, alone, packed, random_samples, tiny_lm


def engine_of(models, seed=0, dtype=torch.float32, **options):
    model = ModelOptions(path=str(models / "qwen2"), **options)
    return build_engine(model, EngineOptions(), OptimOptions(lr=1e-2), 10, alone(), dtype, packing=True, seed=seed)


class NoTokenizer:
    pad_token_id = 0

    def save_pretrained(self, folder):
        pass


def train(engine, steps=3):
    for seed in range(steps):
        engine.forward_backward(packed(random_samples(5, seed=seed)), sft_loss)
        engine.optim_step()


def logprobs(model) -> torch.Tensor:
    row = probe(VOCABULARY)
    ids = torch.from_numpy(row.ids_T)
    with torch.no_grad():
        return torch.cat([model(input_ids=part[None]).logits[0] for part in ids.split(row.lengths_N)]).log_softmax(-1)


def test_a_trained_adapter_and_the_merged_model_are_what_peft_and_transformers_load(models, tmp_path):
    engine = engine_of(models, lora_rank=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    train(engine)
    export(engine, NoTokenizer(), tmp_path / "out", torch.float32, [1])
    check_export(engine, tmp_path / "out", exact=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(models / "qwen2")
    started = logprobs(base)
    by_peft = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert torch.allclose(logprobs(by_peft), logprobs(merged), atol=1e-4)
    assert (logprobs(merged) - started).abs().max() > 0.05
    said = json.loads((tmp_path / "out" / "adapter" / "base.json").read_text())
    assert said["model"] == str(models / "qwen2") and len(said["fingerprint"]) == 16


def test_only_adapters_learn_and_only_they_are_saved(models):
    engine = engine_of(models, lora_rank=4)
    before = {name: p.clone() for name, p in engine.policy.lm.named_parameters()}
    train(engine, 2)
    for name, parameter in engine.policy.lm.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    assert all(".lora_" in name for part in engine.state().values() for name in part)


def test_a_new_adapter_changes_nothing_yet_and_depends_on_the_seed_alone(models):
    one, same, other = (engine_of(models, seed=seed, lora_rank=4) for seed in (3, 3, 4))
    plain = AutoModelForCausalLM.from_pretrained(models / "qwen2").state_dict()
    for name, weight in one.named_weights():
        assert torch.equal(weight, plain[name]), name
    first, again, third = (dict(engine.named_adapter()) for engine in (one, same, other))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_an_adapter_goes_on_as_peft_saved_it(models):
    engine = engine_of(models, lora_adapter_path=str(models / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(models / "qwen2")
    expected = PeftModel.from_pretrained(base, models / "adapter").merge_and_unload().state_dict()
    for name, weight in engine.named_weights():
        assert torch.allclose(weight, expected[name], atol=1e-6), name


def test_dropout_of_adapters_acts_in_training_alone(models):
    engine = engine_of(models, lora_adapter_path=None, lora_rank=4, lora_dropout=0.5)
    train(engine, 1)
    batch = packed(random_samples(4))
    losses = []
    for step in (5, 5, 6):
        engine.step = step
        losses.append(float(engine.forward_backward(batch, sft_loss).loss))
    assert losses[0] == losses[1] != losses[2]
    (first,), (second,) = engine.forward(batch), engine.forward(batch)
    assert (first == second).all()


def test_the_base_is_known_by_its_weights(models, tmp_path):
    one = engine_of(models, lora_rank=4).adapters
    copy = tiny_lm()
    copy.save_pretrained(tmp_path / "copy")
    with torch.no_grad():
        copy.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    copy.save_pretrained(tmp_path / "other")
    fingerprints = []
    for name in ("copy", "other"):
        model = ModelOptions(path=str(tmp_path / name), lora_rank=4)
        engine = build_engine(model, EngineOptions(), OptimOptions(), 1, alone(), torch.float32, packing=True, seed=0)
        fingerprints.append(engine.adapters.base_fingerprint)
    assert one.base_fingerprint == fingerprints[0] != fingerprints[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_rank": 4, "target_modules": ["lm_head"]}, r"lm_head cannot have an adapter.*\[q_proj,k_proj"),
        ({"lora_rank": 4, "target_modules": ["embed_tokens"]}, "embed_tokens cannot have an adapter"),
        ({"lora_rank": 4, "target_modules": ["no_such_layer"]}, "no_such_layer"),
        ({"lora_adapter_path": "/nowhere"}, "no adapter of peft"),
    ],
    ids=str,
)
def test_layers_that_cannot_have_an_adapter_are_refused(models, options, said):
    with pytest.raises(InputError, match=said):
        engine_of(models, **options)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_mixture_of_experts_has_adapters_beside_all_its_linear_layers(in_4bit, tmp_path):
    """Its experts are fused into one tensor, which peft's own all-linear would mean too."""
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SHAPE, **experts, head_dim=8)).save_pretrained(tmp_path / "qwen2")
    engine = engine_of(tmp_path, lora_rank=4, load_in_4bit=in_4bit)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in engine.named_adapter()}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    train(engine)
    export(engine, NoTokenizer(), tmp_path / "out", torch.float32, [1])
    check_export(engine, tmp_path / "out", exact=True)
    merged, base = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "qwen2"))
    if not in_4bit:
        by_peft = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
        assert torch.allclose(logprobs(by_peft), logprobs(merged), atol=1e-4)


def test_routers_have_no_adapters(tmp_path):
    """Phi-3.5-MoE's is a linear layer that gives a tuple."""
    AutoModelForCausalLM.from_config(PhimoeConfig(**SHAPE, num_local_experts=2)).save_pretrained(tmp_path / "qwen2")
    engine = engine_of(tmp_path, lora_rank=4)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, _ in engine.named_adapter()} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    train(engine)


def test_an_adapter_of_another_kind_or_for_another_model_is_refused(models, tmp_path):
    get_peft_model(tiny_lm(), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "dora"
    )
    with pytest.raises(InputError, match="use_dora"):
        engine_of(models, lora_adapter_path=str(tmp_path / "dora"))
    model = ModelOptions(path=str(models / "three-key-heads"), lora_adapter_path=str(models / "adapter"))
    with pytest.raises(InputError, match="was it made for this model"):
        build_engine(model, EngineOptions(), OptimOptions(), 1, alone(), torch.float32, packing=True, seed=0)


def test_an_export_that_is_not_what_was_trained_is_noticed(models, tmp_path):
    engine = engine_of(models, lora_rank=4)
    train(engine)
    AutoModelForCausalLM.from_pretrained(models / "qwen2").save_pretrained(tmp_path / "base given back")
    with pytest.raises(RunError, match="not what was trained"):
        check_export(engine, tmp_path / "base given back", exact=True)


def lora_run(tiny, folder, size, code=0, **options) -> str:
    """What a run of six steps said; saved after three."""
    given = {"model__lora_rank": 4, "trainer__total_training_steps": 6, "trainer__save_freq": 3, "optim__lr": 1e-2}
    arguments = Command(tiny, folder.parent).sft_options(str(folder), **given | options)
    return forked.run(["sft", *arguments], folder.parent, size, code)


@pytest.mark.slow
def test_a_run_with_adapters_leaves_them_in_every_checkpoint_and_goes_on_beside_the_same_base_only(tiny, tmp_path):
    forked.start_server()
    one, two = tmp_path / "one", tmp_path / "two"
    lora_run(tiny, one, 1)
    lora_run(tiny, two, 2, engine__ulysses_sequence_parallel_size=2)
    losses = [[r["loss"] for r in records(run)] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]
    tokens = [[r["num_tokens"] for r in records(run)] for run in (one, two)]
    assert tokens[0] == tokens[1]

    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    merged = load_file(one / "checkpoint-final" / "model.safetensors")
    by_peft = PeftModel.from_pretrained(base, one / "checkpoint-final" / "adapter").merge_and_unload().state_dict()
    assert all(torch.allclose(weight, by_peft[name], atol=1e-5) for name, weight in merged.items())
    adapter = load_file(one / "checkpoint-6" / "adapter" / "adapter_model.safetensors")
    assert sum(w.numel() for w in adapter.values()) < sum(w.numel() for w in merged.values()) / 4
    for model in (tiny / "model", one):  # the base, and a run whose answers would be taken for the adapter's
        asked = ["evaluate", "--model", model, "--test_file", tiny / "test.parquet"]
        said = forked.run([*asked, f"model.lora_adapter_path={two}/checkpoint-final/adapter"], tmp_path, code=2)
        assert f"the one that has it merged, {two}/checkpoint-final, by --model" in said
    size = sum(file.stat().st_size for file in (one / "checkpoint-6").rglob("*"))
    assert size < sum(4 * w.numel() for w in merged.values()) / 3, "frozen weights were saved"

    other = tmp_path / "other"
    shutil.copytree(tiny / "model", other)
    file = other / "model.safetensors"
    changed = {name: weight * 1.01 for name, weight in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    for name in ("checkpoint-6", "checkpoint-final"):
        shutil.rmtree(one / name)
    assert "holds an adapter for" in lora_run(tiny, one, 1, code=2, model__path=other)
    assert "resumed from" in lora_run(tiny, one, 1)
    assert [r["loss"] for r in records(one)] == losses[0]
