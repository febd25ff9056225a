"""What is known of each step: written one step late, so that no step waits for the device to tell its own numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from posttrain.distributed.world import World
from posttrain.engine.engine import LossReport
from posttrain.engine.optimizer import StepReport
from posttrain.errors import RunError
from posttrain.loops.slowest import Slowest
from posttrain.records import MicroBatch
from posttrain.run.metrics import Metrics
from posttrain.run.progress import Display


@dataclass(frozen=True)
class Pending:
    """A step that was dispatched and whose numbers nobody has waited for."""

    step: int  # steps done with it
    loss: LossReport
    update: StepReport
    work: torch.Tensor  # real tokens and FLOPs over all processes, then each rank's own seconds
    seconds: float
    wait_seconds: float


class StepLog:
    """Metrics, live line and epoch means of training steps, and the guard against a run of steps that are not finite."""

    def __init__(
        self,
        world: World,
        metrics: Metrics,
        display: Display,
        *,
        steps_per_epoch: int,
        log_freq: int,
        max_skipped: int,
        flops: Callable[[MicroBatch], float],
        peak_flops: float,
    ):
        self.world, self.metrics, self.display = world, metrics, display
        self.steps_per_epoch, self.log_freq, self.max_skipped = steps_per_epoch, log_freq, max_skipped
        self.flops, self.peak_flops = flops, peak_flops
        self.num_skipped = self.num_skipped_in_a_row = 0
        self._pending: Pending | None = None
        self.slowest, self._writing_seconds = Slowest(display), 0.0
        self._epoch_loss = self._epoch_weight = 0.0
        self._save_wait_seconds = 0.0  # since the last record
        self._previous_end = time.perf_counter()

    def restart_clock(self) -> None:
        """The next step begins now: what was done since the last one (validation, saving) is not its time."""
        self._previous_end = time.perf_counter()

    @contextmanager
    def waiting_for_save(self) -> Iterator[None]:
        """Training stands still inside, for saving."""
        started = time.perf_counter()
        yield
        self._save_wait_seconds += time.perf_counter() - started
        self.restart_clock()

    def record(
        self, step: int, loss: LossReport, update: StepReport, micro_batches: Sequence[MicroBatch], wait_seconds: float
    ) -> None:
        """Note a step that was just dispatched and write the one before it. Every process must call this."""
        self.world.watchdog.beat("metrics")
        own_seconds = [0.0] * self.world.size
        own_seconds[self.world.rank] = wait_seconds + update.seconds + self._writing_seconds
        self._writing_seconds = 0.0
        done = [sum(m.num_tokens for m in micro_batches), sum(self.flops(m) for m in micro_batches if m.rows_N)]
        counted = done if self.world.counts else [0.0] * len(done)
        numbers = torch.tensor([*counted, *own_seconds], dtype=self.world.device.sum_dtype)
        work = self.world.sum(numbers.to(self.world.device.torch_device))
        self.settle()
        now = time.perf_counter()
        self._pending = Pending(step, loss, update, work, now - self._previous_end, wait_seconds)
        self._previous_end = now
        if step % self.steps_per_epoch == 0:
            self.settle()
            mean = self._epoch_loss / self._epoch_weight if self._epoch_weight else math.nan
            self.display.say(f"Epoch {step // self.steps_per_epoch}: loss={mean:.4f}")
            self._epoch_loss = self._epoch_weight = 0.0

    def settle(self) -> None:
        """Write the step that is pending. Raises RunError where too many steps in a row were skipped."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        loss, weight = float(pending.loss.loss), float(pending.loss.total_weight)
        tokens, flops, *own_seconds = pending.work.tolist()
        started = time.perf_counter()  # from here on it waits for no other process
        slowest = self.slowest.of(own_seconds, pending.seconds)
        rate = tokens / pending.seconds
        if pending.update.skipped:
            self._count_skipped(pending.step, loss, float(pending.update.grad_norm))
        else:
            self.num_skipped_in_a_row = 0
            self._epoch_loss += loss * weight
            self._epoch_weight += weight
        if pending.step % self.log_freq == 0:
            self.metrics.write(
                pending.step,
                "train",
                {
                    "loss": loss,
                    "grad_norm": float(pending.update.grad_norm),
                    "lr": pending.update.lr,
                    "epoch": pending.step / self.steps_per_epoch,
                    "num_tokens": int(tokens),
                    "num_trained_tokens": int(weight),
                    "tokens_per_second": rate,
                    "mfu": flops / pending.seconds / self.peak_flops,
                    "step_seconds": pending.seconds,
                    "data_wait_seconds": pending.wait_seconds,
                    "save_wait_seconds": self._save_wait_seconds,
                    "peak_memory_gib": self.world.device.peak_memory_gib(),
                    "skipped_steps": self.num_skipped,
                    **slowest,
                },
            )
            self._save_wait_seconds = 0.0
        self.display.advance(1, f"loss {loss:.4f}  {rate:,.0f} tokens/s")
        self._writing_seconds += time.perf_counter() - started
        if self.num_skipped_in_a_row >= self.max_skipped:
            raise RunError(
                f"{self.num_skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to step "
                f"{pending.step}. Lower optim.lr (the rate was {pending.update.lr:g}), lengthen the warm-up, or look for rows "
                "that are wrong with `posttrain data show`. Checkpoints from before are in the run folder."
            )

    def _count_skipped(self, step: int, loss: float, norm: float) -> None:
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        self.display.say(f"step {step} skipped: loss {loss}, gradient norm {norm}; the weights stay as they were")
