"""Reinforcement learning: rewards that fall below where the run began, groups that teach nothing, answers that are cut."""

from __future__ import annotations

from posttrain.run.advice.advice import Advice, Seen, number
from posttrain.run.advice.history import ENOUGH, Change, mean
from posttrain.run.advice.rate import rate_after_imitation, unusual_rate

LATEST = 10  # steps that a state is judged by


def _latest(seen: Seen, name: str) -> float | None:
    """The mean of the last steps; None while there are too few."""
    values = seen.history.of(f"rollout/{name}")
    return mean(values[-LATEST:]) if len(values) >= LATEST else None


def worse_than_before(seen: Seen) -> Advice | None:
    """rl-below-start: answers are worse than those that the run began with."""
    said = _accuracy_fell(seen) or _reward_fell(seen)
    if said is None:
        return None
    remedies = []
    for rule in (rate_after_imitation, unusual_rate):
        remedies += [f"{found.found} {found.remedies[0]}"] if (found := rule(seen)) else []
    if not remedies:
        remedies.append(f"optim.lr={number(seen.config.optim.lr / 10)} (it was {number(seen.config.optim.lr)}).")
    entropy = seen.history.of("rollout/entropy")
    if len(entropy) >= 5 and mean(entropy[-3:]) < 0.5 * entropy[0]:
        remedies.append(
            f"Diversity was lost: entropy {number(entropy[0])} -> {number(mean(entropy[-3:]))} nats. rollout.temperature=1 and "
            "algorithm.clip_ratio_high=0.28 keep more of it."
        )
    if not seen.config.algorithm.kl_coef:
        remedies.append("algorithm.kl_coef=0.01 holds the model near the one that the run began with.")
    remedies.append(
        "See what it answers: samples/ in the run folder. checkpoint-best holds the best validation, if there was one."
    )
    return Advice("rl-below-start", said, remedies)


def _accuracy_fell(seen: Seen) -> str | None:
    names = ("val/val_accuracy", "val/val_accuracy_low", "val/val_accuracy_high")
    shares, lows, highs = (seen.history.of(name) for name in names)
    steps = seen.history.steps(names[0])
    if not seen.draws_answers or len(shares) < 2 or steps[0]:
        return None
    fall = shares[0] - shares[-1]
    if fall <= ((shares[0] - lows[0]) ** 2 + (highs[-1] - shares[-1]) ** 2) ** 0.5:  # the 95% interval of a difference
        return None
    return f"val_accuracy fell from {shares[0]:.1%} before training to {shares[-1]:.1%} at step {steps[-1]:,}."


def _reward_fell(seen: Seen) -> str | None:
    rewards = seen.history.of("rollout/reward_mean")
    if len(rewards) < ENOUGH or not seen.begins_with("rollout/reward_mean"):
        return None
    change = Change.of(rewards, first=3)
    if not change.fell(0.1):
        return None
    return (
        f"reward_mean fell from {change.before:.3g} to {change.after:.3g} (means of the first {change.num_before} and the last "
        f"{change.num_after} of {len(rewards)} steps; a single one varies by {number(change.noise)})."
    )


def other_model(seen: Seen) -> Advice | None:
    """other-checkpoint: the run begins far below what the model's own run had measured."""
    accuracy, steps = seen.history.of("val/val_accuracy"), seen.history.steps("val/val_accuracy")
    random = seen.config.model.random_weights
    if seen.draws_answers and random:
        found = "model.random_weights=true: the model that answers knows nothing."
        return Advice(
            "other-checkpoint", found, ["~model.random_weights, with model.path=the run folder of a fine-tuning."]
        )
    if seen.earlier is None or seen.earlier.accuracy is None or not accuracy or steps[0]:
        return None
    if tuple(seen.config.data.val_files) != seen.earlier.val_files:
        return None
    if seen.config.rollout.val_temperature != seen.earlier.val_temperature:
        return None
    then, low, _ = seen.earlier.accuracy
    high = seen.history.of("val/val_accuracy_high")[0]
    if high >= low:
        return None
    return Advice(
        "other-checkpoint",
        f"Before training val_accuracy is {accuracy[0]:.1%} (at most {high:.1%}); the run that the model comes from, {seen.earlier.folder}, "
        f"had measured {then:.1%}.",
        [
            "See that the same is asked: trainer.num_val_generations, the chat template, reward.name and rollout.max_new_tokens of both config.yaml.",
            f"See that model.path={seen.config.model.path} is the model that you mean: a run folder means its best validation, "
            "checkpoint-final its last step.",
        ],
    )


