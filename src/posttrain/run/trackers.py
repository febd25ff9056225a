"""Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, trackio, swanlab, by accelerate's trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.errors import InputError

CONSOLE = "console"
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab")


def check_trackers(names: list[str]) -> None:
    """Raise InputError for a name that is none of them, or whose package is not installed."""
    from importlib.util import find_spec

    for name in names:
        if name not in (CONSOLE, *TRACKERS):
            raise InputError(f"trainer.logger: unknown tracker '{name}'; there are {', '.join((CONSOLE, *TRACKERS))}.")
        if name != CONSOLE and not (find_spec(name) and find_spec("accelerate")):
            raise InputError(
                f"trainer.logger={name} needs a package: pip install 'posttrain[{name}]', or leave {name} out; metrics.jsonl is "
                "always written."
            )


def start_trackers(names: list[str], project: str, experiment: str, folder: Path, options: dict[str, Any]) -> list[Any]:
    """Started trackers, on the main process only. Each has `log(values, step)` and `finish()`."""
    names = [name for name in names if name != CONSOLE]
    if not names:
        return []
    from accelerate import PartialState, tracking

    PartialState()  # accelerate's trackers log through it
    makers: dict[str, Any] = {
        "tensorboard": lambda: tracking.TensorBoardTracker("tensorboard", folder),
        "wandb": lambda: tracking.WandBTracker(project, name=experiment, dir=str(folder)),
        "mlflow": lambda: tracking.MLflowTracker(project, run_name=experiment),
        "trackio": lambda: tracking.TrackioTracker(project, name=experiment),
        "swanlab": lambda: tracking.SwanLabTracker(project, experiment_name=experiment, logdir=str(folder / "swanlab")),
    }
    started = []
    for name in names:
        tracker = makers[name]()
        tracker.main_process_only = False  # only the main process is here
        tracker.start()
        if name != "tensorboard":  # its hyperparameters would open a second run
            tracker.store_init_configuration(options)
        started.append(tracker)
    return started
