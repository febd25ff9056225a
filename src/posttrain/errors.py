"""What can end a command: `InputError` (exit code 2) and `RunError` (exit code 3).

Their text is all that a person sees: what was found, what was expected, where, and what to do next.
"""


class InputError(Exception):
    """An option, a file or a row is wrong; nothing was trained yet."""


class RunError(Exception):
    """A run that had begun cannot go on."""
