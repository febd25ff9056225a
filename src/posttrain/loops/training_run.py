"""A run as it goes on: what is due, what was best, what is written where, and how it ends."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch

from posttrain.config.schema import Config
from posttrain.distributed.world import World
from posttrain.engine.checkpoint import Checkpoints, Progress, read_progress
from posttrain.engine.engine import Engine, LossReport
from posttrain.engine.export import export
from posttrain.engine.optimizer import StepReport
from posttrain.errors import InputError, RunError
from posttrain.loops.training_data import TrainingData, data_report, describe
from posttrain.models.flops import forward_backward_flops
from posttrain.models.load import find_model, load_config
from posttrain.records import MicroBatch
from posttrain.run.folder import RunFolder, RunState, library_versions
from posttrain.run.metrics import Metrics, drop_after
from posttrain.run.progress import Display, duration
from posttrain.run.signals import StopRequest, catching_signals
from posttrain.run.trackers import check_trackers, start_trackers


@dataclass
class Pending:
    """A step whose numbers nobody has waited for yet."""

    step: int
    loss: LossReport
    update: StepReport
    tokens: torch.Tensor  # real tokens and FLOPs of the step, over all processes
    seconds: float
    wait_seconds: float


@dataclass
class TrainingRun:
    """One run of a training loop. Every process has one; only the main one prints and writes."""

    config: Config
    world: World
    display: Display
    folder: RunFolder
    request: StopRequest
    metrics: Metrics = field(default_factory=lambda: Metrics(None))
    state: RunState = field(default_factory=RunState)
    progress: Progress = field(default_factory=lambda: Progress(0, None, None, 0, "", ""))
    last_judged: int = -1
    last_saved: int = -1
    _pending: Pending | None = None
    _stop_flag: torch.Tensor | None = None
    _stopped_early: bool = False
    _skipped: int = 0
    _skipped_in_a_row: int = 0
    _epoch_sums: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @classmethod
    @contextmanager
    def open(cls, config: Config, resolved_yaml: str, world: World, display: Display) -> Iterator[TrainingRun]:
        """The run in its folder; on the way out it says how it ended, whatever happened."""
        world.on_main(lambda: check_trackers(config.trainer.logger))
        folder = RunFolder(config.run_folder)
        with ExitStack() as stack:
            run = cls(config, world, display, folder, stack.enter_context(catching_signals()))
            world.on_main(run._claim_folder)
            run.state.world_size, run.state.versions = world.size, library_versions()
            if world.is_main:
                folder.write("config.yaml", resolved_yaml)
            try:
                yield run
            except RunStopped:
                raise
            except BaseException as error:
                display.end_work()
                if world.is_main and run.state.total_steps:
                    run.state.status = "failed"
                    run._write_state_or_say(error)
                raise
            finally:
                run.metrics.close()

    def plan(self, data: TrainingData) -> None:
        """Say and write the arithmetic of the run, before a model is loaded."""
        self.data = data
        config = load_config(
            find_model(self.config.model.path), self.config.model.override_config,
            self.config.model.revision, self.config.model.trust_remote_code,
        )  # fmt: skip
        shape = config.to_json_string(use_diff=False).replace(str(config.name_or_path), "")
        model_fingerprint = hashlib.sha256(_architecture(shape).encode()).hexdigest()[:16]
        self.progress = replace(self.progress, data=data.fingerprint, model=model_fingerprint)
        self.state.total_steps = data.schedule.num_steps
        self.state.data_fingerprint, self.state.model_fingerprint = data.fingerprint, model_fingerprint
        for line in describe(data, self.config, self.world):
            self.display.say(line)
        if self.world.is_main:
            self.folder.write_json("data_report.json", data_report(data))
            self.folder.write_state(self.state)

    def resume(self, engine: Engine) -> None:
        """Go on from the newest checkpoint, if there is one. Raises InputError where it belongs to another run."""
        self.checkpoints = Checkpoints(self.folder.path, self.config.trainer.max_ckpt_to_keep)
        found = self.world.on_main(self._checkpoint_to_resume)
        if found is not None:
            self.progress = self.checkpoints.restore(engine, found)
            self.last_judged = self.last_saved = engine.step
            self.display.say(f"resumed from {found}: step {engine.step} of {self.state.total_steps}")
        self.state.step, self.state.best_step = engine.step, self.progress.best_step
        if self.world.is_main:
            drop_after(self.folder.metrics, engine.step if found else -1)
            trainer = self.config.trainer
            name = trainer.experiment_name or self.folder.path.name
            flat = _flat(self.config.model_dump(mode="json"))
            trackers = start_trackers(trainer.logger, trainer.project_name, name, self.folder.path, flat)
            self.metrics = Metrics(self.folder.metrics, trackers)
        device = self.world.device
        self._peak_flops = device.peak_flops(device.compute_dtype(self.config.model.dtype)) * self.world.size
        self._count_flops = forward_backward_flops(engine.policy.lm.config)

    def begin(self) -> None:
        """Start the live line."""
        self.display.begin_work("training", self.state.total_steps, self.state.step)
        self._ended = time.perf_counter()

    @property
    def stopping(self) -> bool:
        """Whether all processes have agreed to stop; every process must ask once a step."""
        return self._stopped_early or self._asked_to_stop()

    def due(self, frequency: int | str, step: int) -> bool:
        """Whether something that happens every so many steps or epochs (`2ep`) happens after this one."""
        if isinstance(frequency, str):
            frequency = int(frequency.removesuffix("ep")) * self.data.schedule.steps_per_epoch
        return frequency > 0 and step % frequency == 0

    def record(
        self,
        engine: Engine,
        loss: LossReport,
        update: StepReport,
        micro_batches: Sequence[MicroBatch],
        started: float,
        loaded: float,
    ) -> None:
        """Note a step that was just dispatched, and write the one before it."""
        real = sum(m.num_tokens for m in micro_batches)
        flops = sum(self._count_flops(m) for m in micro_batches if m.rows_N)
        device = self.world.device.torch_device
        tokens = self.world.sum(torch.tensor([real, flops], dtype=torch.float64, device=device))
        before, self._pending = self._pending, None
        self._write(before)
        now = time.perf_counter()
        self._pending = Pending(engine.step, loss, update, tokens, now - self._ended, loaded - started)
        self._ended = now
        self.state.step = engine.step
        if engine.step % self.data.schedule.steps_per_epoch == 0:
            self.settle(engine)
            self._end_epoch(engine.step)

    def settle(self, engine: Engine) -> None:
        """Write the step that is still pending."""
        pending, self._pending = self._pending, None
        self._write(pending)

    def judge(self, engine: Engine, found: dict[str, float]) -> None:
        """Write a validation; keep the model if it is the best so far, and stop if there was none for long."""
        self.settle(engine)
        self.last_judged = engine.step
        trainer = self.config.trainer
        if not found:
            self._ended = time.perf_counter()
            return
        self.metrics.write(engine.step, "val", found)
        shown = ", ".join(f"{name}={value:.4g}" for name, value in found.items())
        value = found[trainer.best_metric]
        best = self.progress.best
        better = value == value and (best is None or (value < best if trainer.best_metric == "val_loss" else value > best))
        self.display.say(f"step {engine.step}: {shown}{' (best so far)' if better and engine.step else ''}")
        if better:
            self.progress = replace(self.progress, best=value, best_step=engine.step, stale_validations=0)
            if engine.step:  # the model before training lies where it came from
                self._export(engine, "checkpoint-best")
        else:
            self.progress = replace(self.progress, stale_validations=self.progress.stale_validations + 1)
        patience = trainer.early_stopping_patience
        if patience is not None and self.progress.stale_validations >= patience:
            self._stopped_early = True
            self.display.say(f"stopping early: {patience} validations without a better {trainer.best_metric}")
        self._ended = time.perf_counter()

    def save(self, engine: Engine) -> None:
        """Write a checkpoint to resume from."""
        self.settle(engine)
        self.progress = replace(self.progress, step=engine.step)
        self.checkpoints.save(engine, self.progress)
        self.last_saved = engine.step
        if self.world.is_main:
            self._write_state("running")
        self._ended = time.perf_counter()

    def finish(self, engine: Engine) -> None:
        """End the run: as finished with a model to use, or as stopped with a checkpoint to go on from."""
        self.settle(engine)
        if self.last_saved != engine.step:
            self.save(engine)
        self.display.end_work()
        if self.request_signal is not None:
            self._write_state("stopped")
            raise RunStopped(
                f"Stopped at step {engine.step} of {self.state.total_steps}; saved. The same command goes on from there.",
                self.request_signal,
            )
        self._export(engine, "checkpoint-final")
        self._write_state("finished")
        self._say_what_next()

    def _claim_folder(self) -> None:
        self.folder.create()
        saved = Checkpoints(self.folder.path, None).saved()
        if saved and self.config.trainer.resume_mode == "disable":
            raise InputError(
                f"{self.folder.path} holds checkpoints, such as {saved[-1].name}. Choose another trainer.default_local_dir, "
                "delete it, or go on from it with trainer.resume_mode=auto."
            )

    def _checkpoint_to_resume(self):
        saved = self.checkpoints.saved()
        if not saved:
            return None
        found = read_progress(saved[-1])
        if found.data != self.progress.data:
            raise InputError(
                f"{saved[-1]} was trained on other data or other batches (rows, tokenizer, template, max_length, batch size, "
                "seed or shuffling differ). Use the same, or another trainer.default_local_dir."
            )
        if found.model != self.progress.model:
            raise InputError(f"{saved[-1]} holds another model than {self.config.model.path}. Use the same model.path, or "
                             "another trainer.default_local_dir.")  # fmt: skip
        return saved[-1]

    def _asked_to_stop(self) -> bool:
        """Agreement is read one step late, so that nobody waits for it inside a step."""
        before = self._stop_flag
        flag = torch.tensor(float(self.request.signal or 0), device=self.world.device.torch_device)
        self._stop_flag = self.world.sum(flag) if self.world.size > 1 else flag
        if before is None and self.world.size > 1:
            return False
        self._agreed = float(before if self.world.size > 1 and before is not None else self._stop_flag)
        return self._agreed > 0

    @property
    def request_signal(self) -> int | None:
        """The signal that ended the run, on every process."""
        if not getattr(self, "_agreed", 0.0):
            return None
        return max(int(number) for number in self.world.gather(self.request.signal or 0))

    def _write(self, pending: Pending | None) -> None:
        if pending is None:
            return
        loss, norm = float(pending.loss.loss), float(pending.update.grad_norm)
        weight, skipped = float(pending.loss.total_weight), bool(pending.update.skipped)
        tokens, flops = pending.tokens.tolist()
        self._guard(pending.step, skipped, loss, norm)
        if not skipped:
            self._epoch_sums[0] += loss * weight
            self._epoch_sums[1] += weight
        rate = tokens / pending.seconds
        if pending.step % self.config.trainer.log_freq == 0:
            self.metrics.write(pending.step, "train", {
                "loss": loss, "grad_norm": norm, "lr": pending.update.lr,
                "epoch": pending.step / self.data.schedule.steps_per_epoch,
                "num_tokens": int(tokens), "num_trained_tokens": int(weight), "tokens_per_second": rate,
                "mfu": flops / pending.seconds / self._peak_flops,
                "step_seconds": pending.seconds, "data_wait_seconds": pending.wait_seconds,
                "peak_memory_gib": self.world.device.peak_memory_gib(), "skipped_steps": self._skipped,
            })  # fmt: skip
        self.display.advance(1, f"loss {loss:.4f}  {rate:,.0f} tokens/s")

    def _guard(self, step: int, skipped: bool, loss: float, norm: float) -> None:
        if not skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped += 1
        self._skipped_in_a_row += 1
        self.display.say(f"step {step} skipped: loss {loss}, gradient norm {norm}; the weights stay as they were")
        if self._skipped_in_a_row >= self.config.trainer.max_skipped_steps:
            raise RunError(
                f"{self._skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to step {step}. "
                f"Lower optim.lr (now {self.config.optim.lr:g}), lengthen the warm-up, or look for rows that are wrong with "
                "`posttrain data show`. Checkpoints from before are in the run folder."
            )

    def _end_epoch(self, step: int) -> None:
        total, weight = self._epoch_sums
        self._epoch_sums = [0.0, 0.0]
        epoch = step // self.data.schedule.steps_per_epoch
        self.display.say(f"Epoch {epoch}: loss={total / weight if weight else float('nan'):.4f}")

    def _export(self, engine: Engine, name: str) -> None:
        model = self.config.model
        source = load_config(find_model(model.path), None, model.revision, model.trust_remote_code).dtype
        dtype = source if isinstance(source, torch.dtype) and not model.random_weights else torch.float32
        export(engine, self.data.chat.tokenizer, self.folder.path / name, dtype, self.data.end_ids)

    def _write_state(self, status: str) -> None:
        if self.world.is_main:
            self.state.status, self.state.best_step = status, self.progress.best_step
            self.folder.write_state(self.state)

    def _write_state_or_say(self, error: BaseException) -> None:
        try:
            self.folder.write_state(self.state)
        except RunError as second:
            self.display.say(str(second))

    def _say_what_next(self) -> None:
        folder = self.folder.path
        best = self.progress.best_step
        if best and best != self.state.step:
            self.display.say(f"best validation at step {best}: {folder / 'checkpoint-best'}")
        self.display.say(f"finished after {self.state.step} steps. The model lies in {folder / 'checkpoint-final'}")
        self.display.say(f"  next: posttrain evaluate --model_path {folder} --test_file TEST.parquet")
        self.display.say(f"        posttrain generate --model {folder} --num_samples 100")


class RunStopped(Exception):
    """A run that ended because a signal asked it to, after saving."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def _architecture(config_json: str) -> str:
    """What of a model's configuration decides its weights, without where it came from or who wrote it."""
    import json

    config = json.loads(config_json)
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    return json.dumps(config, sort_keys=True)


def _flat(options: dict, prefix: str = "") -> dict[str, str | int | float | bool]:
    flat: dict[str, str | int | float | bool] = {}
    for name, value in options.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | bool | str) else str(value)
    return flat
