"""The house keeps its plan: imports go down only, every option is read somewhere, nothing heavy comes early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config.describe import options

SOURCE = Path(__file__).parents[1] / "src" / "posttrain"
FLOORS = [
    {"errors", "__init__"},
    {"config", "records", "python_file", "wording", "extras"},
    {"losses", "rewards", "data"},
    {"models", "distributed", "run"},
    {"engine", "rollout"},
    {"loops"},
    {"quickstart", "launch"},
    {"cli", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    part = path.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    here = room(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "posttrain" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != here:
            assert FLOOR[parts[1]] <= FLOOR[here], f"{here} imports {name}"
            assert {here, parts[1]} != {"engine", "rollout"}


@pytest.mark.parametrize("pure", ["config", "losses", "rewards", "data"])
def test_pure_rooms_know_nothing_of_processes_and_losses_nothing_of_options(pure):
    for path in (SOURCE / pure).rglob("*.py"):
        names = imported(path)
        assert not any(name.startswith("torch.distributed") for name in names), path
        if pure == "losses":
            assert not any(name.startswith("posttrain.config") for name in names), path
        elif pure != "losses":
            assert not any(name.split(".")[0] == "torch" for name in names), path


def test_every_option_is_read_somewhere():
    attributes = {
        node.attr
        for path in FILES
        if room(path) != "config"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert [key for key in options() if key.split(".")[1] not in attributes] == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["sft", "--help"], ["sft", "--print_config"], ["data", "--help"]], ids=str
)
def test_asking_for_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom posttrain import cli\nsys.argv = ['posttrain', *%r]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code % arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
