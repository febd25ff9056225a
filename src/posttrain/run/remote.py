"""A copy of the run folder elsewhere, which follows it while training goes on. A copy that fails never stops a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from posttrain.errors import InputError

OPTION = "trainer.default_hdfs_dir"
SENT = ".copied.json"  # of the run folder: what was copied where, by its size and time
WHOLE_BY = ("progress.json", "config.json", "run.json")  # what readers look for, and so comes last
PAUSES_SECONDS = (1.0, 5.0)  # before a file is tried again
SECONDS_A_LOOK = 1.0


class RemoteCopy:
    """Keeps the folder `url`, a path of any file system that fsspec knows, like the run folder. A thread copies.

    Files that the run has removed are removed there too; those that it did not copy are left alone.
    """

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url
        self.missing: list[str] = []  # files that are not there, or not as they are here
        self.problem: str | None = None  # of the last copy, in words
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy")
        self._closing = Event()
        self._num_moves = 0  # of bytes and files, to tell slow from hung

    def check(self) -> None:
        """Raise InputError unless the folder can be written, before an hour is lost."""
        try:
            files, root = _opened(self.url)
            if _is_within(files, root, self.folder):
                raise InputError(
                    f"{OPTION}={self.url} lies in {self.folder}, the run folder; expected a folder elsewhere."
                )
            probe = f"{root}/.posttrain-can-write"
            files.makedirs(root, exist_ok=True)
            files.pipe_file(probe, b"")
            files.rm_file(probe)
        except InputError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise InputError(
                f"{OPTION}={self.url} cannot be written: {_said(error)}. Leave it out to keep the run in {self.folder} alone."
            ) from None

    def update(self) -> None:
        """Begin to copy what is new, after what is being copied."""
        self._thread.submit(self._update)

    def finish(self, alive: Callable[[], None]) -> None:
        """Copy what is new and wait for it; `missing` and `problem` say what came of it. Calls `alive` as bytes arrive."""
        copying, seen = self._thread.submit(self._update), -1
        while wait([copying], timeout=SECONDS_A_LOOK).not_done:
            if seen != self._num_moves:
                seen = self._num_moves
                alive()

    def close(self) -> None:
        """Let the file that is being copied arrive, and no more."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)

    def _update(self) -> None:
        try:
            here = self._files_here()
            self.missing, self.problem = list(here), None
            files, root = _opened(self.url)
            files.invalidate_cache()
            sizes = {path: facts["size"] for path, facts in files.find(root, detail=True).items()}
            sent = self._sent()
            for name in sorted(here, key=lambda name: (name.endswith(WHOLE_BY), name)):
                if self._closing.is_set():
                    return
                if not (sent.get(name) == here[name] and sizes.get(f"{root}/{name}") == here[name][0]):
                    self._copy(files, name, f"{root}/{name}")
                    sent[name] = here[name]
                    self._note(sent)
                self.missing.remove(name)
            for name in [name for name in sent if not (self.folder / name).exists()]:
                self._remove(files, f"{root}/{name}")
                del sent[name]
            self._note(sent)
        except Exception as error:  # each file system has errors of its own
            self.problem = _said(error)

    def _files_here(self) -> dict[str, list[int]]:
        """Name -> size and time of each file that is whole; hidden ones are being written."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            parts = path.relative_to(self.folder).parts
            if path.is_file() and not any(part.startswith(".") and part != ".metadata" for part in parts):
                facts = path.stat()
                found["/".join(parts)] = [facts.st_size, facts.st_mtime_ns]
        return found

    def _copy(self, files: Any, name: str, place: str) -> None:
        for pause in (*PAUSES_SECONDS, None):
            try:
                files.makedirs(place.rpartition("/")[0], exist_ok=True)
                files.put_file(str(self.folder / name), place, callback=_Moving(self._moved))
                return self._moved()
            except Exception:
                if not (self.folder / name).exists():
                    return  # an older checkpoint that made room meanwhile
                if pause is None or self._closing.wait(pause):
                    raise

    def _moved(self) -> None:
        self._num_moves += 1

    def _remove(self, files: Any, place: str) -> None:
        """The file, and the folders that it leaves empty where a file system keeps such."""
        try:
            files.rm_file(place)
        except FileNotFoundError:
            return
        folder = place.rpartition("/")[0]
        while len(folder) > len(_opened(self.url)[1]) and files.isdir(folder) and not files.ls(folder):
            files.rmdir(folder)
            folder = folder.rpartition("/")[0]

    def _sent(self) -> dict[str, list[int]]:
        try:
            told = json.loads((self.folder / SENT).read_text())
        except FileNotFoundError:
            return {}
        return told["files"] if told["to"] == self.url else {}

    def _note(self, sent: dict[str, list[int]]) -> None:
        aside = self.folder / f"{SENT}.tmp"
        aside.write_text(json.dumps({"to": self.url, "files": sent}))
        aside.replace(self.folder / SENT)


class _Moving(Callback):
    """Tells of each part of a file that has moved."""

    def __init__(self, moved: Callable[[], None]):
        super().__init__()
        self.moved = moved

    def relative_update(self, inc: int = 1) -> None:
        self.moved()


def _opened(url: str) -> tuple[Any, str]:
    files, root = fsspec.core.url_to_fs(url)
    return files, root.rstrip("/")


def _is_within(files: Any, root: str, folder: Path) -> bool:
    protocols = [files.protocol] if isinstance(files.protocol, str) else files.protocol
    return "file" in protocols and Path(root).resolve().is_relative_to(folder.resolve())


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
