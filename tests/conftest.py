"""What several test files need."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

import posttrain.models

PORTS = count(os.getpid())
DATA_BESIDE_THE_REPOSITORY = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real, published data; what it holds is written in its README.md."""
    folder = Path(os.environ.get("POSTTRAIN_TEST_DATA") or DATA_BESIDE_THE_REPOSITORY)
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder: {folder} is absent, and POSTTRAIN_TEST_DATA names no other")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with train.parquet (200 rows), test.parquet (40) and a tiny Qwen2 model with its own tokenizer."""
    from posttrain.data.prepare import prepare_gsm8k
    from posttrain.quickstart.problems import make_problems, write_problems
    from posttrain.quickstart.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    write_problems(folder / "problems", 200, 8, 40, seed=0)
    prepare_gsm8k(str(folder / "problems"), str(folder))
    texts = [text for p in make_problems(300, seed=1) for text in (p.question, p.answer)]
    write_tiny_model(folder / "model", texts, seed=0)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Folders with tiny models of several families, and `adapter`, a LoRA adapter for qwen2 that is not at its start."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tiny import CONFIGS, tiny_lm

    folder = tmp_path_factory.mktemp("models")
    for family in CONFIGS:
        tiny_lm(family).save_pretrained(folder / family)
    adapter = get_peft_model(tiny_lm(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    adapter.save_pretrained(folder / "adapter")
    return folder


class Command:
    """Runs posttrain as a person does, in a process of its own."""

    def __init__(self, tiny: Path, folder: Path):
        self.tiny, self.folder = tiny, folder
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "POSTTRAIN_TRACEBACK": ""}

    def arguments(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "posttrain", *map(str, arguments)]

    def __call__(self, *arguments: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            self.arguments(*arguments), cwd=self.folder, env={**self.environment, **environment},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        said = f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert code is None or done.returncode == code, said
        assert "Traceback" not in done.stderr, said
        return done

    def sft_options(self, run: str, **options: object) -> list[str]:
        """A short run on the tiny rows; keyword `data__max_length` means data.max_length."""
        given: dict[str, object] = {
            "data.train_files": self.tiny / "train.parquet", "data.cache_dir": self.tiny / "cache",
            "model.path": self.tiny / "model", "trainer.default_local_dir": run, "optim.lr": 1e-3,
            "data.train_batch_size": 16, "trainer.total_training_steps": 4, "trainer.save_freq": -1,
        }  # fmt: skip
        given |= {name.replace("__", "."): value for name, value in options.items()}
        return [f"{name}={value}" for name, value in given.items() if value is not None]

    def sft(self, run: str, *flags: str, code: int | None = 0, **options: object) -> subprocess.CompletedProcess:
        return self("sft", *self.sft_options(run, **options), *flags, code=code)


@pytest.fixture
def posttrain(tiny, tmp_path) -> Command:
    return Command(tiny, tmp_path)


def free_port() -> int:
    """For a process that will listen there once it has started: one that the system gives nobody until then, as it does
    with those from 32768 on, and that no other worker of pytest takes."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 12000 + 1000 * (worker % 20) + next(PORTS) % 1000
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("localhost", port))
            return port


def records(run: Path, phase: str = "train") -> list[dict]:
    """The lines of a run's metrics.jsonl of one phase."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["phase"] == phase]
