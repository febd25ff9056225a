"""Every command in the docs is run as it is written, with tiny models and amounts, in one process; see tests/documented.py."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import yaml

import documented
import forked
from documented import Written, commands, pages
from posttrain.config.compose import compose
from posttrain.config.describe import options, sections

ROOT = Path(__file__).parents[1]
BY_JOB = r"job_.*|moving_from_.*|getting_started|long_context"  # those of test_docs_jobs.py

NOT_OPTIONS = {"engine.step"}  # written like one
# what a page names that another page makes: a model

MADE_ELSEWHERE = {"tools.md": "checkpoints/sft_run"}
# commands that are resolved and not run: on several machines
SEVERAL_MACHINES = re.compile(r"trainer\.nnodes=([2-9]|\$)|--nnodes=[2-9]")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder with what pages take for granted, and what stands in for the hub."""
    folder = tmp_path_factory.mktemp("home")
    forked.start_server()
    made = forked.start(documented.furnish, 1, folder, said=folder / "said")
    made.ends([0])
    return folder


def page_ids(jobs: bool) -> list[str]:
    found = [str(page.relative_to(ROOT)) for page in pages(ROOT)]
    return [page for page in found if bool(re.fullmatch(BY_JOB, Path(page).stem)) == jobs]


@pytest.mark.parametrize("page", page_ids(jobs=False))
def test_every_command_of_a_page_does_what_is_written(page, home, tmp_path):
    run_page(ROOT / page, home, tmp_path)


def run_page(page: Path, home: Path, folder: Path) -> None:
    """Run the page's commands in order, in one folder, and fail with all that went wrong, each by page and line."""
    place = folder / "place"
    shutil.copytree(home / "given", place, symlinks=True)
    if name := MADE_ELSEWHERE.get(page.name):
        (place / name).parent.mkdir()
        (place / name).symlink_to(place / "MODEL")
    wrong, began = [], time.monotonic()
    for number, command in enumerate(commands(page, folder / "shell")):
        told = folder / f"{number}.json"
        problem = run_command(command, place, home, told)
        if problem:
            wrong.append(f"{command}\n{problem}")
        if os.environ.get("DOCS_TIMES"):
            print(f"{time.monotonic() - began:6.1f}s {command}")
    assert not wrong, "\n\n".join(wrong)


def run_command(command: Written, place: Path, home: Path, told: Path) -> str | None:
    resolved_only = command.has_gap or any(map(SEVERAL_MACHINES.match, [*command.launcher, *command.words]))
    home_folder = place / "checkpoints" / command.words[0]
    if home_folder.exists() and not any(
        word.startswith(("trainer.default_local_dir=", "--output_dir")) for word in command.words
    ):
        shutil.rmtree(home_folder)  # commands that name no run folder are examples beside each other
    function = documented.only_resolved if resolved_only else documented.as_written
    arguments = (command.words, place, home, told)
    group = forked.start(function, 1, *arguments, said=told.with_suffix(".said"))
    codes = group.wait()
    if set(codes) != {0}:
        return f"exit codes {codes}: {group.output()[-3000:]}"
    trained = documented.trains(command.words) and "--eval_only" not in command.words
    return differences(told, command, place, home) if trained and not resolved_only else None


def differences(told: Path, command: Written, place: Path, home: Path) -> str | None:
    """What the run's own config.yaml has otherwise than the command as written, but for what makes it small."""
    written = json.loads(told.read_text())
    made_small = {word.partition("=")[0] for word in documented.smaller(command.words, written, home)}
    config = yaml.safe_load((place / written["trainer.default_local_dir"] / "config.yaml").read_text())
    kept = {key: value for key, value in written.items() if key not in made_small | {"data.date"}}
    in_force = {key: config[key.split(".")[0]][key.split(".")[1]] for key in kept}
    wrong = [f"{key} is {in_force[key]!r}, written {kept[key]!r}" for key in kept if in_force[key] != kept[key]]
    return "\n".join(wrong) or None


