"""What is known of each step: written one step late, so that no step waits for the device to tell its own numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

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
class StepWork:
    """One step as its loop saw it: its updates of the weights (one, but for reinforcement learning) and what they were made of.

    `rollout` are the metrics of the answers that it learnt from, `rollout_seconds` among them.
    """

    updates: Sequence[tuple[LossReport, StepReport]]
    micro_batches: Sequence[MicroBatch]
    wait_seconds: float
    rollout: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Pending:
    """A step that was dispatched and whose numbers nobody has waited for."""

    step: int  # steps done with it
    work: StepWork
    counts: torch.Tensor  # real tokens and FLOPs over all processes, then each rank's own seconds
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The numbers of a step: means over its updates, sums of tokens."""

    loss: float
    weight: float
    grad_norm: float
    lr: float
    num_skipped: int
    measured: dict[str, float]

    @classmethod
    def of(cls, updates: Sequence[tuple[LossReport, StepReport]]) -> Outcome | None:
        """None where the step made no update. Waits for the device."""
        if not updates:
            return None
        losses, reports = zip(*updates, strict=True)
        measured = {name: sum(float(loss.measured[name]) for loss in losses) for name in losses[0].measured}
        return cls(
            loss=sum(float(loss.loss) for loss in losses) / len(losses),
            weight=sum(float(loss.total_weight) for loss in losses),
            grad_norm=sum(float(report.grad_norm) for report in reports) / len(reports),
            lr=reports[-1].lr,
            num_skipped=sum(bool(report.skipped) for report in reports),
            measured=measured,
        )


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

    def record(self, step: int, work: StepWork) -> None:
        """Note a step that was just dispatched and write the one before it. Every process must call this."""
        self.world.watchdog.beat("metrics")
        own_seconds = [0.0] * self.world.size
        own_seconds[self.world.rank] = (
            work.wait_seconds + sum(update.seconds for _, update in work.updates) + self._writing_seconds
        )
        self._writing_seconds = 0.0
        done = [
            sum(m.num_tokens for m in work.micro_batches),
            sum(self.flops(m) for m in work.micro_batches if m.rows_N),
        ]
        counted = done if self.world.counts else [0.0] * len(done)
        numbers = torch.tensor([*counted, *own_seconds], dtype=self.world.device.sum_dtype)
        counts = self.world.sum(numbers.to(self.world.device.torch_device))
        self.settle()
        now = time.perf_counter()
        self._pending = Pending(step, work, counts, now - self._previous_end)
        self._previous_end = now
        if step % self.steps_per_epoch == 0:
            self.settle()
            weight = self._epoch_weight
            told = f"loss={self._epoch_loss / weight:.4f}" if weight else "no step changed the weights"
            self.display.say(f"Epoch {step // self.steps_per_epoch}: {told}")
            self._epoch_loss = self._epoch_weight = 0.0

    def settle(self) -> None:
        """Write the step that is pending. Raises RunError where too many steps in a row were skipped."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        outcome = Outcome.of(pending.work.updates)
        tokens, flops, *own_seconds = pending.counts.tolist()
        started = time.perf_counter()  # from here on it waits for no other process
        slowest = self.slowest.of(own_seconds, pending.seconds)
        rollout = pending.work.rollout  # what the answers and their rewards took is not the training's
        elsewhere = (rollout.get("rollout_seconds") or 0.0) + (rollout.get("reward_seconds") or 0.0)
        seconds = max(pending.seconds - elsewhere, 1e-9)
        facts = ""
        if outcome is not None:
            self._count(pending.step, outcome)
            facts = f"loss {outcome.loss:.4f}  {tokens / seconds:,.0f} tokens/s"
        if pending.step % self.log_freq == 0:
            if outcome is not None:
                self._write(pending, outcome, int(tokens), flops, seconds, slowest)
            if pending.work.rollout:
                self._write_rollout(pending, outcome, seconds)
        if pending.work.rollout:
            reward = pending.work.rollout["reward_mean"]
            facts = f"reward {'unknown' if reward is None else f'{reward:.3f}'}  {facts}"
        self.display.advance(1, facts)
        self._writing_seconds += time.perf_counter() - started
        if self.num_skipped_in_a_row >= self.max_skipped:
            raise RunError(
                f"{self.num_skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to step "
                f"{pending.step}. Lower optim.lr (the rate was {pending.work.updates[-1][1].lr:g}), lengthen the warm-up, or look for "
                "rows that are wrong with `posttrain data show`. Checkpoints from before are in the run folder."
            )

    def _count(self, step: int, outcome: Outcome) -> None:
        if outcome.num_skipped:
            self._count_skipped(step, outcome.loss, outcome.grad_norm)
        else:
            self.num_skipped_in_a_row = 0
            self._epoch_loss += outcome.loss * outcome.weight
            self._epoch_weight += outcome.weight

    def _write(
        self,
        pending: Pending,
        outcome: Outcome,
        tokens: int,
        flops: float,
        seconds: float,
        slowest: dict[str, float | int],
    ) -> None:
        self.metrics.write(
            pending.step,
            "train",
            {
                "loss": outcome.loss,
                "grad_norm": outcome.grad_norm,
                "lr": outcome.lr,
                "epoch": pending.step / self.steps_per_epoch,
                "num_tokens": tokens,
                "num_trained_tokens": int(outcome.measured.get("tokens", outcome.weight)),
                "tokens_per_second": tokens / seconds,
                "mfu": flops / seconds / self.peak_flops,
                "step_seconds": pending.seconds,
                "data_wait_seconds": pending.work.wait_seconds,
                "save_wait_seconds": self._save_wait_seconds,
                "peak_memory_gib": self.world.device.peak_memory_gib(),
                "skipped_steps": self.num_skipped,
                **slowest,
            },
        )
        self._save_wait_seconds = 0.0

    def _write_rollout(self, pending: Pending, outcome: Outcome | None, train_seconds: float) -> None:
        """The answers' metrics, and the means over tokens of what the loss measured of them."""
        measured = outcome.measured if outcome is not None else {}
        num_tokens = measured.get("tokens", 0.0)
        means = {name: total / num_tokens for name, total in measured.items() if name != "tokens" and num_tokens}
        self.metrics.write(pending.step, "rollout", {**pending.work.rollout, **means, "train_seconds": train_seconds})

    def _count_skipped(self, step: int, loss: float, norm: float) -> None:
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        self.display.say(f"step {step} skipped: loss {loss}, gradient norm {norm}; the weights stay as they were")
