"""Rates: those that tutorials name for a model's size, and the course over the run."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.config.schema import OptimOptions
from posttrain.run.advice.advice import ADAPTERS_BEAR, Advice, Seen, number
from posttrain.wording import counted

UNUSUAL = 5  # times beyond the range before anything is said: what tutorials name is a rule of thumb
SMALL, TINY = 1e9, 1e8  # weights; below, much higher rates are usual than for what tutorials call small


@dataclass(frozen=True)
class Range:
    """Usual rates of models below so many weights. Source: tutorials of this field, unmeasured."""

    below: float
    low: float
    high: float


IMITATION = (Range(7e9, 1e-5, 5e-5), Range(70e9, 5e-6, 1e-5), Range(float("inf"), 1e-6, 5e-6))
REINFORCEMENT = (Range(float("inf"), 5e-7, 1e-6),)


def usual_range(num_weights: int, draws_answers: bool, uses_adapters: bool) -> Range:
    """What tutorials say; adapters bear ten times the rate."""
    ranges = REINFORCEMENT if draws_answers else IMITATION
    found = next(r for r in ranges if num_weights < r.below)
    times = ADAPTERS_BEAR if uses_adapters else 1
    return Range(found.below, found.low * times, found.high * times)


def tolerated(seen: Seen) -> tuple[float, float]:
    """The rates that nothing is said about."""
    usual, times = (
        usual_range(seen.num_weights, seen.draws_answers, seen.uses_adapters),
        (ADAPTERS_BEAR if seen.uses_adapters else 1),
    )
    if seen.num_weights < TINY:
        return 0.0, 2e-2 * times
    if seen.num_weights < SMALL:
        return usual.low / UNUSUAL, (1e-4 if seen.draws_answers else 1e-3) * times
    return usual.low / UNUSUAL, usual.high * UNUSUAL


def named(seen: Seen) -> str:
    """What tutorials say of this size."""
    usual = usual_range(seen.num_weights, seen.draws_answers, seen.uses_adapters)
    said = f"tutorials name {number(usual.low)} to {number(usual.high)} (unmeasured)"
    return (
        f"{said}, and models as small as this bear up to about {number(tolerated(seen)[1])}"
        if seen.num_weights < SMALL
        else said
    )


def unusual_rate(seen: Seen) -> Advice | None:
    """rate-unusual: far outside what is usual for this size."""
    low, high = tolerated(seen)
    lr = seen.config.optim.lr
    if 0.999 * low <= lr <= 1.001 * high:  # in floating point 5 x 1e-05 is less than 5e-05
        return None
    usual = usual_range(seen.num_weights, seen.draws_answers, seen.uses_adapters)
    what = f"{'reinforcement learning' if seen.draws_answers else 'fine-tuning'}{' of adapters' if seen.uses_adapters else ''}"
    size = f"{seen.num_weights / 1e9:.3g}B" if seen.num_weights >= TINY else f"{seen.num_weights / 1e6:.3g}M"
    found = (
        f"optim.lr={number(lr)} is far {'above' if lr > high else 'below'} what is usual for {what} of a model with {size} weights; "
        f"{named(seen)}"
    )
    nearest = high / UNUSUAL if lr > high else usual.low
    return Advice(
        "rate-unusual", f"{found}.", [f"Begin with optim.lr={number(nearest)}, unless you know that this one works."]
    )


def rate_after_imitation(seen: Seen) -> Advice | None:
    """rl-rate: reinforcement learning at a rate that is not below that of the SFT before it."""
    earlier, lr = seen.earlier, seen.config.optim.lr
    if not seen.draws_answers or earlier is None or not earlier.imitated or lr < earlier.lr:
        return None
    if earlier.uses_adapters != seen.uses_adapters:
        return None
    times = ADAPTERS_BEAR if seen.uses_adapters else 1
    wanted = min(earlier.lr / 10, 1e-6 * times if seen.num_weights >= TINY else earlier.lr / 10)
    found = (
        f"optim.lr={number(lr)} is not below the rate of the fine-tuning that this model came from ({number(earlier.lr)}, "
        f"{earlier.folder}). Reinforcement learning at such a rate often destroys what fine-tuning taught."
    )
    return Advice("rl-rate", found, [f"optim.lr={number(wanted)}, a tenth of it or less."])


def long_warmup(seen: Seen) -> Advice | None:
    """long-warmup: the rate climbs for half of the run or longer."""
    optim = seen.config.optim
    warmup = num_warmup_updates(optim, seen.num_updates)
    if seen.num_updates < 4 or warmup * 2 < seen.num_updates:
        return None
    reached = min(1.0, seen.num_updates / warmup)
    given = (
        f"optim.lr_warmup_steps={warmup}"
        if optim.lr_warmup_steps is not None
        else f"optim.lr_warmup_steps_ratio={optim.lr_warmup_steps_ratio}"
    )
    found = f"The rate climbs for {warmup:,} of the {seen.num_updates:,} updates ({given})"
    found += "." if reached == 1 else f" and never reaches more than {reached:.0%} of optim.lr={number(optim.lr)}."
    return Advice(
        "long-warmup",
        found,
        ["~optim.lr_warmup_steps optim.lr_warmup_steps_ratio=0.05, as is usual: 5 to 10% of the steps."],
    )


def num_warmup_updates(optim: OptimOptions, num_updates: int) -> int:
    if optim.lr_warmup_steps is not None:
        return optim.lr_warmup_steps
    return round((0.05 if optim.lr_warmup_steps_ratio is None else optim.lr_warmup_steps_ratio) * num_updates)


def few_updates(seen: Seen) -> Advice | None:
    """few-updates: the whole run moves the weights a handful of times, and nobody asked for that number."""
    data, trainer = seen.config.data, seen.config.trainer
    if seen.draws_answers or trainer.total_training_steps is not None or seen.num_updates >= 20:
        return None
    rows, epochs = seen.rows.get("rows_used", 0), max(trainer.total_epochs + 2, 5)
    smaller = max(1, rows * trainer.total_epochs // 100)
    remedies = [
        f"trainer.total_epochs={epochs}: {counted(seen.steps_per_epoch * epochs, 'step')}; validation (data.val_files) tells when it is enough."
    ]
    if smaller < data.train_batch_size:
        steps = -(-rows // smaller) * trainer.total_epochs
        remedies.insert(0, f"data.train_batch_size={smaller}: {counted(steps, 'step')}.")
    found = (
        f"{counted(rows, 'row')} in batches of {data.train_batch_size} make {counted(seen.num_updates, 'step')} in "
        f"{counted(trainer.total_epochs, 'epoch')}, too few to learn much in."
    )
    return Advice("few-updates", found, remedies)
