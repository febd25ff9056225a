"""Only distributed/device.py knows devices by name, and a device that torch learns of later is used throughout."""

import ast
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import free_port, records
from pictures import picture
from posttrain.distributed.device import Device, choose_device, measured_matmul_flops
from posttrain.errors import InputError
from test_house import FILES, SOURCE
from tiny_vision import write_tiny_vision_model

# ---- who knows devices

DEVICES = ["cpu", "cuda", "hip", "hpu", "mlu", "mps", "mtia", "musa", "npu", "xla", "xpu"]
BACKENDS = ["gloo", "nccl", "hccl", "xccl"]
# a name alone, with its number (cuda:0) or backend, or as the value of an option (trainer.device=cpu); sentences are free
ONE = rf"({'|'.join(DEVICES + BACKENDS)})(:(\d+|{'|'.join(BACKENDS)}))?"
NAMED = re.compile(rf"(.*device=)?{ONE}(,{ONE})*", re.IGNORECASE)
VARIABLE = re.compile(r"[A-Z_]*(VISIBLE_DEVICES|AFFINITY_MASK)|(NCCL|HCCL|ASCEND|CUDA|PYTORCH_(CUDA|NPU))_[A-Z_]+")
# what starts processes asks which variables a scheduler has set, and imports no torch
MAY_NAME_VARIABLES = SOURCE / "launch" / "plan.py"
ATTRIBUTES = {name for device in DEVICES if device != "cpu" for name in (device, f"is_{device}")} | {
    "is_cpu",
    "pin_memory",
}


def names_of_devices(tree: ast.AST, variables: bool = True) -> list[str]:
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if NAMED.fullmatch(text) or (variables and VARIABLE.fullmatch(text)):
                found.append(f"line {node.lineno}: {text!r}")
            case ast.Attribute(attr=name) if name in ATTRIBUTES:
                found.append(f"line {node.lineno}: .{name}")
            case ast.keyword(arg="pin_memory", value=ast.Constant(value=True)):
                found.append(f"line {node.lineno}: pin_memory=True")
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                modules = [getattr(node, "module", None) or "", *(alias.name for alias in names)]
                parts = {part.removeprefix("torch_") for module in modules for part in module.split(".")}
                found += [f"line {node.lineno}: imports {part}" for part in parts & set(DEVICES)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_one_file_names_devices(path):
    if path != SOURCE / "distributed" / "device.py":
        assert names_of_devices(ast.parse(path.read_text()), path != MAY_NAME_VARIABLES) == []


@pytest.mark.parametrize(
    "code", ['x.to("cpu")', "x.is_cuda", "torch.cuda.synchronize()", "x.cuda()", "import torch_npu", "x.pin_memory()",
             "from torch import xpu", "import torch.cuda", 'd == "cuda:0"', 'Literal["auto", "npu"]', '"trainer.device=cpu"',
             "torch.backends.mps", 'init_process_group("nccl")', "DataLoader(rows, pin_memory=True)",
             'os.environ["ASCEND_RT_VISIBLE_DEVICES"]', 'E = "CUDA_VISIBLE_DEVICES"', 'd.type == "npu"', "x.npu()", 'f("cpu:gloo,npu:hccl")'],
)  # fmt: skip
def test_naming_a_device_is_found(code):
    assert names_of_devices(ast.parse(code))


def test_sentences_may_name_devices():
    assert not names_of_devices(ast.parse('"""On cuda, by nccl; on cpu by gloo."""\nx.cpu().numpy()\nf(pin_memory=x)'))


# ---- what cannot be used is refused with what was found


def test_an_unknown_device_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match=r"trainer\.device=gpu: torch .* finds .* Expected one of auto, cpu"):
        choose_device("gpu")


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_an_npu_without_its_package_is_refused_with_what_to_install():
    with pytest.raises(InputError, match=r"trainer\.device=npu needs the package torch_npu"):
        choose_device("npu")


def test_processes_on_a_device_without_a_backend_are_refused():
    with pytest.raises(InputError, match=r"torch\.distributed has no backend for meta devices"):
        _ = Device(torch.device("meta")).backend


def test_the_measured_rate_is_that_of_a_matrix_product():
    assert 1e8 < measured_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.02) < 1e15


# ---- a device that torch learns of later

TEAPOT = Path(__file__).parent / "teapot"
STEPS = 3


