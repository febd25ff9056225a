"""A rollout server as the trainer sees it: started, asked, and ended with all that it started."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from posttrain.errors import InputError, RunError
from posttrain.rollout import vllm_server
from posttrain.rollout.vllm_server import Channel

SCRIPT = Path(vllm_server.__file__)
LINES_QUOTED = 20
# a worker of torchrun has these; a server is nobody's worker
OF_WORKERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


class ServerProcess:
    """A process that answers over a socket which only the two have. It is the first of a group that ends with it.

    Its answers must begin within `seconds`, its start within `start_seconds`; what it prints goes to the file `log`.
    """

    def __init__(
        self,
        command: Sequence[str],
        settings: dict[str, Any],
        log: Path,
        *,
        start_seconds: float,
        seconds: float,
        shared: Sequence[int] = (),
        environment: dict[str, str] | None = None,
    ):
        self.log, self.seconds = log, seconds
        self._python, self._swept = command[0], False
        self._failure: str | None = None
        ours, its = socket.socketpair()
        self._channel = Channel(ours)
        log.parent.mkdir(parents=True, exist_ok=True)
        with its, log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    [*command, str(its.fileno()), str(os.getpid()), json.dumps(settings)],
                    pass_fds=(its.fileno(), *shared),
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    env={**_outside_of_workers(), **(environment or {})}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise InputError(
                    f"vllm.python={command[0]} cannot be started: {error.strerror}. Give the path of a Python interpreter."
                ) from None
        self.facts: dict[str, Any] = self._wait(start_seconds, "start", "vllm.start_timeout_seconds")[0]["ready"]

    def ask(
        self, do: str, header: dict[str, Any], payload: bytes = b"", advance: Callable[[int], None] = lambda done: None
    ) -> tuple[dict[str, Any], bytes]:
        """The answer to a request. `advance` hears of each part that is done. Raises RunError."""
        if self._failure:
            raise RunError(self._failure)
        try:
            self._channel.send({"do": do, **header}, payload, self.seconds)
        except TimeoutError:
            raise self._hung(do, self.seconds, "vllm.timeout_seconds") from None
        except OSError:
            raise self._ended(do) from None
        while True:
            said, data = self._wait(self.seconds, do, "vllm.timeout_seconds")
            if "answer" in said:
                return said["answer"], data
            if said["done"]:  # else a sign of life
                advance(said["done"])

    def close(self) -> None:
        """End the process, kindly for a moment, and all that it started."""
        self._failure = self._failure or "The vLLM server was closed and cannot answer any more."
        self._channel.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(vllm_server.SECONDS_TO_END)
        self._kill()

    def _wait(self, seconds: float, doing: str, option: str) -> tuple[dict[str, Any], bytes]:
        """The next message, or an error that says what became of the server."""
        deadline = time.monotonic() + seconds
        while not select.select([self._channel.connection], [], [], 0.2)[0]:
            # those that a dead server started may hold its end of the socket open
            if self._process.poll() is not None:
                raise self._ended(doing)
            if time.monotonic() > deadline:
                raise self._hung(doing, seconds, option)
        try:
            said, data = self._channel.receive(seconds)
        except TimeoutError:
            raise self._hung(doing, seconds, option) from None
        except (EOFError, OSError):
            raise self._ended(doing) from None
        if "failed" in said:
            raise self._refused(said)
        return said, data

    def _refused(self, said: dict[str, Any]) -> Exception:
        if said["missing"]:
            self._kill()
            return InputError(
                f"rollout.name=vllm needs vLLM, which {self._python} does not have ({said['error']}). Install it there with "
                "`pip install posttrain[vllm]`, or in an environment of its own, and say vllm.python=/path/to/bin/python."
            )
        if said["failed"] == "start":
            if said["imported"]:
                message = f"vLLM could not start: {said['error']}. Its options are in the section vllm."
            else:
                message = (
                    f"vLLM cannot be imported by {self._python}: {said['error']}. docs/vllm.md says what an environment for it "
                    "needs."
                )
            return self._failed(message, InputError)
        return self._failed(f"The vLLM server failed: {said['error']}.")

    def _ended(self, doing: str) -> Exception:
        try:
            code: int | None = self._process.wait(vllm_server.SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            code = None
        how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
        return self._failed(
            f"The vLLM server ended {how} (doing: {doing}). Where memory ran out, lower vllm.gpu_memory_utilization or "
            "vllm.max_model_len."
        )

    def _hung(self, doing: str, seconds: float, option: str) -> Exception:
        return self._failed(
            f"The vLLM server gave no sign of life for {seconds:g} seconds (doing: {doing}) and was ended. If it needs "
            f"longer, raise {option}."
        )

    def _failed(self, message: str, kind: type[Exception] = RunError) -> Exception:
        self._kill()
        lines = self.log.read_text(errors="replace").splitlines()[-LINES_QUOTED:]
        said = "\n".join(f"    {line}" for line in lines) or "    nothing"
        self._failure = f"{message}\nIts last lines (all are in {self.log}):\n{said}"
        return kind(self._failure)

    def _kill(self) -> None:
        if self._swept:  # its number may be another's by now
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._swept = True


def _outside_of_workers() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name not in OF_WORKERS and not name.startswith("TORCHELASTIC_")
    }
