"""Samples as one self-contained page. The tokens are markup; what is said of each lies beside them, in runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from posttrain.config.values import expand_path
from posttrain.data.encoded import NO_MESSAGE, EncodedImage, Part
from posttrain.data.show.blocks import Block, apart_of, blocks_of, owners
from posttrain.data.show.pictures import place_of, thumbnail
from posttrain.data.show.samples import TEMPLATE, Group, Refused, Shown
from posttrain.data.show.terminal import cut_line, headline, image_line
from posttrain.data.show.visible import marked
from posttrain.errors import InputError
from posttrain.wording import counted

ROLES = ("system", "user", "assistant", "tool")  # those with a colour of their own
IMAGE = "image "  # and its number: what sets its tokens apart


@dataclass(frozen=True)
class Summary:
    """What stands on top: the headline, facts and options, by name."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)


def write_page(path: str, summary: Summary, groups: Sequence[Group]) -> str:
    """Write the page, and say in a line what it shows. Raises InputError where it cannot be written."""
    groups = [Group(list(group.rows), group.title, group.note) for group in groups]
    file = Path(expand_path(path))
    try:
        # half a character pair is not Unicode, and stands in no file
        file.write_text(page(summary, groups), encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise InputError(f"--html {path} cannot be written: {error}. Name another file.") from None
    told = counts(groups)
    said = f"{counted(told['samples'], 'sample')}, {counted(told['tokens'], 'token')}, {told['share']:.0%} trained"
    left = f"; {told['unused']:,} not used, {counted(told['refused'], 'row')} refused"
    return f"{file}: {said}{left if told['unused'] or told['refused'] else ''}"


def page(summary: Summary, groups: Sequence[Group]) -> str:
    """The whole page as HTML."""
    from jinja2 import Environment

    template = (files("posttrain.data.show") / "page.html").read_text(encoding="utf-8")
    samples = samples_of(groups)
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            summary=summary,
            counts=counts(groups),
            groups=[{"title": g.title, "note": g.note, "cards": list(_cards(g))} for g in groups],
            roles=[role for role in ROLES if any(role in s.roles_M for s in samples)],
        )
    )


def samples_of(groups: Sequence[Group]) -> list[Shown]:
    return [sample for group in groups for row in group.rows if not isinstance(row, Refused) for sample in row]


def counts(groups: Sequence[Group]) -> dict[str, Any]:
    """How much is shown, and how much of it is trained."""
    samples = samples_of(groups)
    tokens, trained = sum(s.num_used for s in samples), sum(s.num_trained for s in samples)
    return {
        "samples": len(samples),
        "tokens": tokens,
        "trained": trained,
        "share": trained / tokens if tokens else 0.0,
        "images": sum(len(s.encoded.images) for s in samples),
        "cut": sum(s.num_cut for s in samples if not s.unused),
        "unused": sum(bool(s.unused) for s in samples),
        "refused": sum(isinstance(row, Refused) for group in groups for row in group.rows),
    }


def _cards(group: Group) -> Iterator[dict[str, Any]]:
    for row in group.rows:
        if isinstance(row, Refused):
            yield {"place": f"{Path(row.source).name} row {row.row}", "refused": row.reason}
            continue
        for sample in row:
            place, _, said = headline(sample).partition(": ")
            yield {
                "place": place,
                "said": said,
                "unused": sample.unused,
                "cut": cut_line(sample),
                "notes": sample.encoded.notes,
                "strip": _strip(sample),
                "length": len(sample),
                "markup": "".join(_markup(sample)),
                "facts": _facts(sample),
            }


def _strip(sample: Shown) -> dict[str, str]:
    """Where along the sample tokens are trained, and where they are cut, as paths of an SVG one unit high."""
    begin, end = (0, 0) if sample.unused else (sample.begin, sample.end)
    cut = [True] * begin + [False] * (end - begin) + [True] * (len(sample) - end)
    return {"trained": _bars((sample.targets_T > 0).tolist() if not sample.unused else []), "cut": _bars(cut)}


def _bars(flags: Sequence[bool]) -> str:
    return "".join(f"M{begin} 0h{end - begin}v1h-{end - begin}z" for flag, begin, end in _runs(flags) if flag)


