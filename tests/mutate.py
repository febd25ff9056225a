"""Breaks the code of loss, layout and masks on purpose, one way at a time, and fails if the tests of it let that pass.

python -m pytest tests/mutate.py        # also part of the whole suite
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import forked

SOURCE = Path(__file__).parents[1] / "src"
SIZE = 2
OURS = ("posttrain", "tiny", "tiny_vision", "test_layouts", "test_vision")


@dataclass(frozen=True)
class Mutation:
    """One line made wrong."""

    what: str
    file: str
    right: str
    wrong: str


MUTATIONS = [
    Mutation(
        "forgets the other processes' tokens",
        "engine/engine.py",
        "self.world.total(local_weight).float()",
        "torch.tensor(local_weight)",
    ),
    Mutation(
        "counts the tokens of a shared row twice",
        "distributed/world.py",
        "return self.sum_over_readers(torch.tensor(numbers",
        "return self.sum(torch.tensor(numbers",
    ),
    Mutation("averages gradients", "distributed/sharding.py", "divide_factor(1.0)", "divide_factor(float(world.size))"),
    Mutation("divides by the micro-batch's own tokens", "losses/sft.py", "/ total_weight", "/ weights_T.sum()"),
    Mutation(
        "shifts labels after the cut",
        "distributed/sequence.py",
        "labels_T=filled.labels_T[here]",
        "labels_T=np.append(filled.ids_T[here][1:], 0)",
    ),
    Mutation(
        "restarts positions in each part",
        "distributed/sequence.py",
        "positions_T=filled.positions_T[here],",
        "positions_T=np.arange(length),",
    ),
    Mutation(
        "forgets one process's rows",
        "data/batches.py",
        "ranks[rank].append(sorted(documents))",
        "ranks[rank].append(sorted(documents) if rank == 0 else [])",
    ),
    Mutation(
        "mixes tokens with heads",
        "distributed/sequence.py",
        "received.transpose(0, 1).reshape(1, heads // self.size",
        "received.reshape(1, heads // self.size",
    ),
    Mutation(
        "attends across documents",
        "engine/engine.py",
        "Documents.of(part.lengths_N, device",
        "Documents.of((sum(part.lengths_N),), device",
    ),
    Mutation(
        "gives every process the gradient of all parts",
        "distributed/sequence.py",
        "return gradient_T.chunk(ctx.sequence.size)[ctx.sequence.rank], None",
        "return gradient_T.chunk(ctx.sequence.size)[ctx.sequence.rank] * ctx.sequence.size, None",
    ),
    Mutation(
        "takes the first part's weights",
        "distributed/sequence.py",
        ".chunk(self.size)[self.rank]",
        ".chunk(self.size)[0]",
    ),
    Mutation(
        "counts copies of the gradient in its norm",
        "engine/optimizer.py",
        "self.world.sum_over_shards(squares)",
        "self.world.sum(squares)",
    ),
    Mutation(
        "looks at the wrong key heads",
        "models/attention.py",
        "x.repeat_interleave(times, dim=1)",
        "x.repeat(1, times, 1, 1)",
    ),
    Mutation(
        "keeps the gradient of the step before",
        "engine/optimizer.py",
        "parameter.grad = None",
        "pass",
    ),
]

IMAGE_MUTATIONS = [
    Mutation(
        "gives documents the images of others",
        "data/images/loader.py",
        "for future in begun)",
        "for future in begun[::-1])",
    ),
    Mutation(
        "counts positions of images as those of text",
        "models/vision.py",
        "return found[:, 0]",
        "return torch.arange(len(ids_L)).expand(3, -1)",
    ),
    Mutation(
        "adds features of one token to the next",
        "models/policy.py",
        "own = numbers[numbers >= 0]",
        "own = (numbers[numbers >= 0] - 1).clamp(min=0)",
    ),
    Mutation(
        "takes the first part's embeddings",
        "distributed/sequence.py",
        "whole.chunk(self.size, dim)[self.rank]",
        "whole.chunk(self.size, dim)[0]",
    ),
]

MASK_MUTATIONS = [
    Mutation(
        "takes every weight for 1", "data/chat.py", "weights_T[begin:end] = weight", "weights_T[begin:end] = weight > 0"
    ),
    Mutation("trains all turns", "data/chat.py", 'rules.train_on == "all" or turn == last', "True"),
    Mutation("trains reasoning", "data/chat.py", "if not self.rules.reasoning and weight:", "if False:"),
    Mutation(
        "trains earlier turns again",
        "data/chat.py",
        '(0.0, "it has a sample of its own")',
        '(1.0, "it has a sample of its own")',
    ),
    Mutation(
        "trains a token of header and answer",
        "data/chat.py",
        "if first < span.start or last > span.end:",
        "if last > span.end:",
    ),
    Mutation("lets tools steer", "data/controls.py", "part == Part.TOOLS or (", "("),
    Mutation("takes the answer's control strings for text", "data/controls.py", "theirs[message] and", ""),
    Mutation("encodes text by itself unasked", "data/controls.py", "if alone != with_controls.tolist():", "if False:"),
    Mutation(
        "does not train the end", "data/provenance/borders.py", "end = whole[-1].end()", "end = whole[-1].start()"
    ),
    Mutation(
        "uses answers for other messages",
        "data/provenance/borders.py",
        "return (tuple(kinds), conversation",
        "return ((), conversation",
    ),
    Mutation(
        "ignores generation blocks",
        "data/provenance/turns.py",
        "start += _outside_generation(",
        "start += 0 * _outside_generation(",
    ),
]
MASK_TESTS = ("test_what_is_trained.py", "test_mask_properties.py")
# Few and quick, such that each mutation shows in one of them; without published templates, which may be absent.
QUICK_MASK_TESTS = "(test_what_is_trained and not any_row and not 4094) or (serves_no_other and equality)"


def mutate(folder: Path, mutation: Mutation) -> Path:
    """A copy of the source with one line made wrong."""
    copy = folder / mutation.what.replace(" ", "-").replace("'", "")
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / "posttrain" / mutation.file
    text = file.read_text()
    assert mutation.right in text, f"{mutation.file} no longer says {mutation.right!r}: change the mutation with it"
    file.write_text(text.replace(mutation.right, mutation.wrong))
    return copy


def quick_layouts() -> list:
    """Few of the matrix, such that each mutation shows in one of them."""
    from test_layouts import Layout

    return [Layout(1, 1), Layout(None, 2), Layout(None, 2, family="three-key-heads")]


def quick_work(layout, world, models: Path) -> dict:
    from test_layouts import UNKNOWN_SLOPE, build, one_step, rows

    engine = build(layout, world, models)
    found = {
        "known slope": one_step(engine, rows(6), {"max_rows": 2}),
        "unknown slope": one_step(engine, rows(7), {"max_rows": 2}, UNKNOWN_SLOPE),
    }
    losses, norms = [], []
    for count in (5, 3, 4):
        report, update = step(engine, rows(count), world)
        losses.append(float(report.loss))
        norms.append(float(update.grad_norm))
    return {**found, "losses": losses, "norms": norms}


def step(engine, samples, world):
    from posttrain.losses.sft import sft_loss
    from tiny import packed

    return engine.forward_backward(packed(samples, world, max_tokens=60), sft_loss), engine.optim_step()


def differences(found: dict, expected: dict) -> list[str]:
    from test_layouts import GRADIENT_GAP, LOSS_GAP
    from tiny import worst_gap

    said = []
    for name in ("known slope", "unknown slope"):
        if abs(found[name]["loss"] / expected[name]["loss"] - 1) > LOSS_GAP:
            said.append(f"loss, {name}")
        if worst_gap(found[name]["gradients"], expected[name]["gradients"]) > GRADIENT_GAP:
            said.append(f"gradients, {name}")
    for name, tolerance in (("losses", 1e-4), ("norms", 1e-3)):
        pairs = zip(found[name], expected[name], strict=True)
        if any(abs(ours / theirs - 1) > tolerance for ours, theirs in pairs):
            said.append(f"{name} of steps")
    return said


def worker(rank: int, size: int, run: Callable, copies: list[Path], models: Path, results: Path) -> None:
    torch.set_num_threads(1)
    path = list(sys.path)
    for number, copy in enumerate(copies):
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *path]
        said = run(number, models, results)
        if rank == 0:
            torch.save(said, results / f"{number}.said.pt")


def none_lives(mutations: list[Mutation], run: Callable, models: Path, folder: Path) -> None:
    """Fails where `run` says nothing of a copy of the source with one of the mutations, or something of the source itself."""
    copies = [SOURCE, *(mutate(folder, mutation) for mutation in mutations)]
    forked.start_server()
    forked.start(worker, SIZE, run, copies, models, folder, said=folder / "said").ends([0] * SIZE, seconds=600)
    untouched, *mutants = (torch.load(folder / f"{number}.said.pt") for number in range(len(copies)))
    assert untouched == [], f"the code as it stands differs: {untouched}"
    alive = [mutation.what for mutation, said in zip(mutations, mutants, strict=True) if not said]
    assert not alive, f"nothing noticed code that {', that '.join(alive)}"


def run_mutant(copy: int, models: Path, results: Path) -> list[str]:
    """What differs from the code that is right; an error that it ran into counts as well."""
    from posttrain.distributed.device import choose_device
    from posttrain.distributed.world import join_world

    said = []
    for number, layout in enumerate(quick_layouts()):
        forked.meet_again(copy * len(quick_layouts()) + number)
        expected = torch.load(results / f"expected-{number}.pt", weights_only=False)
        try:
            with join_world(choose_device("cpu"), torch.float32, layout.options(models)[1]) as world:
                said += [f"{what} ({layout})" for what in differences(quick_work(layout, world, models), expected)]
        except Exception as error:
            said.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return said


def run_seeing_mutant(copy: int, seeing: Path, results: Path) -> list[str]:
    """The same of rows with images that processes share."""
    from posttrain.distributed.device import choose_device
    from posttrain.distributed.world import join_world
    from test_vision import GRADIENT_GAP, Layout, worst_gap

    forked.meet_again(copy)
    layout, expected = Layout("qwen3_vl", sequence=SIZE), torch.load(results / "expected.pt", weights_only=False)
    try:
        with join_world(choose_device("cpu"), torch.float32, layout.engine) as world:
            found = seeing_work(layout, world, seeing)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return ["gradients"] if worst_gap(found["gradients"], expected["gradients"]) > GRADIENT_GAP else []


def seeing_work(layout, world, seeing: Path) -> dict:
    from test_vision import build, images_of, one_step
    from tiny_vision import image_samples

    images = images_of(layout, seeing)
    return one_step(layout, build(layout, world, seeing, images), images, image_samples(images, 6), seeing)


@pytest.mark.slow
def test_the_comparison_of_rows_with_images_lets_no_mutation_live(tmp_path):
    from test_vision import Layout
    from tiny import alone
    from tiny_vision import write_tiny_vision_model

    torch.set_num_threads(1)
    write_tiny_vision_model(tmp_path / "qwen3_vl", "qwen3_vl")
    torch.save(seeing_work(Layout("qwen3_vl"), alone(), tmp_path), tmp_path / "expected.pt")
    none_lives(IMAGE_MUTATIONS, run_seeing_mutant, tmp_path, tmp_path)


@pytest.mark.slow
def test_the_comparison_of_layouts_lets_no_mutation_live(models, tmp_path):
    from test_layouts import plain
    from tiny import alone

    torch.set_num_threads(1)
    for number, layout in enumerate(quick_layouts()):
        torch.save(quick_work(plain(layout), alone(), models), tmp_path / f"expected-{number}.pt")
    none_lives(MUTATIONS, run_mutant, models, tmp_path)


def masks_are_noticed(copies: list[Path], folder: Path) -> list[int]:
    """What pytest says of each copy of the source."""
    os.environ["POSTTRAIN_TEST_DATA"] = str(folder / "absent")
    ours = ("posttrain", "conftest", *(file.stem for file in Path(__file__).parent.glob("*.py")))
    path, said = list(sys.path), []
    tests = [str(Path(__file__).with_name(name)) for name in MASK_TESTS]
    for copy in copies:
        for name in [name for name in sys.modules if name.split(".")[0] in ours and name != __name__]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *path]
        said.append(int(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", QUICK_MASK_TESTS, *tests])))
        assert sys.modules["posttrain"].__file__ == str(copy / "posttrain" / "__init__.py")
    return said


@pytest.mark.slow
def test_the_tests_of_masks_let_no_mutation_live(tmp_path):
    copies = [SOURCE, *(mutate(tmp_path, mutation) for mutation in MASK_MUTATIONS)]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        untouched, *mutants = pool.submit(masks_are_noticed, copies, tmp_path).result(600)
    assert untouched == pytest.ExitCode.OK, "the tests fail on the code as it stands"
    failed = pytest.ExitCode.TESTS_FAILED
    alive = [mutation.what for mutation, said in zip(MASK_MUTATIONS, mutants, strict=True) if said != failed]
    assert not alive, f"nothing noticed code that {', that '.join(alive)}"
