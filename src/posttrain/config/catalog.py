"""The packaged recipes as a person looks at them: what each is for, what it needs, its options with their reasons.

A recipe is a YAML file of options; a comment beside an option is its reason. What is no option stands under `recipe:`:

    about            one sentence
    model_type, billion_weights        of a model
    prepare          the command that writes a data set's files
    command          sft or grpo, where only one of them makes sense
    gpus, gpu_gb     what a job is laid out for
    needs, time, result                further needs; time and result only where they were measured or published, with the source
    folder, stages   of a job of several commands
    model, data      beside which a recipe is shown, where not beside qwen2.5-0.5b and gsm8k

This file imports neither the options' schema nor Hydra, so that a list is there at once.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import InputError

RECIPES = Path(__file__).with_name("recipes")
GROUPS = ("model", "data", "method", "job")  # what recipes can be chosen for, in the order in which they are read
MEANINGS = {
    "model": "who learns (model=NAME); GiB of weights, gradients and AdamW together, computed",
    "data": "from what (data=NAME)",
    "method": "by which rules (method=[NAME, NAME])",
    "job": "all of it by one name (job=NAME), and any option after it; GiB of each GPU are computed",
}
ABOUT = "recipe"  # the key of a recipe file that holds no options
GIB = 2**30
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Line:
    """An option as a recipe writes it."""

    text: str
    reason: str


@dataclass(frozen=True)
class Page:
    """A packaged recipe."""

    group: str
    name: str

    @property
    def title(self) -> str:
        return f"{self.group}/{self.name}"

    @property
    def path(self) -> Path:
        return RECIPES / self.group / f"{self.name}.yaml"

    @property
    def about(self) -> dict[str, Any]:
        return _read(self.path).get(ABOUT, {})

    @property
    def command(self) -> str:
        return self.about.get("command", "sft")

    @property
    def parts(self) -> list[Page]:
        """The recipes that a job is made of, in the order in which they are read."""
        chosen: dict[str, Any] = {}
        for entry in _read(self.path).get("defaults", []):
            chosen |= entry
        lists = {group: names if isinstance(names, list) else [names] for group, names in chosen.items()}
        if self.command == "grpo":  # which begins with that method
            lists["method"] = ["grpo", *lists.get("method", [])]
        return [Page(group, name) for group in GROUPS for name in lists.get(group, [])]

    @property
    def lines(self) -> dict[str, Line]:
        """The recipe's own options by their dotted names."""
        return _lines(self.path)


def pages() -> list[Page]:
    """Every packaged recipe, group by group, in natural order: 7b before 14b."""
    return [Page(group, name) for group in GROUPS for name in sorted(_names(group), key=_natural)]


