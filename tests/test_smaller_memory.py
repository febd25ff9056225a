"""8-bit averages, a 4-bit base and offloaded activations: what each saves, and what it changes."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import FalconConfig

import forked
from conftest import Command, records
from posttrain.config.compose import compose
from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.distributed import device
from posttrain.engine.build import build_engine, count_weights
from posttrain.engine.check import check_export, probe
from posttrain.engine.export import assemble, export
from posttrain.engine.optimizer_8bit import SIGNED, UNSIGNED, decode, encode, threshold
from posttrain.errors import InputError
from posttrain.losses.sft import sft_loss
from posttrain.models.four_bit import FourBitLinear, pack, unpack
from posttrain.models.load import load_model
from posttrain.run.advice.memory import Needs, remedies
from test_lora import NoTokenizer
from tiny import alone, packed, random_samples, tiny_lm

SMALL = ("norm", "bias")
WIDER = {
    "override_config": {"hidden_size": 128, "intermediate_size": 256},
    "random_weights": True,
}  # tensors of 4096 and more


def engine_of(models, optimizer="adamw", lr=1e-2, dtype="float32", betas=(0.9, 0.95), **model):
    options = ModelOptions(path=str(models / "qwen2"), weights_dtype=dtype, **model)
    optim = OptimOptions(lr=lr, optimizer=optimizer, betas=betas)
    return build_engine(options, EngineOptions(), optim, 200, alone(), getattr(torch, dtype), packing=True, seed=0)


def train(engine, steps):
    losses = []
    for step in range(steps):
        losses.append(float(engine.forward_backward(packed(random_samples(6, seed=step % 4)), sft_loss).loss))
        engine.optim_step()
    return losses


# ---- 8-bit averages


@pytest.mark.parametrize("signed", [True, False])
def test_codes_keep_numbers_to_a_level_and_shards_of_rows_as_the_whole(signed):
    torch.manual_seed(0)
    numbers = torch.randn(6, 700) * torch.logspace(-9, 3, 6)[:, None]
    numbers = numbers if signed else numbers.square()
    numbers[2], numbers[3, :256] = 0, 0
    table, between = SIGNED if signed else UNSIGNED, threshold(5, 700, torch.device("cpu"))
    codes, scales = encode(numbers, table, between)
    found = decode(codes, scales, table)
    assert codes.shape == numbers.shape and codes.element_size() == 1 and scales.shape == (6, 3)
    assert torch.equal(found[2], numbers[2]) and torch.equal(found[3, :256], numbers[3, :256])
    far_from_0 = numbers.abs() > 1e-5 * numbers.abs().amax(1, keepdim=True)
    assert ((found / numbers - 1).abs()[far_from_0] < 0.12).all()
    assert signed or (found[numbers > 0] > 0).all()  # nothing is divided by 0
    parts = [encode(part, table, between) for part in numbers.split([1, 4, 1])]
    assert torch.equal(torch.cat([part[0] for part in parts]), codes)
    assert torch.equal(torch.cat([part[1] for part in parts]), scales)


def test_an_average_moves_though_each_change_is_less_than_a_level():
    """Nearest levels would leave it where it is: a thousandth of the way a step, where levels are a tenth apart."""
    torch.manual_seed(0)
    table, columns = UNSIGNED, 512
    exact = kept = torch.full((1, columns), 1e-3)
    kept[0, 0] = exact[0, 0] = 1.0  # the scale
    for step in range(1000):
        squares = torch.randn(1, columns).square() * 1e-2
        squares[0, 0] = 1.0
        exact = 0.999 * exact + 0.001 * squares
        kept = decode(*encode(0.999 * kept + 0.001 * squares, table, threshold(step, columns, exact.device)), table)
    roots = (kept / exact)[0, 1:].sqrt()
    assert abs(float(roots.mean()) - 1) < 0.02 and float(roots.std()) < 0.12


def test_losses_stay_by_those_of_adamw(models):
    kinds = ("adamw", "adamw_8bit")
    exact, coded = (torch.tensor(train(engine_of(models, kind, lr=2e-3, **WIDER), 40)) for kind in kinds)
    assert exact[-4:].mean() < exact[:4].mean() / 2
    gaps = coded - exact
    print(f"loss {exact[0]:.2f} to {exact[-1]:.2f}; largest gap {gaps.abs().max():.4f}, mean {gaps.mean():+.5f}")
    assert gaps[1] == 0  # the first step has no averages of before
    assert 0 < gaps.abs().max() < 0.02 and abs(float(gaps.mean())) < 0.002


def test_averages_of_bfloat16_weights_move_by_less_than_bfloat16_could(models):
    engine = engine_of(models, "adamw_8bit", dtype="bfloat16", betas=(0.9, 0.999), **WIDER)
    name = next(name for name, state in engine.optimizer.moments.items() if "exp_avg_codes" in state)
    weight, state = engine.optimizer.parameters[name], engine.optimizer.moments[name]
    assert weight.dtype == torch.bfloat16
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    norm = float(engine.optim_step().grad_norm)
    assert not torch.equal(weight, before)
    for _ in range(100):
        weight.grad = torch.zeros_like(weight)
        engine.optim_step()
    square = decode(state["exp_avg_sq_codes"], state["exp_avg_sq_scales"], UNSIGNED)
    assert float(square.mean()) == pytest.approx(0.001 / norm**2 * 0.999**100, rel=1e-3)


def test_averages_of_matrices_take_a_byte_each_and_small_tensors_keep_float32(models):
    engine = engine_of(models, "adamw_8bit", **WIDER)
    states = engine.optimizer.moments
    for name, state in states.items():
        is_small = engine.optimizer.parameters[name].numel() < 4096 or any(part in name for part in SMALL)
        assert ("exp_avg" in state) == is_small, name
    size = sum(t.numel() * t.element_size() for state in states.values() for t in state.values())
    weights = sum(p.numel() for p in engine.optimizer.parameters.values())
    print(f"{size / weights:.2f} bytes of averages a weight, of {weights:,}")
    assert size / weights < 2.2
    smallest = engine_of(models, "adamw_8bit").optimizer.moments
    assert all("exp_avg" in state for state in smallest.values())


def test_a_step_that_is_not_finite_moves_neither_codes_nor_weights(models, monkeypatch):
    engine = engine_of(models, "adamw_8bit", **WIDER)
    train(engine, 2)
    before = {name: t.clone() for part in engine.state().values() for name, t in part.items()}
    engine.forward_backward(packed(random_samples(3)), sft_loss)
    next(iter(engine.optimizer.parameters.values())).grad.fill_(math.inf)
    assert engine.optim_step().skipped == 1
    after = {name: t for part in engine.state().values() for name, t in part.items()}
    assert any(name.endswith("exp_avg_codes") for name in after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_may_be_moved_some_at_a_time(models, monkeypatch):
    whole = engine_of(models, "adamw_8bit", **WIDER)
    train(whole, 2)
    monkeypatch.setitem(device.DECODED_AT_ONCE, "cpu", 5000)
    pieces = engine_of(models, "adamw_8bit", **WIDER)
    pieces.optimizer.streams = True
    train(pieces, 2)
    for part, state in whole.state().items():
        for name, value in state.items():
            assert torch.equal(value, pieces.state()[part][name]), name


# ---- a 4-bit base


def test_packed_weights_are_the_nearest_of_16_levels_of_each_block():
    torch.manual_seed(0)
    weight = torch.randn(7, 200)
    packed_rows = pack(weight)
    assert packed_rows.dtype == torch.uint8 and packed_rows.shape == (7, 4 * 34)
    found = unpack(packed_rows, 200, torch.float32)
    error = (found - weight).norm() / weight.norm()
    assert 0.05 < error < 0.11  # NF4 of a normal distribution: about 9%
    assert torch.equal(pack(weight[2:5]), packed_rows[2:5])
    assert pack(weight[:0]).shape == (0, 4 * 34)  # of a layer with fewer rows than there are processes
    assert torch.equal(unpack(pack(found), 200, torch.float32), found)
    assert torch.equal(pack(torch.zeros(1, 5)), pack(unpack(pack(torch.zeros(1, 5)), 5, torch.float32)))


def test_gradients_go_through_a_packed_layer_as_through_its_weights():
    torch.manual_seed(0)
    plain = nn.Linear(96, 40).requires_grad_(False)
    layer = FourBitLinear(plain)
    plain.weight.copy_(unpack(layer.weight.view(torch.uint8), 96, torch.float32))
    ours, theirs = (torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    assert torch.equal(layer(ours), plain(theirs))
    layer(ours).square().sum().backward()
    plain(theirs).square().sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_a_4bit_base_is_trained_beside_and_exported_as_it_was_computed_with(models, tmp_path):
    engine = engine_of(models, lora_rank=4, load_in_4bit=True)
    layers = [name for name, m in engine.policy.lm.named_modules() if isinstance(m, FourBitLinear)]
    assert len(layers) == 14 and all(".layers." in name for name in layers)
    plain = engine_of(models, lora_rank=4)
    assert engine.num_weights() == plain.num_weights()
    assert count_weights(ModelOptions(path=str(models / "qwen2"), lora_rank=4), torch.float32, sees=False)[2] == sum(
        m.in_features * m.out_features for m in engine.policy.lm.modules() if isinstance(m, FourBitLinear)
    )
    row = probe(97)
    gaps = abs(engine.forward([row])[0] - plain.forward([row])[0])[row.weights_T > 0]
    print("log-probabilities differ from the full base's by", gaps.mean())
    assert 0 < gaps.mean() < 1
    losses = train(engine, 30)
    assert losses[-1] < losses[0]
    export(engine, NoTokenizer(), tmp_path / "out", torch.float32, [1])
    check_export(engine, tmp_path / "out", exact=True)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(".lora_" in name for part in engine.state().values() for name in part)
    assert {p.dtype for p in assemble(engine, torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("option", ["torch_compile", "enable_gradient_checkpointing"])
def test_a_4bit_base_goes_with_compiled_and_recomputed_blocks(models, option, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # a compiler takes a minute
    plain = engine_of(models, lora_rank=4, load_in_4bit=True)
    other = engine_of(models, lora_rank=4, load_in_4bit=True, **{option: True})
    assert train(other, 2) == pytest.approx(train(plain, 2), rel=1e-5)


def test_a_4bit_base_without_adapters_and_models_that_are_quantized_already_are_refused(tmp_path, models):
    with pytest.raises(InputError, match=r"model\.lora_rank=16"):
        compose(["model.load_in_4bit=true"])
    folder = tmp_path / "packed"
    tiny_lm().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quantized already \(gptq.*model\.load_in_4bit=true"):
        load_model(str(folder), dtype=torch.float32)


def test_a_model_without_layers_to_pack_is_refused(tmp_path):
    """Falcon's linear layers are of a class of its own."""
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    FalconConfig(**shape).save_pretrained(tmp_path)
    model = ModelOptions(path=str(tmp_path), random_weights=True, lora_rank=4, load_in_4bit=True)
    with pytest.raises(InputError, match=r"no frozen linear layer.*FalconDecoderLayer"):
        build_engine(model, EngineOptions(), OptimOptions(), 1, alone(), torch.float32, packing=False, seed=0)


