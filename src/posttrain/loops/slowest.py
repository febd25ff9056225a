"""Which process the others wait for, by the time that each spends on its own between the collectives of a step."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.run.progress import Display

# said once, when the same rank has been the slowest in so many steps running, by at least this share of each
STEPS_BEFORE_SAID = 20
SHARE_OF_A_STEP = 0.1


class Slowest:
    """The slowest rank of each step, and a line on the console where one stays the slowest."""

    def __init__(self, display: Display):
        self.display = display
        self._rank, self._lags, self._said = -1, [0.0], False

    def of(self, own_seconds: Sequence[float], step_seconds: float) -> dict[str, float | int]:
        """Metrics of a step from the seconds of each rank; none where there is one rank."""
        if len(own_seconds) == 1:
            return {}
        rank = max(range(len(own_seconds)), key=own_seconds.__getitem__)
        lag = own_seconds[rank] - sorted(own_seconds)[(len(own_seconds) - 1) // 2]
        self._watch(rank, lag, step_seconds)
        return {"slowest_rank": rank, "slowest_rank_lag_seconds": lag}

    def _watch(self, rank: int, lag: float, step_seconds: float) -> None:
        if rank != self._rank or lag < SHARE_OF_A_STEP * step_seconds:
            self._rank, self._lags = rank, []
        self._lags.append(lag)
        if len(self._lags) > STEPS_BEFORE_SAID and not self._said:
            self._said = True
            mean = sum(self._lags[1:]) / STEPS_BEFORE_SAID
            self.display.say(
                f"rank {rank} holds up the others: over the last {STEPS_BEFORE_SAID} steps it spent {mean:.2g} s more a step "
                f"than a typical rank on rows, the optimizer and metrics; a step takes {step_seconds:.2g} s. "
                "See slowest_rank in docs/metrics.md."
            )
