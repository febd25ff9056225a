"""A run as it goes on: what is due, what was best, what is written where, and how it ends."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from posttrain.config.schema import Config
from posttrain.data.batches import Schedule
from posttrain.data.chat import ChatTokenizer
from posttrain.distributed.device import choose_device, ran_out_of_memory
from posttrain.distributed.watchdog import watching
from posttrain.distributed.world import World, join_world
from posttrain.engine.build import kept_dtype
from posttrain.engine.check import check_export
from posttrain.engine.checkpoint import Checkpoints, Progress, check_is_checkpoint, read_progress
from posttrain.engine.engine import Engine
from posttrain.engine.export import export, export_adapter
from posttrain.errors import InputError, RunError, RunStopped
from posttrain.loops.run_advice import RunAdvice
from posttrain.loops.run_copy import RunCopy
from posttrain.loops.step_log import StepLog, StepWork
from posttrain.models.flops import forward_backward_flops
from posttrain.models.kernels import fused_parts
from posttrain.models.load import find_model, load_config
from posttrain.models.lora import check_base, model_fingerprint
from posttrain.run.folder import RunFolder, RunState, clear_leftovers, library_versions
from posttrain.run.metrics import Metrics, drop_after
from posttrain.run.progress import Display
from posttrain.run.signals import StopRequest, catching_signals
from posttrain.run.trackers import check_trackers, start_trackers
from posttrain.wording import counted


@contextmanager
def joined(config: Config) -> Iterator[tuple[World, torch.dtype, Display]]:
    """The processes that train together, watched for hangs, the number format that they compute in, and the main one's console."""
    device = choose_device(config.trainer.device)
    dtype = device.compute_dtype(config.model.dtype)
    with (
        watching(config.trainer.hang_timeout_seconds) as watchdog,
        join_world(device, dtype, config.engine, watchdog, kept_dtype(config.model)) as world,
        Display(world.is_main, watchdog.alive) as display,
    ):
        yield world, dtype, display