@pytest.fixture(scope="module")
def library() -> Path:
    """The pretended accelerator, compiled once for each torch and each change of its source."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux to build the pretended accelerator")
    source = (TEAPOT / "device.cpp").read_bytes()
    key = hashlib.sha256(source + torch.__version__.encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"posttrain-teapot-{key}.so"
    if not built.exists():
        torch_folder = Path(torch.__file__).parent
        include = torch_folder / "include"
        aside = built.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [compiler, "-std=c++20", "-O0", "-w", "-fPIC", "-shared",
             f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
             f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", str(TEAPOT / "device.cpp"),
             "-o", str(aside), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"],
            check=True,
        )  # fmt: skip
        aside.rename(built)
    return built


class Kitchen:
    """Runs run.py where the package torch_<name> brings the device to torch."""

    def __init__(self, tiny: Path, folder: Path, library: Path):
        self.tiny, self.folder, self.library = tiny, folder, library

    def options(self, run: str, device: str, **more: object) -> list[str]:
        given = {
            "model.path": self.tiny / "model", "model.dtype": "float32", "data.train_files": self.tiny / "train.parquet",
            "data.val_files": self.tiny / "test.parquet", "data.cache_dir": self.tiny / "cache",
            "data.train_batch_size": 8, "data.max_tokens_per_gpu": 1024, "optim.lr": 1e-2, "optim.clip_grad": 0.1,
            "trainer.default_local_dir": self.folder / run, "trainer.device": device, "trainer.save_freq": -1,
            "trainer.total_training_steps": STEPS, "trainer.val_before_train": "false", "trainer.num_val_generations": 2,
            "rollout.max_new_tokens": 4, **{name.replace("__", "."): value for name, value in more.items()},
        }  # fmt: skip
        return [f"{name}={value}" for name, value in given.items()]

    def run(self, name: str, runs: list, processes: int = 1, autoload: bool = True) -> list[dict]:
        """The reports of all processes."""
        place = self.folder / f"site-{name}-{processes}"
        facts = place / f"torch_{name}-1.0.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_{name}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[torch.backends]\ntorch_{name} = torch_{name}:autoload\n")
        shutil.copy(TEAPOT / "package.py", place / f"torch_{name}.py")
        (place / "device.so").symlink_to(self.library)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload))}
        environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE.parent), str(place)])
        if processes > 1:
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        started = [
            subprocess.Popen(
                [sys.executable, str(TEAPOT / "run.py"), str(place), json.dumps(runs)],
                env={**environment, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(processes)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=240)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
        return [json.loads((place / f"report-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def kitchen(tiny, tmp_path_factory, library) -> Kitchen:
    return Kitchen(tiny, tmp_path_factory.mktemp("teapot"), library)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, object]:
    """Options of a run on rows with images, with the averages in 8 bits."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    lines = []
    for row in range(12):
        picture(*rng.integers(30, 120, 2), seed=row).save(folder / f"{row}.png")
        answer = {"role": "assistant", "content": "the circle is red"}
        messages = [{"role": "user", "content": f"<image>which colour is shape {row}"}, answer]
        lines.append(json.dumps({"messages": messages, "images": [f"{row}.png"]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    model = write_tiny_vision_model(folder / "model", "qwen2_5_vl")
    return {"model__path": model, "data__train_files": folder / "rows.jsonl", "data__val_files": folder / "rows.jsonl",
            "optim__optimizer": "adamw_8bit", "trainer__num_val_generations": 0}  # fmt: skip


@pytest.fixture(scope="module")
def one_process(kitchen, images) -> dict:
    """The same fine-tuning on the CPU and, found by itself, on the teapot that torch loaded by its entry point."""
    more = {"model__enable_gradient_checkpointing": "true", "model__enable_activation_offload": "true",
            "trainer__num_val_generations": 0}  # fmt: skip
    (report,) = kitchen.run(
        "teapot",
        [
            ["cpu", kitchen.options("cpu", "cpu")],
            ["teapot", kitchen.options("teapot", "auto")],
            ["offload", kitchen.options("offload", "auto", **more)],
            ["adapters-cpu", kitchen.options("adapters-cpu", "cpu", model__lora_rank=4)],
            ["images-cpu", kitchen.options("images-cpu", "cpu", **images)],
            ["images", kitchen.options("images", "auto", **images)],
        ],
    )
    return report


def same_numbers(kitchen, run: str, as_of: str = "cpu") -> bool:
    expected, found = records(kitchen.folder / as_of), records(kitchen.folder / run)
    assert len(found) == STEPS
    for step in range(STEPS):
        for name in ("loss", "grad_norm", "num_tokens", "num_trained_tokens"):
            assert found[step][name] == pytest.approx(expected[step][name], rel=1e-4), (step, name)
        assert expected[step]["grad_norm"] > 0.2  # clipping at 0.1 matters
    validated = records(kitchen.folder / as_of, "val")[0]["val_loss"]
    assert records(kitchen.folder / run, "val")[0]["val_loss"] == pytest.approx(validated, rel=1e-4)
    return True


@pytest.mark.slow
def test_a_device_that_torch_loads_by_itself_trains_as_the_cpu_does(kitchen, one_process):
    assert one_process["device"] == {"type": "teapot", "name": "teapot", "backend": "steam", "dtype": "torch.bfloat16"}
    for kind in ("weights", "gradients", "moments"):
        assert one_process["teapot"][kind] == ["teapot:0"]
        assert one_process["cpu"][kind] == ["cpu"]
    assert one_process["teapot"]["num_weights"] == one_process["cpu"]["num_weights"]  # tied ones stay tied
    assert one_process["teapot"]["skipped"] == 1
    assert one_process["teapot"]["kept"]
    operators = one_process["operators"]
    assert operators["aten::_fused_adamw_"] >= STEPS
    assert operators["aten::mm"] > 100
    assert same_numbers(kitchen, "teapot")


@pytest.mark.slow
def test_inputs_of_blocks_go_to_the_host_and_come_back_without_changing_anything(kitchen, one_process):
    operators = one_process["operators"]
    assert operators["a stream of its own"] == 1
    assert operators["pinned memory"] >= 2 * STEPS  # an input of each of two blocks and more
    assert same_numbers(kitchen, "offload")


@pytest.mark.slow
def test_images_and_averages_in_8_bits_are_on_the_device_and_give_the_same_numbers(kitchen, one_process):
    assert one_process["images"]["moments"] == ["teapot:0"]
    assert one_process["images"]["skipped"] == 1 and one_process["images"]["kept"]
    assert same_numbers(kitchen, "images", as_of="images-cpu")


@pytest.mark.slow
def test_what_a_device_does_not_tell_is_null_and_what_it_cannot_do_is_said(kitchen, one_process):
    for record in records(kitchen.folder / "teapot"):
        assert record["peak_memory_gib"] is None
        assert math.isfinite(record["mfu"]) and record["mfu"] > 0
    other, too_many = one_process["refusals"]
    assert "trainer.device=cuda: " in other and "finds teapot" in other and "auto, cpu, teapot" in other
    assert "3 processes need a teapot device each, and torch finds 2" in too_many


@pytest.mark.slow
def test_two_processes_shard_over_a_pretended_ascend_and_equal_the_cpu(kitchen, one_process):
    """With rows of their own and with shared ones. Autoload is off, so that trainer.device=npu must import torch_npu; hccl must be asked for."""
    shared = {"engine__ulysses_sequence_parallel_size": 2, "engine__optimizer_offload": "true", "trainer__save_freq": 2}
    weights = {"engine__param_offload": "true", "model__lora_rank": 4}  # adapters, so that what is written is read back
    runs = [
        [name, kitchen.options(name, "npu", **more)]
        for name, more in (("npu", {}), ("rows", shared), ("weights", weights))
    ]
    reports = kitchen.run("npu", runs, processes=2, autoload=False)
    for rank, report in enumerate(reports):
        assert set(report["backends_made"]) == {"hccl"}
        for kind in ("weights", "gradients", "moments"):
            assert report["npu"][kind] == [f"npu:{rank}"]
        assert (report["rows"]["weights"], report["rows"]["moments"]) == ([f"npu:{rank}"], ["cpu"])
        assert (report["weights"]["weights"], report["weights"]["gradients"]) == (["cpu"], ["cpu"])
        for run in ("npu", "rows", "weights"):
            assert report[run]["skipped"] == 1
            assert report[run]["kept"] and report[run]["shared"]
        assert report["operators"]["c10d::alltoall_base_"] > STEPS
        assert report["operators"]["c10d::_reduce_scatter_base_"] > STEPS
        assert report["operators"]["aten::_fused_adamw_"] >= STEPS
    assert same_numbers(kitchen, "npu") and same_numbers(kitchen, "rows")
    assert same_numbers(kitchen, "weights", as_of="adapters-cpu")
    assert (kitchen.folder / "rows" / "checkpoint-2").is_dir()
