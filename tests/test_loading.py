"""Sharded models read their parts of the files; what the files do not hold as the model does comes from one process."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.distributed import broadcast
from posttrain.distributed.device import choose_device
from posttrain.distributed.world import join_world
from posttrain.engine.build import build_engine
from posttrain.errors import InputError
from posttrain.models.load import empty_model, find_model, load_config, load_model, set_tables, tables
from posttrain.models.weights import FileWeights
from tiny import CONFIGS, tiny_lm
from tiny_vision import VISION_CONFIGS, write_tiny_vision_model

SHARDED = EngineOptions(param_offload=True)  # one process with a mesh


def weights_of(path, dtype=torch.float32, **model):
    with join_world(choose_device("cpu"), dtype, SHARDED) as world:
        engine = build_engine(
            ModelOptions(path=str(path), **model), SHARDED, OptimOptions(), 1, world, dtype, packing=True, seed=0
        )
        return {name: weight.clone() for name, weight in engine.named_weights()}


@pytest.mark.parametrize("family", CONFIGS)
def test_an_empty_model_has_the_tables_of_a_whole_one(models, family):
    empty, complete = empty_model(str(models / family), dtype=torch.float32)
    assert complete and all(p.is_meta for p in empty.parameters())
    found, expected = tables(empty), tables(tiny_lm(family))
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_more_layers_than_the_configuration_has_are_made_or_refused_by_name(models, tmp_path):
    for layers in (2, 9):
        assert len(load_config(str(models / "qwen2"), {"num_hidden_layers": layers}).layer_types) == layers
    config = load_config(str(models / "qwen2"), None)
    config.layer_types = ["sliding_attention", "full_attention"]
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path), {"num_hidden_layers": 1}).layer_types == ["sliding_attention"]
    with pytest.raises(
        InputError, match=r"num_hidden_layers=9: config.json says of 2 layers .* give model.override_config.layer_types"
    ):
        load_config(str(tmp_path), {"num_hidden_layers": 9})


def test_fields_of_a_part_of_the_configuration_are_replaced_one_by_one():
    path = find_model("posttrain/tiny-vision")
    plain = load_config(path, None)
    config = load_config(path, {"text_config": {"num_hidden_layers": 5}, "vision_config": {"depth": 1}})
    assert (config.text_config.num_hidden_layers, len(config.text_config.layer_types)) == (5, 5)
    assert config.vision_config.depth == 1
    assert config.text_config.hidden_size == plain.text_config.hidden_size
    with pytest.raises(InputError, match=r"model\.override_config\.text_config\.num_layers: .*has no such field"):
        load_config(path, {"text_config": {"num_layers": 5}})


def test_parts_are_read_from_files_without_loading_a_whole_model(models, monkeypatch):
    monkeypatch.setattr(broadcast.BroadcastWeights, "__init__", lambda *_: pytest.fail("a whole model was loaded"))
    expected = tiny_lm("llama").state_dict()
    found = weights_of(models / "llama")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", VISION_CONFIGS)
def test_vision_models_are_made_empty_and_read_in_parts_under_the_names_of_older_files(family, tmp_path):
    write_tiny_vision_model(tmp_path, family)
    empty, complete = empty_model(str(tmp_path), dtype=torch.float32)
    whole = load_model(str(tmp_path), dtype=torch.float32)
    assert complete
    expected = tables(whole)
    assert expected and all(torch.equal(table, expected[name]) for name, table in tables(empty).items())
    files = FileWeights.matching(tmp_path, empty)
    assert files is not None
    for name, weight in whole.named_parameters():
        first = tuple(slice(0, size - size // 2) for size in weight.shape)
        assert torch.equal(files.read(name, tuple(weight.shape), first), weight[first])


def test_weights_are_kept_in_the_format_asked_for(models):
    with join_world(choose_device("cpu"), torch.bfloat16, EngineOptions()) as world:
        for kept in ("float32", "bfloat16"):
            engine = build_engine(
                ModelOptions(path=str(models / "qwen2"), weights_dtype=kept), EngineOptions(), OptimOptions(), 1, world,
                torch.bfloat16, packing=True, seed=0,
            )  # fmt: skip
            assert {str(p.dtype) for p in engine.policy.parameters()} == {f"torch.{kept}"}
            assert {str(v.dtype) for n, v in engine.state()["optimizer"].items() if "exp_avg" in n} == {f"torch.{kept}"}
        lora = build_engine(
            ModelOptions(path=str(models / "qwen2"), lora_rank=2), EngineOptions(), OptimOptions(), 1, world,
            torch.bfloat16, packing=True, seed=0,
        )  # fmt: skip
    for name, parameter in lora.policy.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name


@pytest.mark.parametrize("change", ["pickled", "twice", "random"])
def test_files_that_transformers_must_translate_are_loaded_by_one_process(change, models, tmp_path, monkeypatch):
    lm = tiny_lm("llama")
    lm.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if change == "pickled":
        torch.save(load_file(file), tmp_path / "pytorch_model.bin")
        file.unlink()
    elif change == "twice":  # a file too many, as some folders have: transformers reads the one that it knows
        save_file(load_file(file), tmp_path / "other.safetensors", metadata={"format": "pt"})
    whole = []
    plain = broadcast.BroadcastWeights.__init__
    monkeypatch.setattr(broadcast.BroadcastWeights, "__init__", lambda *a: (whole.append(1), plain(*a))[1])
    found = weights_of(tmp_path, random_weights=change == "random")
    assert whole
    if change != "random":
        assert all(torch.equal(found[name], weight) for name, weight in lm.state_dict().items())
    else:
        again = weights_of(tmp_path, random_weights=True)
        assert all(torch.equal(found[name], again[name]) for name in found)


def test_files_of_another_shape_or_with_more_in_them_are_not_read_in_parts(models, tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    empty, _ = empty_model(str(models / "qwen2"), dtype=torch.float32)
    assert FileWeights.matching(tmp_path, empty) is not None
    kept = load_file(tmp_path / "model.safetensors")
    for change in ({"model.extra.weight_scale": torch.ones(1)}, {"model.norm.weight": torch.ones(7)}):
        save_file({**kept, **change}, tmp_path / "model.safetensors")
        assert FileWeights.matching(tmp_path, empty) is None


def test_tables_that_an_architecture_does_not_make_come_from_a_whole_model(models, monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(type(lm.base_model), "_init_weights", lambda self, module: None)
    empty, complete = empty_model(str(models / "qwen2"), dtype=torch.float32)
    assert not complete
    set_tables(empty, tables(lm))
    assert all(torch.equal(table, tables(lm)[name]) for name, table in tables(empty).items())


def test_layouts_that_cannot_work_are_refused_before_the_model_loads(models, monkeypatch):
    monkeypatch.setattr("posttrain.engine.build.load_model", lambda **_: pytest.fail("the model was loaded"))
    from tiny import alone

    def build(heads, packing=True):
        build_engine(
            ModelOptions(path=str(models / "three-key-heads")), EngineOptions(ulysses_sequence_parallel_size=heads),
            OptimOptions(), 1, alone(), torch.float32, packing=packing, seed=0,
        )  # fmt: skip

    with pytest.raises(InputError, match="6 attention heads cannot be dealt to 4 processes; 3 would do"):
        build(4)
    with pytest.raises(InputError, match=r"data\.packing=false"):
        build(2, packing=False)


@pytest.mark.parametrize(("option", "size"), [("fsdp_size", 3), ("ulysses_sequence_parallel_size", 2)])
def test_sizes_that_do_not_divide_the_processes_are_refused(monkeypatch, option, size):
    monkeypatch.setenv("WORLD_SIZE", str(processes := 4 if option == "fsdp_size" else 1))
    with (
        pytest.raises(InputError, match=f"{option}={size} does not divide the {processes} process"),
        join_world(choose_device("cpu"), torch.float32, EngineOptions(**{option: size})),
    ):
        pass


def test_one_copy_may_be_asked_to_be_shared_by_more_processes_than_there_are():
    with join_world(choose_device("cpu"), torch.float32, EngineOptions(fsdp_size=8)) as world:
        assert world.size == 1