def no_signal(seen: Seen) -> Advice | None:
    """no-signal: answers to one prompt all earn the same, so that nothing is learnt."""
    share, reward = _latest(seen, "no_signal_share"), _latest(seen, "reward_mean")
    if share is None or reward is None or share < 0.9:
        return None
    entropy, std = _latest(seen, "entropy"), _latest(seen, "reward_std") or 0.0
    n = seen.config.rollout.n or 8
    found = f"In the last {LATEST} steps {share:.0%} of the groups earned one reward in all {n} answers (reward_mean {reward:.3g})"
    if entropy is not None and entropy < 0.05:
        return Advice(
            "no-signal",
            f"{found}, and entropy is down to {entropy:.2g} nats: the model writes the same answer again and again.",
            [
                f"rollout.temperature=1 (it is {seen.config.rollout.temperature}), algorithm.clip_ratio_high=0.28.",
                f"optim.lr={number(seen.config.optim.lr / 3)}, from a checkpoint before this.",
                "Stop here if the accuracy is what you want: nothing more is learnt.",
            ],
        )
    if reward - std <= 0.05 and reward <= 0.1:
        if worse_than_before(seen):  # the model could, and lost it: neither too hard nor unrecognised
            return None
        return Advice(
            "no-signal",
            f"{found}: too hard, or right answers are not recognised.",
            [
                "Read samples/ in the run folder. Right answers in another form: reward.name=gsm8k_flexible, or fine-tune on the form first.",
                f"rollout.n={4 * n}: more answers, more chances of a right one; easier prompts first.",
            ],
        )
    return Advice(
        "no-signal",
        f"{found}: the prompts are too easy or too hard.",
        [
            "algorithm.filter_groups=true algorithm.max_num_gen_batches=3 asks others in their place.",
            f"Harder prompts, or rollout.n={2 * n}.",
        ],
    )


def truncated(seen: Seen) -> Advice | None:
    """truncated: many answers are cut before they end."""
    share, longest = _latest(seen, "truncated_share"), seen.config.rollout.max_new_tokens
    if share is None or share < 0.3:
        return None
    return Advice(
        "truncated",
        f"In the last {LATEST} steps {share:.0%} of the answers were cut at rollout.max_new_tokens={longest}: their end was never judged.",
        [
            f"rollout.max_new_tokens={2 * longest}",
            f"algorithm.overlong_buffer_tokens={max(1, longest // 4)} teaches to end in time; algorithm.mask_truncated=true learns nothing from them.",
        ],
    )


def far_from_reference(seen: Seen) -> Advice | None:
    """kl-high: the policy runs away from the model that it began as."""
    kl = _latest(seen, "kl")
    if kl is None or kl < 0.5:
        return None
    coef, lr = seen.config.algorithm.kl_coef, seen.config.optim.lr
    return Advice(
        "kl-high",
        f"kl is {kl:.2g} nats a token in the last {LATEST} steps; below 0.1 is usual.",
        [
            f"algorithm.kl_coef={number(10 * coef)} (it is {number(coef)}).",
            f"optim.lr={number(lr / 3)} (it is {number(lr)}).",
        ],
    )


def other_probabilities(seen: Seen) -> Advice | None:
    """logprob-gap: the engine that answers is not the model that is trained."""
    gap = _latest(seen, "logprob_gap")
    if gap is None or gap < 0.05:
        return None
    return Advice(
        "logprob-gap",
        f"logprob_gap is {gap:.2g}: the engine that answers (rollout.name={seen.config.rollout.name}) gives other probabilities than the "
        "trainer; below 0.02 is usual in bfloat16.",
        [
            "rollout.name=transformers answers with the trainer's own weights: if the gap goes, the other engine has old or other weights.",
            "model.dtype=float32 shows whether it is rounding.",
        ],
    )


def unknown_rewards(seen: Seen) -> Advice | None:
    """unknown-rewards: many answers cannot be judged."""
    unknown = _latest(seen, "rewards_unknown")
    answers = seen.config.data.train_batch_size * (seen.config.rollout.n or 8)
    if unknown is None or unknown < 0.2 * answers:
        return None
    return Advice(
        "unknown-rewards",
        f"In the last {LATEST} steps {unknown:.0f} of about {answers} answers a step could not be judged; nothing is learnt from them.",
        [
            f"reward.timeout_seconds={number(3 * seen.config.reward.timeout_seconds)} where time was short; samples/ in the run folder has "
            "each with its reason.",
            "A reward that raises an error counts as unknown: mend it.",
        ],
    )
