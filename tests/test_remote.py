"""The copy of the run folder elsewhere."""

import shutil
import time
from pathlib import Path
from threading import Event

import fsspec
import pytest

import forked
from posttrain.config.compose import compose
from posttrain.errors import InputError
from posttrain.run import remote
from posttrain.run.remote import RemoteCopy


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with one checkpoint, and a half-written one."""
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.01, 0.01))
    folder = tmp_path / "run"
    for name, text in {
        "checkpoint-1/state/.metadata": "m", "checkpoint-1/state/0.distcp": "abc", "checkpoint-1/progress.json": "{}",
        ".checkpoint-2.tmp/state/0.distcp": "half", "metrics.jsonl": "1\n", "config.yaml": "a: 1",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def there(url):
    files, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).strip("/"): files.cat(path).decode() for path in files.find(root)}


def here(folder):
    hidden = (".checkpoint-2.tmp", remote.SENT)
    names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in names.items() if not name.startswith(hidden)}


@pytest.mark.parametrize("form", ["memory://bucket/{}", "file://{}", "{}"])
def test_the_copy_follows_the_folder_and_leaves_what_is_not_its_own(run, tmp_path, form):
    url = form.format(tmp_path / "elsewhere")
    copy = RemoteCopy(run, url)
    copy.check()
    assert there(url) == {}
    copy.finish(lambda: None)
    assert (copy.problem, copy.missing) == (None, [])
    assert there(url) == here(run) and len(here(run)) == 5
    files, root = fsspec.core.url_to_fs(url)
    files.makedirs(f"{root}/checkpoint-9")
    files.pipe_file(f"{root}/checkpoint-9/mine", b"mine")
    shutil.rmtree(run / "checkpoint-1")  # retention
    (run / "metrics.jsonl").write_text("1\n2\n")
    files.rm_file(f"{root}/config.yaml")  # lost there
    again = RemoteCopy(run, url)  # as after a restart
    again.finish(lambda: None)
    again.close()
    assert there(url) == {**here(run), "checkpoint-9/mine": "mine"}
    assert not files.exists(f"{root}/checkpoint-1")
    if "memory" in form:
        files.store.clear()


def test_what_is_there_already_is_not_copied_again(run, tmp_path, monkeypatch):
    copy, copied = RemoteCopy(run, str(tmp_path / "elsewhere")), []
    copy.finish(lambda: None)
    plain = RemoteCopy._copy
    monkeypatch.setattr(
        RemoteCopy, "_copy", lambda self, files, name, place: (copied.append(name), plain(self, files, name, place))
    )
    (run / "metrics.jsonl").write_text("1\n2\n")
    RemoteCopy(run, copy.url).finish(lambda: None)
    assert copied == ["metrics.jsonl"]


def test_closing_waits_for_the_file_that_is_being_copied_and_no_other(run, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    plain, begun, copied = LocalFileSystem.put_file, Event(), []

    def slow(self, source, place, **more):
        begun.set()
        time.sleep(0.2)
        plain(self, source, place, **more)
        copied.append(Path(source).name)

    monkeypatch.setattr(LocalFileSystem, "put_file", slow)
    copy = RemoteCopy(run, str(tmp_path / "elsewhere"))
    copy.update()
    assert begun.wait(5)
    copy.close()
    time.sleep(0.5)
    assert len(copied) == 1 and list(there(copy.url)) == ["checkpoint-1/state/.metadata"]
    RemoteCopy(run, copy.url).finish(lambda: None)
    assert there(copy.url) == here(run)


def test_a_failure_is_tried_again_and_then_told(run, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    plain, left = LocalFileSystem.put_file, {"metrics.jsonl": 2, "progress.json": 3}

    def failing(self, source, place, **more):
        name = Path(source).name
        if left.get(name, 0) > 0:
            left[name] -= 1
            raise OSError("the other side is asleep")
        return plain(self, source, place, **more)

    monkeypatch.setattr(LocalFileSystem, "put_file", failing)
    monkeypatch.setattr(remote, "SECONDS_A_LOOK", 0.001)
    copy, beats = RemoteCopy(run, str(tmp_path / "elsewhere")), []
    copy.finish(lambda: beats.append(1))
    assert beats
    assert copy.problem == "OSError: the other side is asleep" and "checkpoint-1/progress.json" in copy.missing
    assert (tmp_path / "elsewhere" / "metrics.jsonl").exists()  # the third try
    copy.finish(lambda: None)
    assert copy.problem is None and there(copy.url) == here(run)


@pytest.mark.parametrize("url, message", [
    ("nosuch://there", "cannot be written: ValueError: Protocol not known"), ("{run}/inside", "lies in"),
    ("/proc/nowhere", "cannot be written"),
])  # fmt: skip
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(run, url, message):
    with pytest.raises(InputError, match=message):
        RemoteCopy(run, url.format(run=run)).check()


def test_the_run_folder_itself_is_a_folder_of_this_machine():
    with pytest.raises(InputError, match=r"trainer\.default_hdfs_dir=hdfs://a/b, which then gets a copy"):
        compose(["trainer.default_local_dir=hdfs://a/b"])


def test_a_run_leaves_a_copy_of_its_folder(tiny, tmp_path):
    forked.start_server()
    run, copy = tmp_path / "run", tmp_path / "copy"
    options = [
        f"data.train_files={tiny / 'train.parquet'}", f"data.cache_dir={tiny / 'cache'}", f"model.path={tiny / 'model'}",
        f"trainer.default_local_dir={run}", "data.train_batch_size=16", "trainer.total_training_steps=4",
        "trainer.save_freq=1", "trainer.max_ckpt_to_keep=2",
    ]  # fmt: skip

    def train(url, code=0):
        return forked.run(["sft", *options, f"trainer.default_hdfs_dir={url}"], tmp_path, code=code)

    assert "cannot be written" in train("/proc/nowhere", code=2)
    assert f"a copy lies in {copy}" in train(copy)
    names = sorted(path.name for path in copy.iterdir())
    assert names == ["checkpoint-3", "checkpoint-4", "checkpoint-final", "config.yaml", "data_report.json", "metrics.jsonl",
                     "run.json"]  # fmt: skip
    for path in run.rglob("*"):
        if path.is_file() and path.name != remote.SENT:
            assert (copy / path.relative_to(run)).read_bytes() == path.read_bytes(), path
