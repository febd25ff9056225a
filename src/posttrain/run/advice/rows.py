"""Rows: how many can be used, and what of them is trained."""

from __future__ import annotations

from posttrain.run.advice.advice import Advice, Seen

MANY_DROPPED = 0.25
FEW_TRAINED = 0.01


def dropped_rows(seen: Seen) -> Advice | None:
    """bad-rows: a large share of the rows is left out."""
    read, dropped = seen.rows.get("rows_read", 0), sum(seen.rows_dropped.values())
    if read < 8 or dropped < MANY_DROPPED * read:
        return None
    reasons = "; ".join(f"{count:,}: {reason}" for reason, count in seen.rows_dropped.items())
    found = f"{dropped:,} of {read:,} rows ({dropped / read:.0%}) are left out ({reasons})."
    remedies = [f"See each with its line: posttrain data check {seen.config.trainer.default_local_dir}/config.yaml"]
    if any("long" in reason for reason in seen.rows_dropped):
        remedies.append(
            f"Keep long ones: data.max_length above {seen.config.data.max_length}, or data.truncation=right."
        )
    return Advice("bad-rows", found, remedies)


def few_trained_tokens(seen: Seen) -> Advice | None:
    """few-trained-tokens: hardly a token counts in the loss."""
    tokens, trained = seen.rows.get("num_tokens", 0), seen.rows.get("num_trained_tokens", 0)
    if seen.draws_answers or tokens < 1000 or trained >= FEW_TRAINED * tokens:
        return None
    return Advice(
        "few-trained-tokens",
        f"{trained:,} of {tokens:,} tokens ({trained / tokens:.2%}) are trained; the rest is context.",
        [
            f"Look at which: posttrain data show {seen.config.trainer.default_local_dir}/config.yaml",
            "data.train_on=all and data.train_roles decide whose turns are trained; a row's own loss_mask comes first.",
        ],
    )
