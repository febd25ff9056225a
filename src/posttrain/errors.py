"""What can end a command: `InputError` (exit code 2), `RunError` (3), and `RunStopped` (130 or 143).

Their text is all that a person sees: what was found, what was expected, where, and what to do next.
"""


class InputError(Exception):
    """An option, a file or a row is wrong; nothing was trained yet."""


class RunError(Exception):
    """A run that had begun cannot go on."""


class LocalError(RunError):
    """What ends this process alone: the others do not raise it, and lose contact instead."""


class LostContact(RunError):
    """Another process went away while this one talked to it."""


class OutOfMemory(LocalError):
    """Memory ran out in this process."""


class RunStopped(Exception):
    """A run that a signal asked to stop, and that has saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
