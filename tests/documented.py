"""The commands that the pages show: found as a shell understands them, and run as written but for their size.

A page is pasted into a shell from top to bottom, in a folder with the files that pages take for granted (`furnish`). Names on
the hub are looked up in a hub cache that holds a tiny model of the same architecture under every name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from tiny_vision import write_tiny_vision_model

# what a page may run besides posttrain: programs that are not ours, and are not run here
OTHERS = {
    "pip",
    "make",
    "source",
    "tail",
    "cd",
    "python",
    "python3",
    "apt",
    "tensorboard",
    "ssh",
    "git",
    "ls",
    "cat",
    "less",
}
LAUNCHERS = {"torchrun", "srun", "python", "python3", "~/vllm/bin/python"}
HUB_NAME = re.compile(r"[A-Za-z][\w.-]*/[\w.-]+")
# the architecture behind a name on the hub; the first that matches
ARCHITECTURES = (
    (r"Qwen2\.5-VL", "qwen2_5_vl"), (r"Qwen3-VL", "qwen3_vl"), (r"Qwen3-.*A\d+B", "qwen3_moe"), (r"Qwen3-", "qwen3"),
    (r"Qwen2|Distill-Qwen|Qwen/", "qwen2"), (r"gemma-3", "gemma3"), (r"gemma-2-", "gemma2"), (r"gemma", "gemma"),
    (r"Seed-OSS", "seed_oss"), (r"[Ll]lama|SmolLM2|deepseek", "llama"),
)  # fmt: skip
MADE = {
    "qwen3": {},
    "gemma2": {"sliding_window": 64},
    "seed_oss": {},
    "llama": {},
}  # besides qwen2, with what they need
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 32768}  # fmt: skip
TEMPLATE = Path(__file__).with_name("tool_template.jinja")

RECORD = """
record() { printf '%s\\0' "${BASH_LINENO[1]:-${BASH_LINENO[0]}}" "$@" >&3; printf '\\n' >&3; }
command_not_found_handle() { record "$@"; }
source() { record source "$@"; }
cd() { record cd "$@"; }
PATH=/there/is/nothing
"""


@dataclass(frozen=True)
class Written:
    """A command as a page shows it: `posttrain sft ...` is ["sft", ...]. `launcher`: torchrun and the like, with what it is told."""

    page: Path
    line: int
    words: list[str]
    launcher: list[str]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {' '.join([*self.launcher, 'posttrain', *self.words])}"

    @property
    def has_gap(self) -> bool:
        """Whether `...` stands for what the page does not repeat."""
        return "..." in self.words


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def commands(page: Path, scratch: Path) -> list[Written]:
    """The page's commands of posttrain, in order. Raises ValueError for a program that no page is known to run."""
    return [command for words, line in _run_shell(page, scratch) if (command := _ours(page, line, words))]


def shell_text(page: Path) -> str:
    """The page's shell commands, each on the line where it stands in the page, all other lines empty."""
    kept, fence, in_example = [], None, False
    for line in page.read_text().splitlines():
        if mark := re.match(r" *```(\w*)", line):
            fence = None if fence is not None else mark[1]
            kept.append("")
        elif fence is not None:
            kept.append(line if fence in ("bash", "sh", "shell") else "")
        else:  # a block that is marked by its indentation alone
            in_example = bool(re.match(r" {4}(posttrain|torchrun|python -m posttrain) ", line)) or (
                in_example and bool(re.match(r" {4,}\S", line)) and kept[-1].endswith("\\")
            )
            kept.append(line if in_example else "")
    return "\n".join(kept)


def _run_shell(page: Path, scratch: Path) -> Iterator[tuple[list[str], int]]:
    """What bash would run, each command with its line; it finds no program at all and says what it looked for."""
    scratch.mkdir(parents=True, exist_ok=True)
    record, text = scratch / "record", RECORD.strip().replace("\n", "; ").replace("{;", "{") + "; " + shell_text(page)
    record.touch()
    script = scratch / "page.sh"
    script.write_text(text)
    done = subprocess.run(["bash", "-c", f"exec 3>{record}; . {script}"], cwd=scratch, capture_output=True, text=True)
    if done.stderr:
        raise ValueError(f"{page.name}: {done.stderr}")
    for told in record.read_bytes().split(b"\0\n")[:-1]:
        line, *words = told.decode().split("\0")
        yield words, int(line)