def our_options_in(page: Path) -> list[tuple[int, str, str | None]]:
    """(line, option, default that is written behind it) of each `section.option`, in tables `theirs | ours` of the second column."""
    named = re.compile(rf"`[+~]*((?:{'|'.join(sections())})\.[a-z]\w*)(?:=[^`]*)?`(?: \(([^)]*)\))?")
    found = []
    theirs_first = page.name.startswith("moving_from")
    for line, text in enumerate(page.read_text().splitlines(), start=1):
        cells = text.split(" | ")
        if page.name == "moving_from_verl.md" or "_options" in page.name:
            continue  # verl's options have such names too, and tests of their own
        shown = cells[1] if theirs_first and text.startswith("| ") and len(cells) > 1 else text
        found += [(line, key, default or None) for key, default in named.findall(shown)]
    return found


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in pages(ROOT)])
def test_every_option_that_a_page_names_exists(page):
    unknown = [
        f"{page}:{line}: {key}" for line, key, _ in our_options_in(ROOT / page) if key not in {*options(), *NOT_OPTIONS}
    ]
    assert not unknown, "\n".join(unknown)


MOVING = sorted(page for page in ROOT.glob("docs/moving_from_*.md") if "verl" not in page.name)


@pytest.mark.parametrize("page", MOVING, ids=lambda page: page.stem)
def test_tables_for_those_who_come_from_elsewhere_give_our_defaults_as_they_are(page):
    defaults = {command: _as_shown(compose([], command).config) for command in ("sft", "grpo")}
    stated = [found for found in our_options_in(page) if found[2] is not None]
    under_grpo = next((n for n, text in enumerate(page.read_text().splitlines(), 1) if text == "## GRPO"), 10**6)
    wrong = [
        f"{page.name}:{line}: {key} is {defaults[command][key]}, written {value}"
        for line, key, value in stated
        for command in ["grpo" if line > under_grpo else "sft"]
        if not _same(defaults[command][key], value)
    ]
    assert not wrong, "\n".join(wrong)
    assert len(page.read_text().split("\n| ")) > 40, "too few options to be of use"


def _as_shown(config) -> dict[str, str]:
    values = config.model_dump(mode="json")
    return {key: _shown(values[key.split(".")[0]][key.split(".")[1]]) for key in options()}


def _shown(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value).replace(str(Path.home()), "~")


def _same(default: str, written: str) -> bool:
    try:
        return float(default) == float(written)
    except ValueError:
        return default == written


def test_a_page_that_names_what_does_not_exist_is_told_by_page_and_line(home, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n```bash\nposttrain sft model.path=MODEL data.train_flies=train.parquet   # a typing error\n```\n\n"
        "    posttrain data show --files train.parquet \\\n        --tokenizer MODEL --tokenized\n"
        "```sh\nposttrain evaluate --model MODEL --test_file absent.parquet\nposttrian sft\n```\n"
    )
    with pytest.raises(ValueError, match=r"page.md:11: there is no program 'posttrian'"):
        commands(page, tmp_path / "shell")
    page.write_text(page.read_text().replace("posttrian sft\n", ""))
    with pytest.raises(AssertionError) as failed:
        run_page(page, home, tmp_path)
    said = str(failed.value)
    assert "page.md:4: posttrain sft" in said and "data.train_flies" in said and "data.train_files" in said
    assert "page.md:7: posttrain data show" in said and "--tokenized" in said
    assert "page.md:10: posttrain evaluate" in said and "absent.parquet does not exist" in said


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in pages(ROOT)])
def test_every_link_of_a_page_leads_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text)
    targets = [((ROOT / page).parent / path if path else ROOT / page, mark) for path, mark in links]
    missing = [f"{path.name}#{mark}" for path, mark in targets if not path.exists()]
    missing += [f"{path.name}#{mark}" for path, mark in targets if mark and path.exists() and mark not in _marks(path)]
    assert not missing, f"{page}: {missing}"


def _marks(page: Path) -> set[str]:
    """What a link can point at within a page: its headings, as code hosts name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
