"""The loss of fine-tuning: one that does not fall, and why; one that is low from the start; validation that rises."""

from __future__ import annotations

import math
from statistics import median

from posttrain.run.advice.advice import ADAPTERS_BEAR, Advice, Seen, number
from posttrain.run.advice.history import ENOUGH, Change, mean, worst_rise
from posttrain.run.advice.rate import TINY, named, usual_range
from posttrain.wording import counted

LOSS, NORM, VALIDATION = "train/loss", "train/grad_norm", "val/val_loss"
KNOWN_ALREADY = 0.05  # nats a token
LEAST_WAY = 1e-4  # which the rates of a run add up to: how far AdamW can move a weight


def course(seen: Seen) -> Change | None:
    """How the loss of fine-tuning changed; None while there are too few steps to say."""
    losses = seen.history.of(LOSS)
    return None if seen.draws_answers or len(losses) < ENOUGH else Change.of(losses)


def stuck(seen: Seen) -> Change | None:
    """The course of a loss that did not fall, neither in training nor in validation."""
    change, validations = course(seen), seen.history.of(VALIDATION)
    if change is None or change.fell(0.01) or not seen.begins_with(LOSS):
        return None
    if len(validations) > 1 and min(validations[1:]) < 0.99 * validations[0]:
        return None
    return change


def told(change: Change, seen: Seen) -> str:
    """`The loss went from 1.2 to 1.3 (means of the first and the last 20 of 100 steps, +-0.1 each)`."""
    return (
        f"The loss went from {change.before:.4g} to {change.after:.4g} (means of the first and the last {change.num_after} of "
        f"{len(seen.history.of(LOSS))} steps; a single one varies by {number(change.noise)})"
    )


def rate_too_low(seen: Seen) -> Advice | None:
    """rate-too-low: the loss does not move, and the rates of all steps add up to next to nothing."""
    change = stuck(seen)
    if change is None or change.rose(0.05) or _no_gradient(seen):
        return None
    lr, way = seen.config.optim.lr, sum(seen.history.of("train/lr")) * seen.config.trainer.log_freq
    usual = usual_range(seen.num_weights, False, seen.uses_adapters)
    if way >= LEAST_WAY * (ADAPTERS_BEAR if seen.uses_adapters else 1) and lr >= usual.low:
        return None
    found = f"{told(change, seen)}: it does not fall. At optim.lr={number(lr)} all steps together move a weight by at most about {number(way)}."
    higher = max(10 * lr, 1e-3 if seen.num_weights < TINY else usual.low)
    remedies = [f"optim.lr={number(higher)}; {named(seen)}."]
    if seen.config.model.weights_dtype == "bfloat16":
        remedies.append(
            "model.weights_dtype=float32: bfloat16 keeps 8 bits of a weight and loses updates as small as these."
        )
    return Advice("rate-too-low", found, remedies)


