"""What is said to a person, and what the rules know of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from posttrain.config.schema import Config
from posttrain.run.advice.history import History

PAGE = "docs/troubleshooting.md"
ADAPTERS_BEAR = 10  # times the rate of all weights, as tutorials say


@dataclass(frozen=True)
class Advice:
    """What a rule found, with the numbers of this run, and what to do, with options as they are typed."""

    rule: str
    found: str
    remedies: list[str]

    @property
    def page(self) -> str:
        return f"{PAGE}#{self.rule}"

    def __str__(self) -> str:
        return "\n".join(
            [f"[{self.rule}] {self.found}", *(f"  - {remedy}" for remedy in self.remedies), f"  {self.page}"]
        )


@dataclass(frozen=True)
class EarlierRun:
    """The run that this one's model came from."""

    folder: str
    lr: float
    uses_adapters: bool
    imitated: bool  # it was SFT
    val_files: tuple[str, ...] = ()
    accuracy: tuple[float, float, float] | None = None  # with its interval, of its last validation
    val_temperature: float = 0.0  # at which its answers were drawn


@dataclass
class Seen:
    """A run as the main process knows it so far."""

    config: Config
    draws_answers: bool  # GRPO
    num_steps: int
    num_updates: int
    steps_per_epoch: int
    vocabulary: int
    num_weights: int
    num_trained: int
    rows: dict[str, int] = field(default_factory=dict)  # rows_read, rows_used, num_tokens, num_trained_tokens
    rows_dropped: dict[str, int] = field(default_factory=dict)
    earlier: EarlierRun | None = None
    history: History = field(default_factory=History)

    @property
    def uses_adapters(self) -> bool:
        model = self.config.model
        return bool(model.lora_rank or model.lora_adapter_path)

    def begins_with(self, name: str) -> bool:
        """Whether the first values of a metric are those of the run's first steps: a run that goes on from the checkpoint of another
        has them there."""
        steps = self.history.steps(name)
        return bool(steps) and steps[0] <= self.config.trainer.log_freq


Rule = Callable[[Seen], Advice | None]


def number(value: float) -> str:
    """As short as it can be read: 0.000012 -> `1.2e-05`, 1234.5 -> `1.23e+03`, 0.25 -> `0.25`."""
    return f"{value:.3g}"