def test_the_arithmetic_of_memory_knows_them():
    needs = Needs(
        num_weights=1000, num_trained=100, num_blocks=4, hidden=8, inner=16, shards=1, sharded=False, kept_bytes=4,
        computed_bytes=2, reference=False, tokens=10, longest=10, recompute_every=1, num_linear=800,
    )  # fmt: skip
    assert replace(needs, averages_in_8bit=True).averages == 200 * (1 + 4 / 256)
    assert needs.at_rest - replace(needs, in_4bit=True).at_rest == pytest.approx(800 * (2 - 34 / 64))
    assert needs.activations - replace(needs, activation_offload=True).activations == 10 * 2 * 8 * 2
    config = compose(["model.enable_gradient_checkpointing=true", "model.lora_rank=4"]).config
    said = "\n".join(remedies(needs, config, True, None))
    for option in ("model.enable_activation_offload=true", "model.load_in_4bit=true", "optim.optimizer=adamw_8bit"):
        assert option in said
    on_cpu = "\n".join(remedies(needs, config, False, None))
    assert "enable_activation_offload" not in on_cpu and "adamw_8bit" in on_cpu


# ---- runs


def run(tiny, folder, size, code=0, **options) -> str:
    given = {
        "data__train_batch_size": 8, "trainer__total_training_steps": 4, "optim__lr": 1e-2, "optim__optimizer": "adamw_8bit",
        "model__lora_rank": 64, "model__load_in_4bit": "true", "trainer__save_freq": 2, "trainer__max_ckpt_to_keep": "null",
        "trainer__device": "cpu", **options,
    }  # fmt: skip
    return forked.run(["sft", *Command(tiny, folder).sft_options(folder / "run", **given)], folder, size, code)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run of four steps on one process: 8-bit averages of adapters beside a 4-bit base."""
    forked.start_server()
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(tiny, folder, 1, model__enable_activation_offload="true", engine__reshard_after_forward="false")


def numbers(folder) -> list[float]:
    return [record["loss"] for record in records(folder / "run")]


def test_a_run_says_what_has_no_effect_here_and_learns(whole):
    folder, said = whole
    assert "model.enable_activation_offload" in said and "engine.reshard_after_forward: there is one process" in said
    losses = numbers(folder)
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_goes_on_from_its_checkpoint_on_any_number_of_processes(whole, tiny, tmp_path, size):
    folder, _ = whole
    run(tiny, tmp_path, size, trainer__resume_from_path=folder / "run" / "checkpoint-2")
    if size == 1:
        assert numbers(tmp_path) == numbers(folder)[2:]
        one, two = (load_file(f / "run" / "checkpoint-final" / "model.safetensors") for f in (folder, tmp_path))
        assert all(torch.equal(one[name], two[name]) for name in one)
    else:
        assert numbers(tmp_path) == pytest.approx(numbers(folder)[2:], rel=1e-4)


def test_a_checkpoint_of_another_optimizer_or_base_is_refused(whole, tiny, tmp_path):
    folder, _ = whole
    checkpoint = folder / "run" / "checkpoint-2"
    for number, changed in enumerate(({"optim__optimizer": "adamw"}, {"model__load_in_4bit": "false"})):
        place = tmp_path / str(number)
        place.mkdir()
        said = run(tiny, place, 1, code=2, trainer__resume_from_path=checkpoint, **changed)
        assert next(iter(changed)).replace("__", ".") in said, said


def test_eight_bits_need_no_adapters_and_shard_into_parts_that_are_not_alike(tiny, tmp_path):
    forked.start_server()
    places = {size: tmp_path / str(size) for size in (1, 3)}
    for size, place in places.items():
        place.mkdir()
        run(tiny, place, size, model__lora_rank=0, model__load_in_4bit="false", trainer__total_training_steps=2)
    assert numbers(places[3]) == pytest.approx(numbers(places[1]), rel=1e-4)