def _ours(page: Path, line: int, words: list[str]) -> Written | None:
    program = words[0]
    if program == "posttrain":
        return Written(page, line, words[1:], [])
    if program in LAUNCHERS and "posttrain" in words:
        at = words.index("posttrain")
        return Written(page, line, words[at + 1 :], words[: at - (words[at - 1] == "-m")])
    if program not in OTHERS and Path(program).suffix not in (".sh",) and "/bin/" not in program:
        raise ValueError(f"{page.name}:{line}: there is no program '{program}' that a page is known to run.")
    return None


# ------------------------------------------------------------------ in a process of its own, where everything is imported


def furnish(rank: int, size: int, folder: Path) -> None:
    """Write the files that pages take for granted, the problems that stand in for sets on the hub, and the tiny models."""
    from posttrain.data.prepare import prepare_gsm8k
    from posttrain.quickstart.problems import write_problems

    given, problems = folder / "given", folder / "problems"
    write_problems(problems, 60, 4, 24, seed=0)
    prepare_gsm8k(str(problems), str(given))
    for name in ("a.parquet", "problems.parquet"):
        shutil.copy(given / "train.parquet", given / name)
    for name, split in (("b", "train"), ("train", "train"), ("test", "test")):
        shutil.copy(problems / f"{split}.jsonl", given / f"{name}.jsonl")
    talks = [_talk(number) for number in range(40)]
    (given / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (given / "my-recipe.yaml").write_text(
        "defaults:\n  - model: qwen2.5-0.5b\ndata:\n  train_files: train.parquet\n  val_files: test.parquet\n  train_batch_size: 4\n"
        "trainer:\n  default_local_dir: checkpoints/my-run\n"
    )
    shutil.copy(TEMPLATE, given / "FILE.jinja")
    for name in ("my_rewards.py", "my_reward.py"):
        (given / name).write_text(
            "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
            "    return float(ground_truth in solution_str)\n"
        )
    (given / "my_tools.py").write_text(
        'def search(query: str, limit: int = 3) -> list:\n    """Search the encyclopedia.\n\n    Args:\n'
        '        query: What to look for.\n        limit: Most results.\n    """\n    return [query] * limit\n'
    )
    _write_models(folder / "models", [*map(json.dumps, talks), *(problems / "train.jsonl").read_text().splitlines()])
    _write_photos(given)
    for family in ("qwen2_5_vl", "qwen3_vl"):
        write_tiny_vision_model(folder / "models" / family, family)
    (given / "quickstart-run").mkdir()
    (given / "quickstart-run" / "data").symlink_to(given)
    for name in ("MODEL", "FOLDER", "DIR", "quickstart-run/sft"):
        (given / name).symlink_to(folder / "models" / "qwen2")


def as_written(rank: int, size: int, words: list[str], place: Path, home: Path, told: Path) -> None:
    """Run `posttrain WORDS` in the folder `place`. Of a command that trains, first write the options as written to `told`."""
    os.chdir(place)
    options = _as_resolved(words) if trains(words) else None
    _use_hub(words, options, home)
    if options is not None:
        told.write_text(json.dumps(options))
        words = [*words, *smaller(words, options, home)]
    elif words[0] in ("evaluate", "generate"):
        count = "--limit=3" if words[0] == "evaluate" else "--num_samples=2"
        small = [
            "rollout.max_new_tokens=8",
            "rollout.name=transformers",
            "trainer.device=cpu",
            "~trainer.n_gpus_per_node",
        ]
        words = [*words, *small, count]
    elif words[:2] in (["data", "show"], ["data", "batches"]):
        words = [*words, f"data.cache_dir={home / 'cache'}"]
    elif words[:3] == ["data", "prepare", "shapes"]:
        words = [*words, "--rows=24"]
    elif words[:2] == ["recipes", "run"]:
        words = [*words, "--print"]  # it would start each of its commands anew, on the hub and in full
    elif words[0] == "quickstart":
        _shorten_quickstart()
    _run(words)


def only_resolved(rank: int, size: int, words: list[str], place: Path, home: Path, told: Path) -> None:
    """Write the options of `posttrain WORDS` to `told`, and run nothing."""
    os.chdir(place)
    words = [word for word in words if word != "..."]
    if words[0] in ("sft", "grpo"):
        told.write_text(json.dumps(_as_resolved(words)))
    else:
        _composed(words)


def trains(words: list[str]) -> bool:
    """Whether the command trains, or says what one that did has lost."""
    return words[0] in ("sft", "grpo") and not {"--help", "--print_config"} & set(words)


def smaller(words: list[str], options: dict[str, Any], home: Path) -> list[str]:
    """What is added to a command that trains so that it takes a second on a CPU: amounts, and what this machine lacks."""
    changed: dict[str, Any] = {"data.cache_dir": home / "cache", "trainer.device": "cpu"}
    if "--eval_only" not in words:
        changed["trainer.total_training_steps"] = 2
    if words[0] == "grpo":
        changed |= {"rollout.n": 2, "reward.num_workers": 1}
    at_most = {
        "data.train_batch_size": 4, "rollout.max_new_tokens": 8, "rollout.val_n": 2, "trainer.num_val_generations": 2,
        "algorithm.ppo_mini_batch_size": 2, "optim.lr_warmup_steps": 1, "algorithm.overlong_buffer_tokens": 4,
        "engine.fsdp_size": 1, "engine.ulysses_sequence_parallel_size": 1, "trainer.n_gpus_per_node": 1,
    }  # fmt: skip
    changed |= {key: most for key, most in at_most.items() if (options[key] or 0) > most}
    if options["rollout.name"] == "vllm":
        changed["rollout.name"] = "transformers"
    if set(options["trainer.logger"]) - {"console"}:
        changed["trainer.logger"] = "[console]"
    if options["model.torch_compile"]:
        changed["model.torch_compile"] = "false"
    return [f"{key}={value}" for key, value in changed.items()]


def _as_resolved(words: list[str]) -> dict[str, Any]:
    """Each option with its value, as the command itself says with --print_config."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        _run([*words, "--print_config", "--json"])
    return {key: option["value"] for key, option in json.loads(said.getvalue())["options"].items()}


def _run(words: list[str]) -> None:
    from posttrain import cli

    sys.argv = ["posttrain", *words]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


def _composed(words: list[str]) -> dict[str, Any]:
    from posttrain.config.compose import compose

    arguments = [word for word in words if re.match(r"[+~]*[a-z_.]+=|~[a-z]|.*\.ya?ml$", word)]
    return compose(arguments, words[0] if words[0] == "grpo" else None).config.model_dump()


def _use_hub(words: list[str], options: dict[str, Any] | None, home: Path) -> None:
    """Names on the hub are there, without a network: a model is a tiny one, a data set the problems of the quickstart."""
    from huggingface_hub import constants

    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(home / "hub"), True
    if words[:3] != ["data", "prepare", "shapes"]:  # which are drawn, and need of the package how images are told
        sys.modules["datasets"] = _data_sets(home)
    names = {word.rpartition("=")[2] for word in words}
    if words[0] == "data" and any(re.search(r"^(model|job)=|\.ya?ml$", word) for word in words):
        options = {"model.path": _composed(words)["model"]["path"]}
    if options is not None:
        names |= {options["model.path"], options.get("model.tokenizer_path")}
    for name in names - {None}:
        if HUB_NAME.fullmatch(name) and not Path(name).exists():
            _put_on_hub(name, home)


def _put_on_hub(name: str, home: Path) -> None:
    """A hub cache's entry that leads to the tiny model of the architecture behind the name."""
    architecture = next((found for pattern, found in ARCHITECTURES if re.search(pattern, name)), None)
    if architecture is None or not (home / "models" / architecture).exists():
        return
    entry, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    for folder in (entry / "refs", entry / "snapshots"):
        folder.mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(commit)
    with contextlib.suppress(FileExistsError):  # another command was first
        (entry / "snapshots" / commit).symlink_to(home / "models" / architecture)


def _data_sets(home: Path) -> types.ModuleType:
    """In place of the package `datasets`, whose sets lie on the hub: rows of GSM8K and Geometry3K. The rest of it is there when asked for."""
    module = types.ModuleType("datasets")
    module.__spec__ = ModuleSpec("datasets", None)

    def load_dataset(name: str, config: str | None = None, split: str = "train") -> _Rows:
        if name == "hiyouga/geometry3k":
            image = {"bytes": (home / "given" / "photos" / "1.png").read_bytes(), "path": None}
            return _Rows(
                [{"problem": f"<image>How long is AB{n}?", "answer": str(n), "images": [image]} for n in range(6)]
            )
        assert (name, config) == ("openai/gsm8k", "main"), f"no rows stand in for {name} {config}"
        return _Rows([json.loads(line) for line in (home / "problems" / f"{split}.jsonl").open()])

    def of_the_package(name: str) -> Any:
        if sys.modules["datasets"] is module:
            del sys.modules["datasets"]
            importlib.import_module("datasets").load_dataset = load_dataset
        return getattr(sys.modules["datasets"], name)

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.__getattr__ = of_the_package  # type: ignore[method-assign]
    return module


class _Rows(list[dict[str, Any]]):
    """Rows as `datasets` gives them, in Arrow's tables."""

    def with_format(self, name: str) -> _Rows:
        assert name == "arrow"
        return self

    def iter(self, batch_size: int) -> Iterator[Any]:
        import pyarrow as pa

        yield pa.Table.from_pylist(self)


def _shorten_quickstart() -> None:
    """Fewer problems, and two steps of each kind."""
    from posttrain.quickstart import journey

    journey.NUM_TRAIN, journey.NUM_TEST, journey.NUM_PROMPTS, journey.NUM_TOKENIZER_TEXTS = 32, 8, 64, 200
    options = journey.grpo_options
    journey.grpo_options = lambda folder, seed: options(folder, seed, "trainer.total_training_steps=1")


def _talk(number: int) -> dict[str, Any]:
    """A conversation with a call of a tool, and reasoning, in OpenAI's form."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": f"town {number}"}}}
    return {
        "messages": [
            {"role": "user", "content": f"Weather in town {number}?"},
            {"role": "assistant", "content": "", "reasoning_content": "I must ask.", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": f"{number} degrees"},
            {"role": "assistant", "content": f"It has {number} degrees there."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "description": "The weather of a town.",
                   "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}],
    }  # fmt: skip


def _write_photos(folder: Path) -> None:
    """Conversations with an image each, in a file beside their folder."""
    from PIL import Image

    (folder / "photos").mkdir()
    rows = []
    for number, colour in enumerate(("red", "green", "blue", "red", "green", "blue"), start=1):
        Image.new("RGB", (40 + 8 * number, 60), colour).save(folder / "photos" / f"{number}.png")
        messages = [{"role": "user", "content": "<image>Which colour is it?"}, {"role": "assistant", "content": colour}]
        rows.append({"messages": messages, "images": [f"photos/{number}.png"]})
    (folder / "photos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_models(folder: Path, texts: list[str]) -> None:
    """A tiny model of each architecture, all with one tokenizer, whose template knows tools."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from posttrain.quickstart.tiny import write_tiny_model

    write_tiny_model(folder / "qwen2", texts, seed=0)
    (folder / "qwen2" / "chat_template.jinja").write_text(TEMPLATE.read_text())
    words = transformers.AutoTokenizer.from_pretrained(folder / "qwen2")
    special = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    for name, more in MADE.items():
        config = transformers.AutoConfig.for_model(name, **SMALL, **special, bos_token_id=None, **more)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
