"""The process in which tools run, so that one that hangs or crashes can be killed: `python -m posttrain.rollout.tool_process`.

It reads a line of JSON with the names of the functions and the longest answer in characters, says that it is ready, and from
then on answers each line {function, arguments} with a line {failed, text}. What tools print goes to stderr. Where its input
ends it ends too, in the middle of a call if need be.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from posttrain.config.values import expand_path
from posttrain.errors import InputError
from posttrain.python_file import import_file
from posttrain.rollout.calculator import calculator

BUILT_IN: dict[str, Callable[..., Any]] = {"calculator": calculator}


def load_function(named: str) -> Callable[..., Any]:
    """The function that an entry of tools.functions names. Raises InputError."""
    if named in BUILT_IN:
        return BUILT_IN[named]
    path, _, name = named.rpartition(":")
    if not path or not name:
        known = ", ".join(BUILT_IN)
        raise InputError(
            f"tools.functions: {named!r} is neither {known} nor FILE.py:FUNCTION, such as ./tools.py:search"
        )
    file = Path(expand_path(path)).absolute()
    if not file.is_file():
        raise InputError(
            f"tools.functions: there is no file {file}. Write {named.replace(path, 'FILE.py')} with its path."
        )
    function = getattr(import_file(str(file), "tools.functions"), name, None)
    if not callable(function):
        raise InputError(f"tools.functions: {file} has no function {name!r}.")
    return function


def main() -> None:
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # tools may read and print as they like
    os.dup2(2, 1)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(asked, lines), daemon=True).start()
    begin = json.loads(lines.get())
    functions = {named: load_function(named) for named in begin["functions"]}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    while True:
        call = json.loads(lines.get())
        failed, text = _run(functions[call["function"]], call["arguments"])
        print(json.dumps({"failed": failed, "text": text[: begin["max_characters"]]}), file=answers, flush=True)


def _read(asked: TextIO, lines: queue.SimpleQueue[str]) -> None:
    for line in asked:
        lines.put(line)
    os._exit(0)


def _run(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[bool, str]:
    """Whether it failed, and the answer's text."""
    try:
        answer = function(**arguments)
        return False, answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)
    except (Exception, SystemExit) as error:  # a tool raises what it likes, and the model is told
        kind = "" if function in BUILT_IN.values() else f"{type(error).__name__}: "
        return True, f"Error: {kind}{error}"


if __name__ == "__main__":
    main()
