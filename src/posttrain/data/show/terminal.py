"""Samples for the terminal: trained tokens bold green, the rest in the colour of its role, what is cut struck through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.encoded import EncodedImage, Part
from posttrain.data.show.samples import TEMPLATE, Group, Refused, Shown
from posttrain.data.show.visible import marked
from posttrain.wording import counted

if TYPE_CHECKING:
    from rich.text import Text

TRAINED, CUT = "bold green", "dim red strike"
_ROLES = {TEMPLATE: "bright_black", "system": "magenta", "user": "blue", "tool": "yellow", "assistant": "cyan"}
LEGEND = (
    (TRAINED, "trained"), *((style, role) for role, style in _ROLES.items()), (f"{TRAINED} italic", "thinking"),
    (CUT, "cut"),
)  # fmt: skip


def print_groups(groups: Iterable[Group]) -> None:
    """Everything, under a legend, to standard output."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text("  ").join(Text(name, style=style) for style, name in LEGEND), soft_wrap=True)
    for group in groups:
        if group.title:
            console.rule(Text(f"{group.title}: {group.note}"), align="left")
        for row in group.rows:
            for text in coloured(row):
                console.print()
                console.print(text, end="", soft_wrap=True)


def json_lines(groups: Iterable[Group]) -> Iterator[dict[str, Any]]:
    """One object a sample or refused row; with the number of its micro-batch where there are some."""
    for number, group in enumerate(groups):
        packed = {"micro_batch": number} if group.title else {}
        for row in group.rows:
            for shown in [row] if isinstance(row, Refused) else row:
                yield shown.as_json() | packed


def coloured(shown: list[Shown] | Refused) -> Iterator[Text]:
    """A row: one text for each of its samples, or why there is none."""
    from rich.text import Text

    if isinstance(shown, Refused):
        yield Text(f"{Path(shown.source).name} row {shown.row} refused: {shown.reason}\n", style="red")
        return
    for sample in shown:
        yield coloured_sample(sample)


def coloured_sample(sample: Shown) -> Text:
    from rich.text import Text

    text = Text()
    text.append(f"{headline(sample)}\n", style="bold")
    for said in (sample.unused, *sample.encoded.notes):
        if said:
            text.append(f"{said}\n", style="red" if said == sample.unused else "yellow")
    if cut := cut_line(sample):
        text.append(f"{cut}\n", style="red")
    shown = _shown(sample)
    for style, run in groupby(enumerate(_styles(sample)), key=lambda pair: pair[1]):
        text.append("".join(shown[t] for t, _ in run), style=style)
    return text if text.plain.endswith("\n") else text.append("\n")


def headline(sample: Shown) -> str:
    """Where the sample comes from, and its counts."""
    number = "" if sample.number is None else f", sample {sample.number}"
    share = f" ({sample.num_trained / sample.num_used:.0%})" if sample.num_used else ""
    used = sample.num_used if not sample.unused else len(sample)
    place = f"{Path(sample.source).name} row {sample.row}{number}"
    return f"{place}: {used:,} tokens, {sample.num_trained:,} trained{share}{_images_said(sample)}"


def image_line(image: EncodedImage) -> str:
    """Its size and what it costs."""
    return f"{image.width}x{image.height}, {counted(image.end - image.begin, 'token')}"


def cut_line(sample: Shown) -> str:
    """How much is cut where, or nothing."""
    if not sample.num_cut:
        return ""
    side = "first" if sample.begin else "last"
    return f"the {side} {sample.num_cut:,} of {len(sample):,} tokens are cut (data.truncation={'left' if sample.begin else 'right'})"


def _images_said(sample: Shown) -> str:
    images = sample.encoded.images
    num_tokens = sum(image.end - image.begin for image in images)
    return f", {counted(len(images), 'image')} of {counted(num_tokens, 'token')}" if images else ""


def _shown(sample: Shown) -> list[str]:
    """What stands for each token; an image is said once, by its first."""
    shown = ["".join(_visible(*piece) for piece in pieces) for pieces in marked(sample)]
    for image in sample.encoded.images:
        shown[image.begin : image.end] = [""] * (image.end - image.begin)
        shown[image.begin] = f"[image {image_line(image)}]"
    return shown


def _visible(character: str, mark: str) -> str:
    if character == "\n":
        return f"{mark}\n"
    return f"‹{mark}›" if len(mark) > 1 else mark or character


def _styles(sample: Shown) -> list[str]:
    weights, parts, roles = sample.targets_T.tolist(), sample.encoded.parts_T.tolist(), sample.roles_T
    controls, styles = sample.controls_T.tolist(), []
    for t, weight in enumerate(weights):
        if sample.unused or not sample.begin <= t < sample.end:
            style = CUT if not sample.unused else "dim strike"
        else:
            style = TRAINED if weight > 0 else _ROLES.get(roles[t], "white")
        italic = " italic" if parts[t] == Part.REASONING else ""
        styles.append(f"{style}{italic}{' underline' if controls[t] else ''}")
    for image in sample.encoded.images:
        styles[image.begin : image.end] = [f"{styles[image.begin]} reverse"] * (image.end - image.begin)
    return styles
