"""Published data sets -> parquet files with what SFT, evaluation and RL need.

question, answer -> data_source, prompt, response, messages, reward_model, extra_info
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import expand_path
from posttrain.data.sources import Row, Source, find_sources, read_rows
from posttrain.errors import InputError, RunError
from posttrain.rewards.gsm8k import ANSWER_MARK, final_answer

if TYPE_CHECKING:
    import pyarrow as pa

HUB_NAME, HUB_CONFIG = "openai/gsm8k", "main"
SPLITS = ("train", "test")
# The first pattern that a file matches is taken: the hub's layout, then the published names, then what is similar.
GSM8K_FILES = ("main/{}-*.parquet", "{}-*.parquet", "{}.jsonl", "{}.parquet", "{}*.parquet", "{}*.jsonl")


def prepare_gsm8k(local_dataset_path: str | None, local_save_dir: str) -> dict[str, Any]:
    """Write train.parquet and test.parquet, and return {split: {rows, file, sources}, "notes": [...]}.

    `local_dataset_path` is a folder with GSM8K as parquet or JSON lines; without one the hub is asked. A row whose
    answer ends in no number that can be read is refused, since it could be neither judged nor rewarded.
    """
    sources = _hub_splits() if local_dataset_path is None else _local_splits(Path(expand_path(local_dataset_path)))
    folder = _save_folder(Path(expand_path(local_save_dir)), sources)
    rows = {split: _gsm8k_rows(sources[split], split) for split in SPLITS if sources[split]}
    summary: dict[str, Any] = {"notes": []}
    for split in SPLITS:
        if split not in rows:
            summary["notes"].append(f"{local_dataset_path} holds no {split} split: no {split}.parquet was written.")
            continue
        file = folder / f"{split}.parquet"
        _write_parquet(rows[split], file)
        names = [source.name for source in sources[split]]
        summary[split] = {"rows": len(rows[split]), "file": str(file), "sources": names}
    return summary


def _hub_splits() -> dict[str, list[Source]]:
    return {split: [Source(HUB_NAME, "hub", "", HUB_CONFIG, split)] for split in SPLITS}


def _local_splits(folder: Path) -> dict[str, list[Source]]:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputError(
            f"--local_dataset_path={folder}: found {found}, expected a folder with GSM8K as train.jsonl or "
            f"train*.parquet. Without the option, {HUB_NAME} is taken from the hub."
        )
    files = {split: _files_of(folder, split) for split in SPLITS}
    if not files["train"]:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise InputError(
            f"--local_dataset_path={folder}: there is no train split. Found {there}; expected train.jsonl, "
            "train*.parquet or main/train-*.parquet."
        )
    return {
        split: find_sources([str(file) for file in files[split]], "--local_dataset_path") if files[split] else []
        for split in SPLITS
    }


def _files_of(folder: Path, split: str) -> list[Path]:
    for pattern in GSM8K_FILES:
        if files := sorted(folder.glob(pattern.format(split))):
            return files
    return []


def _save_folder(folder: Path, sources: dict[str, list[Source]]) -> Path:
    names = {Path(source.name).resolve() for split in SPLITS for source in sources[split]}
    for split in SPLITS:
        if (folder / f"{split}.parquet").resolve() in names:
            raise InputError(
                f"--local_save_dir={folder}: {split}.parquet there is the source itself and would be overwritten. "
                "Name another folder."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--local_save_dir={folder} cannot be made: {error}. Name another folder.") from None
    return folder


def _gsm8k_rows(sources: list[Source], split: str) -> list[dict[str, Any]]:
    try:
        rows = [_gsm8k_row(row, split, index) for index, row in enumerate(read_rows(sources))]
    except InputError as error:
        if sources[0].reader != "hub":
            raise
        raise InputError(f"{error} A folder with GSM8K can be given with --local_dataset_path.") from None
    if not rows:
        raise InputError(f"{sources[0].name} holds no rows; expected GSM8K's {split} split.")
    return rows


def _gsm8k_row(row: Row, split: str, index: int) -> dict[str, Any]:
    question, answer = _text(row, "question"), _text(row, "answer")
    ground_truth = final_answer(answer)
    if ground_truth is None:
        raise InputError(
            f"{row.place}: the answer ends in {answer[-60:]!r}; expected a last line such as '{ANSWER_MARK} 18'. "
            "Mend or remove the row."
        )
    prompt = [{"role": "user", "content": question}]
    return {
        "data_source": "gsm8k_sft",
        "prompt": prompt,
        "response": answer,
        "messages": [*prompt, {"role": "assistant", "content": answer}],
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "question": question, "answer": answer},
    }


def _text(row: Row, column: str) -> str:
    if column not in row.values:
        there = ", ".join(row.values) or "(none)"
        raise InputError(f"{row.place}: there is no column '{column}'; found: {there}. GSM8K has question and answer.")
    value = row.values[column]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{row.place}: the {column} is {value!r}; expected text. Mend or remove the row.")
    if not _is_unicode(value):
        raise InputError(f"{row.place}: the {column} holds half a character pair, which is not Unicode. Mend the row.")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write as an escape and parquet cannot hold
        return False
    return True


def _write_parquet(rows: list[dict[str, Any]], file: Path) -> None:
    """Written aside and renamed, so that no half file ever carries the name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(rows, _schema()), unfinished)
        unfinished.replace(file)
    except OSError as error:
        raise RunError(f"{file} could not be written: {error}. Make room, or name another --local_save_dir.") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    messages = pa.list_(pa.struct({"role": text, "content": text}))
    return pa.schema(
        {
            "data_source": text,
            "prompt": messages,
            "response": text,
            "messages": messages,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct({"split": text, "index": pa.int64(), "question": text, "answer": text}),
        }
    )


PREPARE = {"gsm8k": prepare_gsm8k}  # data sets by the name that `posttrain data prepare` takes
