"""A user's own Python file: its functions are rewards and tools."""

from __future__ import annotations

import sys
import traceback
import zlib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from posttrain.errors import InputError

LONGEST_QUOTE = 300


def import_file(file: str, option: str) -> ModuleType:
    """The file, by its whole path, imported once in this process. Raises InputError that names the option."""
    name = f"file_{Path(file).stem}_{zlib.crc32(file.encode()):08x}"  # files of one name may lie in two folders
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{option}: {file} is no Python file; its name must end in .py.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up
    beside = str(Path(file).parent)
    sys.path.insert(0, beside)  # files beside it can be imported, as where it is run by itself
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the user's and raises what it likes
        del sys.modules[name]
        raise InputError(f"{option}: {file} cannot be imported: {where(error, file)}.") from None
    finally:
        sys.path.remove(beside)
        sys.path.append(beside)  # for imports in functions; nothing of ours is hidden by a file there
    return module


def where(error: BaseException, file: str) -> str:
    """What was raised, and the last line of the file that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == file else None
    line = line or (own[-1].lineno if own else None)
    return f"{type(error).__name__}: {error}"[:LONGEST_QUOTE] + (f" (line {line} of {Path(file).name})" if line else "")
