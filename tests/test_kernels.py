"""Liger's kernels: what its package is asked for and what is said, by a pretended one; the numbers where Triton or a GPU is there."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, ModuleType

import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.distributed import device
from posttrain.engine.build import build_engine
from posttrain.engine.check import check_engine
from posttrain.errors import InputError
from posttrain.models.kernels import fused_parts, plainly, use_liger
from tiny import SHAPE, alone, make_engine, tiny_lm

FUSED = Path(__file__).with_name("fused.py")
needs_liger = pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")), reason="needs the packages liger-kernel and triton"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def doubling(module, hidden):
    """A norm that is wrong, as a kernel for another architecture would be."""
    return 2 * type(module).forward(module, hidden)


doubling.__module__ = "liger_kernel.pretended"


@pytest.fixture
def asked(monkeypatch):
    """The arguments of each call of Liger's patching, which replaces what Liger's does."""
    calls = []

    def patch(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        from transformers.models.qwen2 import modeling_qwen2

        calls.append({name: value for name, value in locals().items() if name not in ("calls", "modeling_qwen2")})
        modeling_qwen2.apply_rotary_pos_emb = lambda *_, **__: pytest.fail("a kernel for CUDA ran on the CPU")
        modeling_qwen2.Qwen2MLP = torch.nn.Identity
        norm = getattr(model, model.base_model_prefix, model).norm
        norm.forward, norm._get_name = MethodType(doubling, norm), lambda: "LigerRMSNorm"

    def nothing(model=None):
        calls.append({"model": model})

    def other_version(model=None):
        raise TypeError("expected another layer")

    names = (
        "",
        ".transformers",
        ".transformers.model",
        ".transformers.model.output_classes",
        ".transformers.monkey_patch",
    )
    for name in names:
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", ModuleType(f"liger_kernel{name}"))
    outputs = sys.modules["liger_kernel.transformers.model.output_classes"]
    sys.modules["liger_kernel.transformers.model"].output_classes = outputs
    known = {"qwen2": patch, "mistral": patch, "llama": nothing, "gemma2": other_version}
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN = known
    from transformers.models.qwen2 import modeling_qwen2

    for name in ("apply_rotary_pos_emb", "Qwen2MLP"):  # what `patch` changes is as it was after the test
        monkeypatch.setattr(modeling_qwen2, name, getattr(modeling_qwen2, name))
    return calls


def test_the_instance_is_patched_and_the_loss_stays_ours(asked):
    from transformers.models.qwen2 import modeling_qwen2

    lm, mlp = tiny_lm(), modeling_qwen2.Qwen2MLP
    assert fused_parts(lm) == []
    use_liger(lm)
    (call,) = asked
    assert call.pop("model") is lm
    assert call == {
        "rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False,
    }  # fmt: skip
    assert fused_parts(lm) == ["1 RMSNorm", "apply_rotary_pos_emb"]
    hidden = torch.ones(1, 2, 32) * 3
    fused = lm.model.norm(hidden)
    with plainly(lm):
        assert torch.equal(2 * lm.model.norm(hidden), fused) and fused_parts(lm) == []
    assert torch.equal(lm.model.norm(hidden), fused) and fused_parts(lm) == ["1 RMSNorm", "apply_rotary_pos_emb"]
    assert modeling_qwen2.Qwen2MLP is mlp  # models yet to be made are plain
    tiny_lm()(torch.tensor([[1, 2, 3]]))  # and on the CPU the rotary function is the plain one
    use_liger(tiny_lm())  # a second model, such as GRPO's reference
    tiny_lm()(torch.tensor([[1, 2, 3]]))


def test_a_kernel_that_computes_something_else_is_noticed_before_training(asked):
    lm = tiny_lm()
    engine = make_engine(lm)
    use_liger(lm)
    with pytest.raises(InputError, match=r"differ from the model's own by .*\. Set model\.use_liger=false"):
        check_engine(engine, torch.float32)


def test_the_language_model_of_an_architecture_that_liger_does_not_know_is_patched(asked):
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    text = SHAPE | {"model_type": "mistral"}
    lm = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    use_liger(lm)
    assert asked[0]["model"] is lm.model.language_model
    assert fused_parts(lm)[0] == "1 RMSNorm"


def test_what_cannot_be_patched_is_refused(asked):
    with pytest.raises(InputError, match=r"no kernels for qwen3, but for qwen2\. Set\s+model\.use_liger=false"):
        use_liger(tiny_lm("qwen3"))
    with pytest.raises(InputError, match=r"found nothing to change in LlamaForCausalLM\. Set model\.use_liger=false"):
        use_liger(tiny_lm("llama"))
    with pytest.raises(
        InputError, match=r"cannot change this Gemma2ForCausalLM: expected another layer\. Set model\.use_"
    ):
        use_liger(tiny_lm("gemma2"))


def test_a_missing_package_is_refused_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(InputError, match=r"liger-kernel cannot be imported .*pip install 'posttrain\[liger\]'"):
        use_liger(tiny_lm())


@pytest.mark.slow
@needs_liger
def test_its_kernels_compute_what_the_models_do(tmp_path):
    """In Triton's interpreter, in float32, for every family, with LoRA, with recomputation, and through vision towers."""
    answer = tmp_path / "gaps.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FUSED), str(answer)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(answer.read_text()).items():
        check_gaps(name, found)


@pytest.mark.gpu
@needs_liger
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_kernels_compute_what_the_models_do_on_a_gpu(dtype):
    from fused import TEXTS, compare_training

    cases = [(family, {}) for family in TEXTS]
    cases += [("qwen3", {"lora_rank": 4}), ("qwen3", {"enable_gradient_checkpointing": True})]
    for family, options in cases:
        found = compare_training(family, "cuda", dtype, **options)
        if dtype == torch.float32:
            check_gaps(family, found)
        else:
            assert found["mean"] < 0.05 and found["gradients"] < 0.2, (family, found)


@pytest.mark.gpu
@needs_liger
@needs_cuda
def test_its_kernels_see_images_as_the_models_do_on_a_gpu():
    from fused import WITH_IMAGES, compare_images

    for family in WITH_IMAGES:
        check_gaps(family, compare_images(family, "cuda"))


def check_gaps(name, found):
    assert found["parts"], name
    assert found["logprobs"] < 1e-4 and found["gradients"] < 1e-4, (name, found)


def test_a_compiled_model_does_without(monkeypatch):
    monkeypatch.setattr(device, "LIGER", ("cpu",))
    model = ModelOptions(path="m", use_liger=True, torch_compile=True)
    with pytest.raises(InputError, match=r"fuse the same operations.*Choose one of the two"):
        build_engine(model, EngineOptions(), OptimOptions(), 1, alone(), torch.float32, packing=True, seed=0)


def test_tensors_decide_which_function_computes_them(monkeypatch):
    monkeypatch.setattr(device, "LIGER", ("cpu",))
    from posttrain.models.kernels import Either

    either = Either(lambda x: x, lambda x: 2 * x)
    assert float(either(torch.ones(()))) == 2
    assert either(torch.ones((), device="meta")).device.type == "meta"
