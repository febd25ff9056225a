"""Tools that a model may call: Python functions, described to it as JSON schemas and run where they can be killed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from posttrain.config.schema import ToolOptions
from posttrain.data.chat import ChatTokenizer
from posttrain.errors import InputError, RunError
from posttrain.records import Conversation
from posttrain.rollout.forms import find_form
from posttrain.rollout.tool_process import load_function

_START_SECONDS = 120.0
_CHARACTERS_A_TOKEN = 100  # no answer of max_answer_tokens is longer, but for white space

Json = dict[str, Any]


class Outcome(StrEnum):
    """What became of a call."""

    ANSWERED = "answered"
    FAILED = "failed"  # the tool raised, or its process ended
    TIMED_OUT = "timed out"
    REFUSED = "refused"  # no such tool, or arguments that it does not take


@dataclass(frozen=True)
class Tool:
    """`named` is the entry of tools.functions, `schema` what the model is told."""

    named: str
    schema: Json

    @property
    def name(self) -> str:
        return self.schema["function"]["name"]

    @property
    def parameters(self) -> Json:
        return self.schema["function"]["parameters"]


@dataclass
class ToolCounts:
    """What happened in answers of several turns."""

    trajectories: int = 0
    turns: int = 0  # answers of the model
    calls: int = 0
    failed: int = 0  # calls whose tool raised or crashed
    timed_out: int = 0
    refused: int = 0  # calls that cannot be read, or of a tool or with arguments that there are not
    cut_answers: int = 0  # tools' answers over tools.max_answer_tokens
    cut: int = 0  # trajectories that a limit ended, but for answers that it cut
    rewritten: int = 0  # how often the template wrote the conversation so far in another way
    not_rendered: int = 0  # trajectories that ended because the template refuses what they hold


class Tools:
    """The tools of a run as its model calls them, and the process that runs them, which starts with the first call."""

    def __init__(self, options: ToolOptions, chat: ChatTokenizer):
        """Raises InputError where a tool cannot be used, or the chat template has no form of calls that can be read."""
        self.options, self.chat, self.counts = options, chat, ToolCounts()
        self._tools = {tool.name: tool for tool in map(_tool, options.functions)}
        if len(self._tools) < len(options.functions):
            raise InputError(f"tools.functions: two of {', '.join(options.functions)} have the same name; rename one.")
        characters = _CHARACTERS_A_TOKEN * options.max_answer_tokens
        self._process = _ToolProcess([tool.named for tool in self._tools.values()], characters)
        self.form = find_form(chat, self.schemas)

    @property
    def schemas(self) -> list[Json]:
        """What a chat template is given as `tools`."""
        return [tool.schema for tool in self._tools.values()]

    def offered_in(self, conversation: Conversation) -> Conversation:
        """The conversation with these tools, instead of its own, which nobody could run."""
        return replace(conversation, tools=self.schemas)

    def parameters_of(self, name: str) -> Json:
        """The JSON schema of a tool's arguments; of an unknown one's, that of none."""
        return self._tools[name].parameters if name in self._tools else {}

    def call(self, name: str, arguments: Json) -> tuple[Outcome, str]:
        """What became of the call, and the text that the model is told. Raises RunError where no tool can run."""
        if name not in self._tools:
            return Outcome.REFUSED, f"Error: there is no tool {name!r}. Tools: {', '.join(self._tools)}"
        tool = self._tools[name]
        if wrong := _what_is_wrong(name, tool.parameters, arguments):
            return Outcome.REFUSED, f"Error: {wrong}"
        outcome, text = self._process.call(tool.named, arguments, self.options.timeout_seconds)
        return outcome, text.encode("utf-8", "replace").decode()  # half a character pair is no text

    def take_counts(self) -> ToolCounts:
        """What happened since this was last asked."""
        counts, self.counts = self.counts, ToolCounts()
        return counts

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()


def _tool(named: str) -> Tool:
    from transformers.utils import get_json_schema

    function = load_function(named)
    try:
        return Tool(named, get_json_schema(function))
    except Exception as error:  # transformers' own kinds, or what reading a function's types raises
        said = str(error).rstrip(".!")
        raise InputError(
            f"tools.functions: {named} cannot be described to a model: {said}. It needs a docstring that begins with what it "
            'does, then "Args:" with a line `name: what it is` for each argument, and a type for each, such as `query: str`.'
        ) from None


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,), "object": (dict,),
    "null": (type(None),),
}  # fmt: skip


def _what_is_wrong(name: str, parameters: Json, arguments: Json) -> str:
    """What a model must change in its arguments; nothing where they can be passed."""
    known = parameters.get("properties", {})
    takes = ", ".join(known) or "none"
    if unknown := [key for key in arguments if key not in known]:
        return f"{name} has no argument {unknown[0]!r}. Its arguments: {takes}"
    if missing := [key for key in parameters.get("required", []) if key not in arguments]:
        return f"{name} needs the argument {missing[0]!r}. Its arguments: {takes}"
    for key, value in arguments.items():
        if not _fits(value, known[key]):
            return f"the argument {key!r} of {name} must be {_types_of(known[key])}, not {json.dumps(value)[:40]}"
    return ""


def _fits(value: Any, schema: Json) -> bool:
    if "enum" in schema and value not in schema["enum"]:
        return False
    expected = schema.get("type")
    names = [expected] if isinstance(expected, str) else expected or []
    if not names or (value is None and schema.get("nullable")):
        return True
    is_flag = isinstance(value, bool)
    return any(isinstance(value, _TYPES.get(kind, (object,))) and is_flag <= (kind == "boolean") for kind in names)


def _types_of(schema: Json) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    expected = schema.get("type", "anything")
    return expected if isinstance(expected, str) else " or ".join(expected)


class _ToolProcess:
    """The other end of `posttrain.rollout.tool_process`: one process, started again after it was killed."""

    def __init__(self, functions: Sequence[str], max_characters: int):
        self._begin = {"functions": list(functions), "max_characters": max_characters}
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def call(self, function: str, arguments: Json, timeout_seconds: float) -> tuple[Outcome, str]:
        process = self._process or self._start()
        answer = self._ask(process, {"function": function, "arguments": arguments}, timeout_seconds)
        if answer is not None:
            return (Outcome.FAILED if answer["failed"] else Outcome.ANSWERED), answer["text"]
        ended = process.poll()
        self.kill()
        if ended is None:
            return Outcome.TIMED_OUT, f"Error: the tool took longer than {timeout_seconds:g} seconds"
        return Outcome.FAILED, "Error: the tool crashed"

    def kill(self) -> None:
        """End it and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # a session of its own: Ctrl-C reaches the run alone, and what a tool starts can be killed with it
        command = [sys.executable, "-m", "posttrain.rollout.tool_process"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True, bufsize=0
        )
        self._read = b""
        if self._ask(process, self._begin, _START_SECONDS) is None:
            self.kill()
            raise RunError(
                f"The process that runs tools did not start within {_START_SECONDS:g} s. See what it said above."
            )
        return process

    def _ask(self, process: subprocess.Popen[bytes], asked: Json, timeout_seconds: float) -> Json | None:
        """Its answer, or None where it gave none in time or ended."""
        assert process.stdin and process.stdout
        until = time.monotonic() + timeout_seconds
        answers = select.poll()
        answers.register(process.stdout, select.POLLIN)
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
        except BrokenPipeError:
            process.wait()
            return None
        while b"\n" not in self._read:
            if not answers.poll(1000 * max(until - time.monotonic(), 0)):
                return None
            read = os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                process.wait()
                return None
            self._read += read
        line, self._read = self._read.split(b"\n", 1)
        return json.loads(line)
