"""Liger's kernels: what its package is asked for, by a pretended one, as the real one needs a GPU."""

import sys
from types import ModuleType

import pytest
import torch

from posttrain.errors import InputError
from posttrain.models.kernels import use_liger
from tiny import tiny_lm


@pytest.fixture
def asked(monkeypatch):
    """The arguments of each call of Liger's patching, which replaces what Liger's does."""
    calls = []

    def patch(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        from transformers.models.qwen2 import modeling_qwen2

        calls.append({name: value for name, value in locals().items() if name not in ("calls", "modeling_qwen2")})
        modeling_qwen2.apply_rotary_pos_emb = lambda *_, **__: pytest.fail("a kernel for CUDA ran on the CPU")
        modeling_qwen2.Qwen2MLP = torch.nn.Identity
        model.model.norm.forward = lambda hidden: hidden

    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": patch}
    from transformers.models.qwen2 import modeling_qwen2

    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", modeling_qwen2.apply_rotary_pos_emb)
    return calls


def test_the_instance_is_patched_and_the_loss_stays_ours(asked):
    from transformers.models.qwen2 import modeling_qwen2

    lm, mlp = tiny_lm(), modeling_qwen2.Qwen2MLP
    use_liger(lm)
    (call,) = asked
    assert call.pop("model") is lm
    assert call == {
        "rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False,
    }  # fmt: skip
    hidden = torch.ones(1, 2, 32) * 3
    assert torch.equal(lm.model.norm(hidden), hidden)  # the instance's own norm is another one now
    assert modeling_qwen2.Qwen2MLP is mlp  # models yet to be made are plain
    tiny_lm()(torch.tensor([[1, 2, 3]]))  # and on the CPU the rotary function is the plain one


def test_an_unknown_architecture_is_refused(asked):
    with pytest.raises(InputError, match=r"no kernels for qwen3, but for qwen2\. Set\s+model\.use_liger=false"):
        use_liger(tiny_lm("qwen3"))


def test_a_missing_package_is_refused_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(InputError, match=r"liger-kernel cannot be imported .*pip install 'posttrain\[liger\]'"):
        use_liger(tiny_lm())
