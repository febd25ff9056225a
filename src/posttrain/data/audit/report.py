"""An audit as an object to keep and as a page for the terminal."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.audit.audit import Audit
from posttrain.data.audit.chunk import TOO_LONG, Checks
from posttrain.data.audit.findings import KINDS
from posttrain.wording import counted

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
BARS = 16
ROWS_PADDED_TOGETHER = 8
_BAR_WIDTH = 40


def report(found: Audit, checks: Checks) -> dict[str, Any]:
    """What `data check --json` prints and report.json holds."""
    is_too_long_unused = checks.truncation in ("error", "drop")
    num_unused = int(found.rows_with(("unusable", "too-long") if is_too_long_unused else ("unusable",)).sum())
    dropped = found.findings.reasons.get("unusable", Counter())
    if is_too_long_unused and found.findings.counts["too-long"]:
        dropped = dropped + Counter({TOO_LONG: found.findings.counts["too-long"]})
    return {
        "files": found.train.rows_a_file(),
        "val_files": found.val.rows_a_file(),
        "rows_read": found.train.num_rows,
        "rows_used": found.train.num_rows - num_unused,
        "rows_dropped": _sorted(dropped),
        "findings": {kind: _of_kind(found, kind) for kind in KINDS if found.findings.counts[kind]},
        "tokens": _tokens(found, checks) if len(found.lengths.values) else None,
        "images": _images(found) if found.train.has_images.values.any() else None,
        "not_checked": _not_checked(found, checks),
    }


def as_page(told: dict[str, Any]) -> list[RenderableType]:
    """The report for a person, to be printed one after the other."""
    from rich.text import Text

    files = told["files"]
    names = ", ".join(file["file"] for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    page: list[RenderableType] = [
        Text(f"{names}: {counted(told['rows_read'], 'row')}, {told['rows_used']:,} can be used", "bold")
    ]
    for kind, of_kind in told["findings"].items():
        page.append(_finding(kind, of_kind))
    if not told["findings"]:
        page.append(Text("Nothing was found.", "green"))
    if told["tokens"]:
        page += _tokens_page(told["tokens"])
    if told["images"]:
        page.append(Text(_images_said(told["images"])))
    page += [Text(f"not checked: {reason}", "yellow") for reason in told["not_checked"]]
    return page


def _of_kind(found: Audit, kind: str) -> dict[str, Any]:
    return {
        "count": found.findings.counts[kind],
        "rows": int(found.rows_with((kind,)).sum()),
        "meaning": KINDS[kind].meaning,
        "advice": KINDS[kind].advice,
        "is_wrong": KINDS[kind].is_wrong,
        "reasons": _sorted(found.findings.reasons.get(kind, Counter())),
        "examples": [asdict(finding) for finding in found.findings.examples[kind]],
    }


def _tokens(found: Audit, checks: Checks) -> dict[str, Any]:
    lengths_N, kept_N = found.lengths.values, found.kept_lengths.values
    parts = [
        {"role": role, "part": part, "tokens": count, "trained": found.trained[role, part]}
        for (role, part), count in found.tokens.most_common()
    ]
    return {
        "num_samples": len(lengths_N),
        "num_used_samples": len(kept_N),
        "num_tokens": int(kept_N.sum(dtype=np.int64)),
        "num_trained_tokens": found.num_trained,
        "max_length": checks.max_length,
        "truncation": checks.truncation,
        "length_percentiles": _percentiles(lengths_N),
        "lengths": _histogram(lengths_N),
        "parts": parts,
        "padded_tokens": _padded(kept_N),
    }


def _images(found: Audit) -> dict[str, Any]:
    """Sizes are of those that can be read, in pixels; tokens of those in rows that can be rendered."""
    sizes_I, tokens_I = found.image_sizes.values, found.image_tokens.values
    return {
        "num_images": len(found.train.image_keys.values),
        "num_different": len(np.unique(found.train.image_keys.values)),
        "rows_with_images": int(found.train.has_images.values.sum()),
        "num_tokens": int(tokens_I.sum(dtype=np.int64)),
        "widths": _percentiles(sizes_I[:, 0]),
        "heights": _percentiles(sizes_I[:, 1]),
        "tokens_an_image": _percentiles(tokens_I),
    }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    return {str(p): int(np.percentile(values, p)) for p in PERCENTILES} if len(values) else {}


def _histogram(lengths_N: np.ndarray) -> list[dict[str, int]]:
    """Bars of one width from the shortest to the 99th percentile, and one for all that are longer."""
    least, most = int(lengths_N.min()), int(lengths_N.max())
    width = max(1, -(-(int(np.percentile(lengths_N, 99)) + 1 - least) // (BARS - 1)))
    counts = np.bincount(np.minimum((lengths_N - least) // width, BARS - 1))
    begins = [least + bar * width for bar in range(len(counts))]
    ends = [*(begin - 1 for begin in begins[1:]), most]
    return [
        {"from": begin, "to": end, "samples": int(count)}
        for begin, end, count in zip(begins, ends, counts, strict=True)
    ]


def _padded(kept_N: np.ndarray) -> dict[str, int]:
    """What an epoch would cost if rows were padded to the longest of a few, drawn at random, or of all."""
    if not len(kept_N):
        return {"to_longest_of_8": 0, "to_longest": 0}
    shuffled_N = np.random.default_rng(0).permutation(kept_N).astype(np.int64)
    begins = np.arange(0, len(kept_N), ROWS_PADDED_TOGETHER)
    sizes = np.diff(begins, append=len(kept_N))
    longest = np.maximum.reduceat(shuffled_N, begins)
    return {"to_longest_of_8": int((longest * sizes).sum()), "to_longest": int(kept_N.max()) * len(kept_N)}


def _not_checked(found: Audit, checks: Checks) -> list[str]:
    reasons = []
    if checks.make_chat is None:
        reasons.append("tokens, lengths, what is trained and cut: needs --tokenizer DIR or model.path=DIR")
    if not found.val.num_rows:
        reasons.append("rows that leak from validation: needs --val_files FILE or data.val_files=FILE")
    return reasons


def _finding(kind: str, of_kind: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    text = Text()
    places = f" ({of_kind['count']:,} places)" if of_kind["count"] > of_kind["rows"] else ""
    text.append(
        f"\n{counted(of_kind['rows'], 'row')}{places}  {kind}",
        "bold red" if of_kind["is_wrong"] else "bold yellow",
    )
    text.append(f": {of_kind['meaning']}\n")
    for reason, count in of_kind["reasons"].items():
        text.append(f"  {count:,} {reason}\n")
    for example in of_kind["examples"]:
        text.append(f"  {example['file']} row {example['row']}", "cyan")
        text.append(f": {example['found']}\n")
    if of_kind["count"] > len(of_kind["examples"]):
        text.append(f"  and {of_kind['count'] - len(of_kind['examples']):,} more\n", "dim")
    text.append(f"  {of_kind['advice']}", "italic")
    return text


def _tokens_page(tokens: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    used, trained = tokens["num_tokens"], tokens["num_trained_tokens"]
    padded = tokens["padded_tokens"]
    percentiles = ", ".join(f"{p}%: {length:,}" for p, length in tokens["length_percentiles"].items())
    lines = [
        f"\n{used:,} tokens an epoch, {trained:,} of them trained ({trained / max(used, 1):.1%}), in "
        f"{tokens['num_used_samples']:,} of {tokens['num_samples']:,} samples",
        f"packed as posttrain does it {used:,}; padded to the longest of {ROWS_PADDED_TOGETHER} rows "
        f"{_times(padded['to_longest_of_8'], used)}; padded to the longest of all {_times(padded['to_longest'], used)}",
        f"length in tokens, share of samples that are no longer: {percentiles}",
    ]
    return [Text("\n".join(lines)), _picture(tokens), _parts_table(tokens["parts"])]


def _images_said(images: dict[str, Any]) -> str:
    lines = [
        f"\n{counted(images['num_images'], 'image')}, {images['num_different']:,} of them different, in "
        f"{counted(images['rows_with_images'], 'row')}"
    ]
    named = {"width in pixels": "widths", "height in pixels": "heights", "tokens an image": "tokens_an_image"}
    for name, key in named.items():
        if images[key]:
            said = ", ".join(f"{p}%: {value:,}" for p, value in images[key].items())
            lines.append(f"{name}, share of images that have no more: {said}")
    return "\n".join(lines)


def _times(count: int, packed: int) -> str:
    return f"{count:,} ({count / max(packed, 1):.2f} x)"


def _picture(tokens: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    most = max(bar["samples"] for bar in tokens["lengths"])
    text = Text("tokens            samples\n", "bold")
    for bar in tokens["lengths"]:
        is_long = bar["samples"] and bar["to"] > tokens["max_length"]
        begins_within = bar["from"] <= tokens["max_length"]
        text.append(f"{bar['from']:>7,} - {bar['to']:>7,} ")
        text.append("█" * -(-bar["samples"] * _BAR_WIDTH // most), "red" if is_long else "green")
        text.append(f" {bar['samples']:,}")
        text.append(f"  {'some ' if begins_within else ''}beyond data.max_length\n" if is_long else "\n")
    return text


def _parts_table(parts: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("role", "part", "tokens", "trained", "share trained", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    for part in parts:
        share = f"{part['trained'] / part['tokens']:.1%}"
        table.add_row(part["role"], part["part"], f"{part['tokens']:,}", f"{part['trained']:,}", share)
    return table


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(counts.most_common())