def rate_too_high(seen: Seen) -> Advice | None:
    """rate-too-high: the loss rises, or cannot fall and the gradient grows or is not finite."""
    change = course(seen)
    if change is None:
        return None
    losses, optim = seen.history.of(LOSS), seen.config.optim
    rebound, low, high = worst_rise(losses, max(3, len(losses) // 20))
    steps, why = seen.history.steps(LOSS), []
    if seen.config.data.shuffle and rebound.rose(0.5):
        why.append(
            f"it rose from {rebound.before:.4g} (step {steps[low]:,}) to {rebound.after:.4g} (step {steps[high]:,})"
        )
    norms = seen.history.of(NORM)
    if stuck(seen) is not None and norms:
        third = max(1, len(norms) // 3)
        early, late = median(norms[:third]), median(norms[-third:])
        if late > 3 * early > 0:
            why.append(f"the norm of the gradient grew from {number(early)} to {number(late)}")
        skipped = seen.history.of("train/skipped_steps")
        if skipped and skipped[-1]:
            why.append(f"{skipped[-1]:.0f} steps were not finite and were skipped")
    if not why:
        return None
    clipped = sum(norm > optim.clip_grad for norm in norms) / len(norms) if optim.clip_grad and norms else 0.0
    if clipped > 0.9:
        why.append(f"{clipped:.0%} of the gradients were clipped")
    return Advice(
        "rate-too-high",
        f"{told(change, seen)}; {', '.join(why)}: signs that optim.lr={number(optim.lr)} is too high.",
        [
            f"optim.lr={number(optim.lr / 10)}",
            "A longer warm-up, optim.lr_warmup_steps_ratio=0.1, helps where only the beginning was rough.",
        ],
    )


def batch_too_small(seen: Seen) -> Advice | None:
    """batch-too-small: what the loss changed by is lost in the noise of few rows a step, and the rate is as usual."""
    change = stuck(seen)
    if change is None or rate_too_low(seen) or rate_too_high(seen) or _no_gradient(seen):
        return None
    rows = seen.config.data.train_batch_size
    if rows > 8 or change.noise < 0.1 * abs(change.before):
        return None
    return Advice(
        "batch-too-small",
        f"{told(change, seen)}: with {counted(rows, 'row')} a step, one step's noise hides any fall.",
        [
            f"data.train_batch_size={max(32, 4 * rows)}: four times the rows halve the noise. Micro-batches keep the memory as it is.",
            "More steps (trainer.total_epochs), or a validation (data.val_files), whose rows are always the same.",
        ],
    )


def random_start(seen: Seen) -> Advice | None:
    """random-weights: the loss begins where a model begins that knows nothing."""
    losses = seen.history.of(LOSS)
    known, model = math.log(seen.vocabulary), seen.config.model
    if seen.draws_answers or len(losses) < 3 or mean(losses[:3]) < 0.85 * known:
        return None
    if stuck(seen) is None and (seen.num_weights < 5e7 or model.random_weights):
        return None
    begins = "model.random_weights=true: " if model.random_weights else ""
    remedies = (
        [
            "~model.random_weights and model.path=a trained model; fine-tuning data is far too little to learn a language from."
        ]
        if model.random_weights
        else [
            f"See what {model.path} answers: posttrain generate --model {model.path} --prompts FILE. Words without sense: its weights "
            "are not trained, or not those of this tokenizer (model.tokenizer_path) and chat template.",
        ]
    )
    return Advice(
        "random-weights",
        f"{begins}the loss begins at {mean(losses[:3]):.3g}; a model that knows nothing has ln({seen.vocabulary:,}) = {known:.3g}.",
        remedies,
    )


def no_gradient(seen: Seen) -> Advice | None:
    """nothing-trained: no gradient reaches any weight."""
    if not _no_gradient(seen):
        return None
    return Advice(
        "nothing-trained",
        f"The norm of the gradient was 0 in each of {len(seen.history.of(NORM))} steps, with {seen.num_trained:,} weights of "
        f"{seen.num_weights:,} trained: nothing moves.",
        [
            "See that rows have trained tokens: posttrain data show --files FILE; a message's loss_mask or weight of 0 leaves it out.",
            "model.target_modules=all-linear, where adapters stand beside layers that this model does not use.",
        ],
    )


def _no_gradient(seen: Seen) -> bool:
    norms = seen.history.of(NORM)
    return len(norms) >= 5 and not any(norms)


def known_rows(seen: Seen) -> Advice | None:
    """seen-before: the loss is next to nothing before anything was learnt."""
    first, what = list(seen.history.of(VALIDATION)[:1]), "validation before training"
    if not first or seen.history.steps(VALIDATION)[0]:
        losses = seen.history.of(LOSS)
        first, what = (
            ([mean(losses[:3])], "the first 3 steps") if len(losses) >= 3 and seen.begins_with(LOSS) else ([], "")
        )
    if seen.draws_answers or not first or first[0] >= KNOWN_ALREADY:
        return None
    remedies = [
        f"Rows that occur twice, or in validation too: posttrain data check {seen.config.trainer.default_local_dir}/config.yaml"
    ]
    if seen.earlier is not None:
        remedies.append(f"The model comes from {seen.earlier.folder}: it may have learnt these rows there.")
    return Advice(
        "seen-before",
        f"The loss in {what} is {first[0]:.2g} nats a token: the model knows these rows already.",
        remedies,
    )


def overfitting(seen: Seen) -> Advice | None:
    """overfitting: validation rises while training falls."""
    values, steps = seen.history.of(VALIDATION), seen.history.steps(VALIDATION)
    losses = seen.history.of(LOSS)
    if seen.draws_answers or len(values) < 3 or len(losses) < 6:
        return None
    best = min(range(len(values)), key=values.__getitem__)
    since, rise = len(values) - 1 - best, values[-1] / values[best] - 1
    if not (since and rise > (0.02 if since > 1 else 0.1)) or values[-1] - values[best] < 0.01:
        return None
    until = seen.history.up_to(LOSS, steps[best])
    num = max(3, min(len(until), len(losses)) // 5)
    then, now = (mean(until[-num:]) if until else losses[0]), mean(losses[-num:])
    if now >= then:  # both rise: that is another illness
        return None
    found = (
        f"val_loss rose from {values[best]:.4g} (step {steps[best]:,}, the best) to {values[-1]:.4g} (step {steps[-1]:,}) while the training "
        f"loss fell from {then:.4g} to {now:.4g}: the model learns its {seen.rows.get('rows_used', 0):,} rows by heart."
    )
    return Advice("overfitting", found, _against_overfitting(seen, steps[best]))


def _against_overfitting(seen: Seen, best: int) -> list[str]:
    model, optim, trainer = seen.config.model, seen.config.optim, seen.config.trainer
    epochs = max(1, math.ceil(best / seen.steps_per_epoch))
    remedies = (
        [f"Use checkpoint-best, of step {best:,}."]
        if best
        else ["No step was better than the model before training: use that."]
    )
    if best and epochs < seen.num_steps / seen.steps_per_epoch:
        remedies.append(f"trainer.total_epochs={epochs}: fewer passes over the rows.")
    elif best:
        remedies.append(f"trainer.total_training_steps={best}")
    if trainer.early_stopping_patience is None:
        remedies.append("trainer.early_stopping_patience=2 stops by itself.")
    if optim.weight_decay < 0.1:
        remedies.append(f"optim.weight_decay=0.1 (it is {number(optim.weight_decay)}).")
    if not model.dropout:
        remedies.append("model.dropout=0.1")
    if not seen.uses_adapters:
        remedies.append(f"model.lora_rank=8 optim.lr={number(optim.lr * ADAPTERS_BEAR)}: adapters learn less by heart.")
    elif model.lora_rank > 8:
        remedies.append(f"model.lora_rank=8 (it is {model.lora_rank}).")
    return [*remedies, "More rows: nothing else helps as much."]