def _facts(sample: Shown) -> str:
    """For the page's script: ids of all tokens, and reason, role, part and weight in runs, as JSON."""
    texts: dict[str, int] = {}
    encoded = sample.encoded
    parts = [Part(part).name.lower() for part in encoded.parts_T.tolist()]
    each = zip(sample.reasons_T, sample.roles_T, parts, sample.targets_T.tolist(), strict=True)
    runs = [
        [end - begin, *(texts.setdefault(text, len(texts)) for text in said), round(weight, 4)]
        for (*said, weight), begin, end in _runs(list(each))
    ]
    told = {"ids": encoded.ids_T.tolist(), "texts": list(texts), "runs": runs}
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _markup(sample: Shown) -> Iterator[str]:
    """Blocks of messages; in them what is set apart; in that runs of tokens alike; each token an `i`."""
    tokens = list(_tokens(sample))
    apart_T = apart_of(sample.encoded, sample.controls_T)
    for number, image in enumerate(sample.encoded.images):
        apart_T[image.begin : image.end] = [f"{IMAGE}{number}"] * (image.end - image.begin)
    classes_T = _classes(sample)
    for block in blocks_of(sample.encoded):
        num_trained = 0 if sample.unused else int((sample.targets_T[block.begin : block.end] > 0).sum())
        name = f"m {_role_class(sample, block)}{' has' if num_trained else ''}"
        yield f'<section class="{name}">{_label(sample, block, num_trained)}<div class=x>'
        for apart, begin, end in _runs(apart_T[block.begin : block.end]):
            run = "".join(_run_markup(sample, tokens, classes_T, block.begin + begin, block.begin + end))
            yield _set_apart(sample, apart, run, end - begin) if apart else run
        yield "</div></section>\n"


def _label(sample: Shown, block: Block, num_trained: int) -> str:
    said = [sample.role_of(block.message), counted(block.end - block.begin, "token")]
    said[1:1] = [f"message {block.message}"] * (block.message != NO_MESSAGE)
    said += [f"{num_trained:,} trained"] * (num_trained > 0)
    left_out = any(turn.weight == 0 for turn in sample.encoded.turns if turn.message == block.message)
    said += ["left out"] * left_out
    return f"<header><b>{escape(said[0])}</b>{''.join(f'<small>{text}</small>' for text in said[1:])}</header>"


def _role_class(sample: Shown, block: Block) -> str:
    role = sample.role_of(block.message)
    return f"r-{role}" if role in (*ROLES, TEMPLATE) else "r-other"


def _set_apart(sample: Shown, apart: str, run: str, num_tokens: int) -> str:
    if apart.startswith(IMAGE):
        return _image_markup(sample.encoded.images[int(apart.removeprefix(IMAGE))], run)
    if apart == "tools":  # long, and seldom what one looks for
        return f"<details class=tools><summary>tools · {counted(num_tokens, 'token')}</summary>{run}</details>"
    return f'<div class="apart {apart.replace(" ", "-")}"><em>{apart}</em>{run}</div>'


def _image_markup(image: EncodedImage, run: str) -> str:
    """The image, and its tokens folded below it."""
    drawn, place = thumbnail(image.source), escape(place_of(image.source))
    picture = f'<img src="{drawn.url}" width={drawn.width} height={drawn.height} alt="image" title="{place}">'
    tokens = f"<details><summary>{image_line(image)}</summary>{run}</details>"
    return f"<div class=image>{picture}{tokens}</div>"


def _classes(sample: Shown) -> list[str]:
    """t trained, n not, c cut; k written by the template; w with a weight of its own."""
    owners_T, parts = owners(sample.encoded).tolist(), sample.encoded.parts_T.tolist()
    classes = []
    for t, weight in enumerate(sample.targets_T.tolist()):
        if sample.unused or not sample.begin <= t < sample.end:
            classes.append("c")
        elif weight > 0:
            classes.append("t" if weight == 1 else f"t w×{weight:.4g}")
        else:
            classes.append("n k" if parts[t] in (Part.TEMPLATE, Part.NAME) or owners_T[t] == NO_MESSAGE else "n")
    return classes


def _run_markup(sample: Shown, tokens: list[str], classes_T: list[str], begin: int, end: int) -> Iterator[str]:
    for name, first, last in _runs(classes_T[begin:end]):
        name, _, weight = name.partition("×")
        said = f' data-w="×{weight}"' if weight else ""
        yield (
            f'<span class="{name}"{said}>' + "".join(_grouped(sample, tokens, begin + first, begin + last)) + "</span>"
        )


def _grouped(sample: Shown, tokens: list[str], begin: int, end: int) -> Iterator[str]:
    """Tokens, those that share a character in one frame."""
    joined = sample.joined_T
    t = begin
    while t < end:
        last = t + 1
        while last < end and joined[last]:
            last += 1
        together = "".join(tokens[t:last])
        yield f"<span class=g>{together}</span>" if last > t + 1 else together
        t = last


def _tokens(sample: Shown) -> Iterator[str]:
    for t, pieces in enumerate(marked(sample)):
        text = "".join(_visible(*piece) for piece in pieces)
        if sample.joined_T[t] and not text:
            yield "<i class=b>◦</i>"  # the rest of a character that the token before shows
        elif sample.controls_T[t]:
            yield f"<i class=s>{text}</i>"
        else:
            yield f"<i>{text}</i>"


def _visible(text: str, mark: str) -> str:
    if not mark:
        return escape(text, quote=False)
    return f"<u>{mark}</u>\n" if text == "\n" else f"<u{' class=q' if len(mark) > 1 else ''}>{mark}</u>"


def _runs(values: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """Equal neighbours as (value, begin, end)."""
    end = 0
    for value, run in groupby(values):
        begin, end = end, end + sum(1 for _ in run)
        yield value, begin, end
