"""The copy of a run's folder elsewhere: when it is brought up to date, and what is said of it."""

from __future__ import annotations

from pathlib import Path

from posttrain.distributed.world import World
from posttrain.run.progress import Display
from posttrain.run.remote import RemoteCopy


class RunCopy:
    """Every process has one; only the main one's copies, and none does without a `url`."""

    def __init__(self, folder: Path, url: str | None, world: World, display: Display):
        self.url, self.world, self.display = url, world, display
        self._remote = RemoteCopy(folder, url) if url and world.is_main else None

    def check(self) -> None:
        """Raise InputError unless the folder elsewhere can be written."""
        if self._remote:
            self._remote.check()

    def update(self) -> None:
        """Begin to copy what is new."""
        if self._remote:
            self._remote.update()

    def finish(self) -> None:
        """Wait until everything is there, or say what is not. Every process must call this."""
        if self.url is None:
            return
        watchdog = self.world.watchdog
        watchdog.beat("copying the run folder", patient=True)

        def finish() -> None:
            if self._remote:
                self._remote.finish(watchdog.alive)

        self.world.on_main(finish)
        if self._remote and not self._remote.problem:
            self.display.say(f"a copy lies in {self.url}")
        self.say_problem("copy the run folder by hand, or give the same command again")

    def say_problem(self, what_now: str) -> None:
        """Say why the last files did not arrive, if they did not."""
        if self._remote and self._remote.problem:
            missing = [*self._remote.missing[:5], *(["..."] if len(self._remote.missing) > 5 else [])]
            what = f" Not there, or older: {', '.join(missing)}." if missing else ""
            self.display.say(f"copying to {self.url} fails: {self._remote.problem}; {what_now}.{what}")

    def say_incomplete(self) -> None:
        """Of a run that failed, which does not wait."""
        if self._remote:
            self.display.say(f"{self.url} may lack what was written last; the same command brings it up to date")

    def close(self) -> None:
        if self._remote:
            self._remote.close()
