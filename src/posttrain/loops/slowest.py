"""Which process the others wait for, by the time that each spends on its own between the collectives of a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from posttrain.run.progress import Display

# said once, when the same rank has been the slowest by at least this share of a step in most of so many steps: one step in
# ten may be an exception, since any machine stalls now and then
STEPS_SEEN = 30
STEPS_SLOW = 27
SHARE_OF_A_STEP = 0.1


class Slowest:
    """The slowest rank of each step, and a line on the console where one stays the slowest."""

    def __init__(self, display: Display):
        self.display = display
        # of each step: the slowest rank, its lag, the seconds of the step
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=STEPS_SEEN)
        self._said = False

    def of(self, own_seconds: Sequence[float], step_seconds: float) -> dict[str, float | int]:
        """Metrics of a step from the seconds of each rank; none where there is one rank."""
        if len(own_seconds) == 1:
            return {}
        rank = max(range(len(own_seconds)), key=own_seconds.__getitem__)
        lag = own_seconds[rank] - sorted(own_seconds)[(len(own_seconds) - 1) // 2]
        self._watch(rank, lag, step_seconds)
        return {"slowest_rank": rank, "slowest_rank_lag_seconds": lag}

    def _watch(self, rank: int, lag: float, step_seconds: float) -> None:
        self._seen.append((rank, lag, step_seconds))
        lags = [lag for of, lag, seconds in self._seen if of == rank and lag >= SHARE_OF_A_STEP * seconds]
        if len(lags) >= STEPS_SLOW and len(self._seen) == STEPS_SEEN and not self._said:
            self._said = True
            typical = median(seconds for _, _, seconds in self._seen)
            self.display.say(
                f"rank {rank} holds up the others: in {len(lags)} of the last {STEPS_SEEN} steps it spent about {median(lags):.2g} s more "
                f"than a typical rank on rows, the optimizer and metrics; a step takes {typical:.2g} s. "
                "See slowest_rank in docs/metrics.md."
            )