class RunData(Protocol):
    """What a run must know of its data: rows to learn from by imitation, or prompts to answer."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def chat(self) -> ChatTokenizer: ...
    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the rows of a step."""

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end turns."""


class TrainingRun:
    """One run of a training loop. Every process has one and calls it alike; only the main one prints and writes."""

    def __init__(self, config: Config, world: World, display: Display, request: StopRequest):
        self.config, self.world, self.display, self.request = config, world, display, request
        self.folder = RunFolder(Path(config.trainer.default_local_dir))
        self.copy = RunCopy(self.folder.path, config.trainer.default_hdfs_dir, world, display)
        self.checkpoints = Checkpoints(self.folder.path, config.trainer.max_ckpt_to_keep, world, self.copy.update)
        self.metrics = Metrics(None)
        self.advice = RunAdvice(config, world, self.folder, display)
        self.resolved_yaml = ""
        self.state = RunState(world_size=world.size, versions=library_versions())
        self.progress = Progress(step=0, best=None, best_step=None, stale_validations=0, data="", model="", updates=0)
        self.last_saved = -1
        self._stopped_early = False
        self._stop_signal = 0  # that all processes have agreed on
        self._flags = torch.zeros(2, device=world.device.torch_device)

    @classmethod
    @contextmanager
    def open(cls, config: Config, resolved_yaml: str, world: World, display: Display) -> Iterator[TrainingRun]:
        """The run in its folder. On the way out run.json says how it ended, whatever happened."""
        world.on_main(lambda: check_trackers(config.trainer.logger))
        with ExitStack() as stack:
            run = cls(config, world, display, stack.enter_context(catching_signals()))
            stack.callback(lambda: run.metrics.close())
            stack.callback(run.copy.close)
            stack.callback(lambda: run.checkpoints.close())
            run.resolved_yaml = resolved_yaml
            world.on_main(run._claim_folder)
            world.watchdog.folder = run.folder
            try:
                yield run
            except RunStopped:
                raise
            except BaseException as error:
                display.end_work()
                run._write_failure()
                run.copy.say_incomplete()
                if ran_out_of_memory(error):
                    raise run.advice.out_of_memory(error) from error
                raise

    def plan(self, data: RunData, lines: list[str], report: dict[str, Any]) -> None:
        """Say the arithmetic of the run in these lines and write data_report.json, before a model is loaded."""
        self.data = data
        model = self.config.model
        shape = load_config(find_model(model.path), model.override_config, model.revision, model.trust_remote_code)
        self.progress = replace(self.progress, data=data.fingerprint, model=model_fingerprint(shape, model))
        for line in lines:
            self.display.say(line)
        self._found = self.world.on_main(self._checkpoint_to_resume)  # till here nothing of an earlier run was touched
        self.state.total_steps = data.schedule.num_steps
        self.state.data_fingerprint, self.state.model_fingerprint = self.progress.data, self.progress.model
        if self.world.is_main:
            self.folder.write("config.yaml", self.resolved_yaml)
            self.folder.write_json("data_report.json", report)
            self.folder.write_state(self.state)
            self.copy.update()
        self.advice.plan(data, shape, report, read_progress(self._found).step if self._found else -1)

    def resume(self, engine: Engine) -> None:
        """Go on from the newest checkpoint, if there is one, and begin to write metrics."""
        self.world.watchdog.beat("resuming")
        if self._found is not None:
            self.world.on_main(lambda: check_base(self._found, engine.adapters))
            self.progress = self.checkpoints.restore(engine, self._found)
            if self._found.parent.resolve() != self.folder.path.resolve():  # the best model so far lies elsewhere
                self.progress = replace(self.progress, best=None, best_step=None, stale_validations=0)
            self.last_saved = self.progress.step
            self._stopped_early = self._stale()
            self.display.say(f"resumed from {self._found}: step {self.progress.step} of {self.state.total_steps}")
        self.state.step, self.state.best_step = self.progress.step, self.progress.best_step
        if self.world.is_main:
            drop_after(self.folder.metrics, self.step if self._found else -1)
            self.metrics = Metrics(self.folder.metrics, [*self._trackers(), self.advice.history])
        trained, every = engine.num_weights()
        self.advice.begin(trained, every)
        trainer, device = self.config.trainer, self.world.device
        if self.config.model.use_liger and (fused := fused_parts(engine.policy.lm)):
            self.display.say(f"Liger computes {', '.join(fused)}; the loss and attention stay posttrain's own")
        if engine.adapters:
            self.display.say(f"adapters: {trained:,} of {every:,} weights are trained")
        if self.step >= self.state.total_steps:
            self.display.say(
                f"this run has {counted(self.step, 'step')} already, of {self.state.total_steps} that are asked for: there is nothing to train. "
                "Raise trainer.total_training_steps or trainer.total_epochs, or choose another trainer.default_local_dir."
            )
        self.log = StepLog(
            self.world,
            self.metrics,
            self.display,
            steps_per_epoch=self.data.schedule.steps_per_epoch,
            log_freq=trainer.log_freq,
            max_skipped=trainer.max_skipped_steps,
            flops=forward_backward_flops(engine.policy.lm.config),
            peak_flops=device.peak_flops(device.compute_dtype(self.config.model.dtype)) * self.world.size,
        )

    @property
    def step(self) -> int:
        """Steps done, those that were skipped included."""
        return self.state.step

    def begin(self) -> None:
        """Start the live line."""
        self.display.begin_work("training", self.state.total_steps, self.state.step)
        self.log.restart_clock()

    @property
    def stopping(self) -> bool:
        """Whether early stopping or a signal ends the run. Every process must ask once a step.

        Several processes agree on a signal one step late, so that none waits for the answer inside a step; likewise on
        a checkpoint that could not be written, which raises RunError.
        """
        mine = [float(self.request.signal or 0), float(self.checkpoints.failed)]
        before, self._flags = self._flags, self.world.sum(torch.tensor(mine, device=self.world.device.torch_device))
        signals, failures = before.tolist() if self.world.size > 1 else mine
        if failures:
            self.checkpoints.wait()
        if not self._stop_signal and signals:
            self._stop_signal = max(int(number) for number in self.world.gather(self.request.signal or 0))
        return self._stopped_early or bool(self._stop_signal)

    def due(self, frequency: int | str) -> bool:
        """Whether something that happens every so many steps (100) or epochs (`2ep`) and at the end happens after this one."""
        if isinstance(frequency, str):
            frequency = int(frequency.removesuffix("ep")) * self.data.schedule.steps_per_epoch
        return self.step == self.state.total_steps or (frequency > 0 and self.step % frequency == 0)

    def record(self, work: StepWork) -> None:
        """Note a step that was just dispatched."""
        self.state.step += 1
        self.log.record(self.step, work)

    def judge(self, engine: Engine, found: dict[str, float]) -> None:
        """Write a validation; keep the model if it is the best so far, and stop if there was none for long."""
        if found:
            self.metrics.write(self.step, "val", found)
            better = self._compare(found.get(self.config.trainer.best_metric, math.nan), self.step)
            shown = ", ".join(f"{name}={value:.4g}" for name, value in found.items())
            self.display.say(f"step {self.step}: {shown}{' (best so far)' if better and self.step else ''}")
            if better and self.step:  # the model before training lies where it came from
                self._export(engine, "checkpoint-best")
            self.advice.look()
        self.log.restart_clock()

    def save(self, engine: Engine) -> None:
        """Begin to write a checkpoint to resume from; training goes on meanwhile."""
        self.world.watchdog.beat("saving", patient=True)
        self.log.settle()  # resuming from it, no step before it is written again
        self.progress = replace(self.progress, step=self.step, updates=engine.step)
        with self.log.waiting_for_save():
            self.checkpoints.save(engine, self.progress, partial(export_adapter, engine) if engine.adapters else None)
        self.last_saved = self.step
        self._write_state("running")
        self.copy.say_problem("it is tried again at the next save")

    def finish(self, engine: Engine) -> None:
        """End the run: finished, with a model to use, or stopped, with a checkpoint to go on from (RunStopped)."""
        self.log.settle()
        if self.last_saved != self.step:
            self.save(engine)
        self.checkpoints.wait()
        self.display.end_work()
        if self._stop_signal:
            self._write_state("stopped")
            self.copy.finish()
            raise RunStopped(
                f"Stopped at step {self.step} of {self.state.total_steps}; saved. The same command goes on from there.",
                self._stop_signal,
            )
        dtype = self._export(engine, "checkpoint-final")
        if engine.adapters:
            computed = self.world.device.compute_dtype(self.config.model.dtype)
            exact = dtype == computed == torch.float32
            check_export(engine, self.folder.path / "checkpoint-final", exact, self.config.model.trust_remote_code)
        self._write_state("finished")
        self.advice.conclude()
        self.copy.finish()
        self._say_what_next()

    def _claim_folder(self) -> None:
        self.folder.create()
        clear_leftovers(self.folder.path)
        self.copy.check()
        saved, begin_from = self.checkpoints.saved(), self._begin_from
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # then these are this run's own
        if saved and (restarted or self.config.trainer.resume_mode == "auto"):
            return
        if begin_from:
            check_is_checkpoint(begin_from, "trainer.resume_from_path")
        if saved and not (begin_from and begin_from.resolve() == saved[-1].resolve()):
            raise InputError(
                f"{self.folder.path} holds checkpoints, such as {saved[-1].name}. Choose another trainer.default_local_dir, "
                "delete it, or go on from it with trainer.resume_mode=auto."
            )

    @property
    def _begin_from(self) -> Path | None:
        trainer = self.config.trainer
        given = trainer.resume_from_path if trainer.resume_mode != "disable" else None
        return Path(given) if given else None

    def _checkpoint_to_resume(self) -> Path | None:
        """The newest checkpoint, or the one that is to be begun from. Raises InputError where it belongs to another run."""
        place = next(iter(reversed(self.checkpoints.saved())), self._begin_from)
        if place is None:
            return None
        found = read_progress(place)
        if found.data != self.progress.data:
            raise InputError(
                f"{place} was trained on other data or other batches (rows, tokenizer, template, max_length, batch size, "
                "seed or shuffling differ; in GRPO also reward, algorithm, tools and sampling). Use the same, or begin another run, with "
                f"another trainer.default_local_dir and without trainer.resume_from_path.{self._changed_options(place.parent)}"
            )
        if found.model != self.progress.model:
            raise InputError(
                f"{place} holds another model than {self.config.model.path}, or other adapters (model.lora_rank, lora_alpha, "
                "target_modules). Use the same, or begin another run, with another trainer.default_local_dir and without "
                f"trainer.resume_from_path.{self._changed_options(place.parent)}"
            )
        return place

    def _changed_options(self, folder: Path) -> str:
        """Which options of this run are not those of the run in the folder, said as one more line."""
        saved = folder / "config.yaml"
        if not saved.exists():
            return ""
        before, now = (_flat(yaml.safe_load(text)) for text in (saved.read_text(), self.resolved_yaml))
        changed = [f"{name}={now[name]} ({before.get(name)} before)" for name in now if now[name] != before.get(name)]
        return f"\nNot as in {saved}: {', '.join(changed)}." if changed else ""

    def _compare(self, value: float, step: int) -> bool:
        """Whether a validation is the best so far (NaN never is); counts those that are not, for early stopping."""
        trainer, best = self.config.trainer, self.progress.best
        better = value == value and (
            best is None or (value < best if trainer.best_metric == "val_loss" else value > best)
        )
        stale = 0 if better else self.progress.stale_validations + 1
        self.progress = replace(self.progress, stale_validations=stale)
        if better:
            self.progress = replace(self.progress, best=value, best_step=step)
        self._stopped_early = self._stale()
        if self._stopped_early:
            self.display.say(f"stopping early: {stale} validations without a better {trainer.best_metric}")
        return better

    def _stale(self) -> bool:
        patience = self.config.trainer.early_stopping_patience
        return patience is not None and self.progress.stale_validations >= patience

    def _export(self, engine: Engine, name: str) -> torch.dtype:
        """The finished model, in the number format that it came in, which is given back; after the checkpoint that is being
        written."""
        self.world.watchdog.beat("exporting", patient=True)
        with self.log.waiting_for_save():
            self.checkpoints.wait()
        model = self.config.model
        source = load_config(find_model(model.path), None, model.revision, model.trust_remote_code).dtype
        dtype = source if isinstance(source, torch.dtype) and not model.random_weights else torch.float32
        chat = self.data.chat
        processor = chat.images.processor if chat.images else None
        export(engine, chat.tokenizer, self.folder.path / name, dtype, self.data.end_ids, processor)
        self.copy.update()
        return dtype

    def _trackers(self) -> list[Any]:
        trainer = self.config.trainer
        name = trainer.experiment_name or self.folder.path.name
        options = _flat(self.config.model_dump(mode="json"))
        return start_trackers(trainer.logger, trainer.project_name, name, self.folder.path, options)

    def _write_state(self, status: str) -> None:
        self.state.status, self.state.best_step = status, self.progress.best_step
        if self.world.is_main:
            self.folder.write_state(self.state)

    def _write_failure(self) -> None:
        """Say in run.json that a planned run failed; where even that cannot be written, the first error matters more."""
        try:
            if self.state.total_steps:
                self._write_state("failed")
        except RunError as error:
            self.display.say(str(error))

    def _say_what_next(self) -> None:
        folder, best = self.folder.path, self.progress.best_step
        if best == 0:
            self.display.say(
                "the best validation was the one before training: look at the metrics before you use this model"
            )
        if best and best != self.state.step:
            self.display.say(f"best validation at step {best}: {folder / 'checkpoint-best'}")
        self.display.say(
            f"finished after {counted(self.state.step, 'step')}. The model lies in {folder / 'checkpoint-final'}"
        )
        self.display.say(f"  next: posttrain evaluate --model_path {folder} --test_file TEST.parquet")
        self.display.say(f"        posttrain generate --model {folder} --num_samples 100")


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Options by dotted name, as plain values that trackers can show."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in options.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | bool | str) else str(value)
    return flat