def find_page(name: str) -> Page:
    """The recipe called `group/name`, `group=name`, or `name` where one group alone has it. Raises InputError with the nearest."""
    title = name.replace("=", "/", 1)
    found = [page for page in pages() if title in (page.title, page.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{name}: there are {' and '.join(page.title for page in found)}; give one with its group.")
    near = difflib.get_close_matches(title, [word for page in pages() for word in (page.name, page.title)], n=3)
    hint = f"Nearest: {', '.join(near)}. " if near else ""
    raise InputError(f"{name}: there is no such recipe. {hint}`posttrain recipes` lists them.")


def run_command(page: Page) -> str:
    """A command that uses the recipe."""
    model, data = page.about.get("model", "qwen2.5-0.5b"), page.about.get("data", "gsm8k")
    match page.group:
        case "model":
            return f"posttrain sft model={page.name} data={data}"
        case "data":
            return f"posttrain {page.command} model={model} data={page.name}"
        case "method":
            return f"posttrain {page.command} model={model} data={data} method={page.name}"
        case _:
            return (
                f"posttrain recipes run {page.name}"
                if "stages" in page.about
                else f"posttrain {page.command} job={page.name}"
            )


def needs(page: Page) -> str:
    """What it takes, in words; memory is computed, not measured."""
    about = page.about
    said = [f"{about['gpus']} x {about['gpu_gb']} GB"] if "gpus" in about else []
    if "billion_weights" in about:
        full, lora = weights_gib(about["billion_weights"]), weights_gib(about["billion_weights"], lora=True)
        said.append(f"{_rounded(full)} GiB full, {_rounded(lora)} GiB LoRA")
    elif "gpus" in about and "stages" not in about:
        said.append(f"{_rounded(job_gib(page))} GiB of each for weights and their states")
    said += [about[key] for key in ("needs", "prepare", "time", "result") if key in about]
    return "; ".join(said)


def weights_gib(billion: float, *, lora: bool = False, halved: bool = False, offloaded: str = "") -> float:
    """GiB of weights, gradients and AdamW's two averages, in all devices together.

    Trained weights take 4 bytes each of these in float32, 2 in bfloat16 (`halved`); frozen ones 2 bytes alone, and adapters about
    a hundredth of that more. `offloaded`: what lies in CPU memory, of `optimizer` and `param` (weights and gradients).
    """
    if lora:
        return billion * 1e9 * 2 * 1.01 / GIB
    num = 4 - 2 * ("optimizer" in offloaded) - 2 * ("param" in offloaded)
    return billion * 1e9 * num * (2 if halved else 4) / GIB


def job_gib(page: Page) -> float:
    """GiB of one device for what `weights_gib` counts, by the options of the job and the GPUs that it names."""
    lines = merged(page)
    model = next(part for part in page.parts if part.group == "model")
    offloaded = " ".join(
        kind for kind in ("optimizer", "param") if f"engine.{kind}_offload" in lines and lines[f"engine.{kind}_offload"][0].text == "true"
    )  # fmt: skip
    dtype = lines.get("model.weights_dtype")
    together = weights_gib(
        model.about["billion_weights"],
        lora="model.lora_rank" in lines,
        halved=bool(dtype and dtype[0].text == "bfloat16"),
        offloaded=offloaded,
    )
    return together / page.about["gpus"]


def merged(page: Page) -> dict[str, tuple[Line, Page]]:
    """Every option that the recipe sets, with those of the recipes that it is made of; the later wins."""
    return {key: (line, part) for part in [*page.parts, page] for key, line in part.lines.items()}


def written_out(page: Page) -> str:
    """A recipe file of one's own: all that the recipe sets with its reasons, without `defaults:`."""
    if "stages" in page.about or page.group != "job":
        return page.path.read_text(encoding="utf-8")
    sections: dict[str, list[str]] = {}
    for key, (line, part) in merged(page).items():
        section, option = key.split(".", 1)
        reason = "; ".join(filter(None, (line.reason, f"from {part.title}")))
        sections.setdefault(section, []).append(f"  {option}: {line.text}  # {reason}")
    about = [f"# {page.about['about']}", f"# Run it: posttrain {page.command} THIS_FILE"]
    lines = [*about, *(line for name, own in sections.items() for line in (f"{name}:", *own))]
    return "\n".join(lines) + "\n"


def as_markdown() -> str:
    """The tables of docs/recipes.md."""
    parts = []
    for group, meaning in MEANINGS.items():
        rows = [f"| `{page.name}` | {page.about['about']} | {needs(page)} |" for page in pages() if page.group == group]
        parts += [f"### {group}: {meaning}", "", "| name | what it is for | needs |", "|---|---|---|", *rows, ""]
    return "\n".join(parts)


def _names(group: str) -> list[str]:
    return [file.stem for file in (RECIPES / group).glob("*.yaml")]


@cache
def _read(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), Loader) or {}


@cache
def _lines(path: Path) -> dict[str, Line]:
    """Option -> its line: the value as it is written, and the comment behind it."""
    content = path.read_text(encoding="utf-8")
    root = yaml.compose(content, Loader)
    rows = content.splitlines()
    found = {}
    for section, options in root.value if root else []:
        if section.value in (ABOUT, "defaults") or not isinstance(options, yaml.MappingNode):
            continue
        for key, value in options.value:
            row = rows[value.end_mark.line]
            text = rows[value.start_mark.line][value.start_mark.column : value.end_mark.column]
            reason = row[value.end_mark.column :].strip().removeprefix("#").strip()
            found[f"{section.value}.{key.value}"] = Line(text, reason)
    return found


def _natural(name: str) -> list[tuple[float, str]]:
    """Numbers by their size, in millions where an m says so: qwen2.5-7b before qwen2.5-14b."""
    parts = []
    for word in name.replace("_", "-").split("-"):
        number = word[:-1] if word[-1:] in "bm" else word
        is_number = number.replace(".", "", 1).isdecimal()
        parts.append(
            (float(number) / (1000 if word.endswith("m") else 1) if is_number else 0.0, "" if is_number else word)
        )
    return parts


def _rounded(gib: float) -> str:
    return f"{gib:.1f}" if gib < 9.95 else f"{gib:.0f}"


if __name__ == "__main__":
    print(as_markdown(), end="")
