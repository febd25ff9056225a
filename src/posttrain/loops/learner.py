"""Answers with rewards -> updates of the weights."""

# N answers, T tokens of a sample

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from posttrain.config.schema import AlgorithmOptions, Config
from posttrain.data.images.loader import ImageLoader
from posttrain.engine.engine import Engine, LossReport
from posttrain.errors import RunError
from posttrain.loops.experience import Experience, Update, plan_updates, samples_of
from posttrain.loops.policy_batches import Limits, micro_batches, with_logprobs
from posttrain.loops.prompts import parts_of
from posttrain.loops.step_log import StepWork
from posttrain.loops.training_data import trains_vision
from posttrain.losses.advantage import advantages, groups
from posttrain.losses.divergence import DIVERGENCES
from posttrain.losses.grpo import PolicyGradient
from posttrain.records import MicroBatch, Sample

OLD, REFERENCE = "old_logprobs", "reference_logprobs"


class Learner:
    """An engine that learns from its own answers. Every process must call every method, with the same answers."""

    def __init__(self, config: Config, engine: Engine, reference: Engine | None, loader: ImageLoader | None = None):
        self.engine, self.reference = engine, reference
        self.algorithm, self.seed = config.algorithm, config.trainer.seed
        self.mini_batch_size = config.algorithm.ppo_mini_batch_size or config.data.train_batch_size
        self.constant_length = config.rollout.max_new_tokens
        data = config.data
        max_tokens = data.max_tokens_per_gpu
        if max_tokens is None and data.micro_batch_size_per_gpu is None:
            max_tokens = engine.world.device.default_max_tokens
        sharing = config.engine.ulysses_sequence_parallel_size
        max_rows = data.micro_batch_size_per_gpu if data.packing else 1
        share = data.packing and engine.world.device.shares_prompts
        self.limits = Limits(max_rows, max_tokens and max_tokens * sharing, share, loader)
        self.trains_vision = loader is not None and trains_vision(config.model)
        gradient = policy_gradient(config.algorithm)
        self.loss = gradient.loss()
        self.loss_of_all = bool(gradient.kl_coef or gradient.entropy_coef)  # answers without advantage too

    def learn(self, found: Experience, step: int, num_prompts: int) -> StepWork:
        """Make the updates of a step of so many prompts, those that were left out included."""
        done, every = [], []
        for batch, update in self._batches(found, step, num_prompts):
            every += batch
            if update.numbers:
                loss = self.engine.forward_backward(batch, self.loss, update.total_weight)
                done.append((loss, self.engine.optim_step()))
            else:  # nothing to learn: without a gradient the weights must not move by momentum alone
                self.engine.skip_step()
        return StepWork(done, every, 0.0, {**found.metrics(), "kl": None})

    def gather_gradients(self, found: Experience, step: int, num_prompts: int) -> LossReport:
        """The gradients of the step's first update, without the update."""
        batch, update = self._batches(found, step, num_prompts)[0]
        if not update.numbers:
            raise RunError("There is no gradient: no answer of the first update earned another reward than its group.")
        return self.engine.forward_backward(batch, self.loss, update.total_weight)

    def _batches(self, found: Experience, step: int, num_prompts: int) -> list[tuple[list[MicroBatch], Update]]:
        """This process's micro-batches of each update."""
        if self.algorithm.filter_groups:
            found = found.taken(found.signal_N).first_groups(num_prompts)
        samples = {
            i: samples_of(i, completion, tuple(image.source for image in problem.images))
            for i, (problem, completion) in enumerate(zip(found.problems, found.completions, strict=True))
        }
        if self.reference:
            samples = self._scored(samples, REFERENCE)
        if self.algorithm.kl_coef and self.algorithm.kl_in == "reward":
            samples = self._scored(samples, OLD)
            found = replace(found, rewards_N=found.rewards_N - self.algorithm.kl_coef * self._divergences(samples))
        updates, gains_N = self._plan(found, step, num_prompts)
        # the first update is made by the policy that answered, and need not be told what it was
        later = updates if self.algorithm.ppo_epochs > 1 else updates[1:]
        moved = dict.fromkeys(i for update in later for i in update.numbers)
        missing = {i: samples[i] for i in moved if not all(OLD in sample.signals for sample in samples[i])}
        samples |= self._scored(missing, OLD) if missing else {}
        batches = [self._packed(update, _weighted(update, samples, gains_N)) for update in updates]
        if self.limits.loader:
            self.limits.loader.expect(micro_batch for batch in batches for micro_batch in batch)
        return list(zip(batches, updates, strict=True))

    def _packed(self, update: Update, samples: Sequence[Sample]) -> list[MicroBatch]:
        moves = self.trains_vision and bool(update.numbers)
        return micro_batches(samples, self.limits, self.engine.world, moves)

    def _plan(self, found: Experience, step: int, num_prompts: int) -> tuple[list[Update], np.ndarray]:
        algorithm = self.algorithm
        gains_N = advantages(found.rewards_N, found.prompts_N, algorithm.adv_estimator)
        usable_N = ~np.isnan(gains_N)
        if algorithm.mask_truncated:
            usable_N &= np.array([completion.stopped for completion in found.completions], dtype=bool)
        updates = []
        num_groups = len(groups(found.prompts_N))
        for epoch in range(algorithm.ppo_epochs):
            stream = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 32) + step]))
            order = stream.permutation(num_groups) if epoch else np.arange(num_groups)
            parts = parts_of(num_prompts, self.mini_batch_size)
            planned = plan_updates(found, usable_N, parts, algorithm.loss_agg_mode, self.constant_length, order)
            updates += [self._that_move(update, gains_N) for update in planned]
        return updates, gains_N

    def _that_move(self, update: Update, gains_N: np.ndarray) -> Update:
        """Without the answers whose gradient is zero: they count in the total weight, and need no forward pass."""
        if self.loss_of_all:
            return update
        moving = gains_N[update.numbers] != 0
        numbers = [i for i, moves in zip(update.numbers, moving, strict=True) if moves]
        return replace(update, numbers=numbers, weights=update.weights[moving])

    def _scored(self, samples: dict[int, list[Sample]], name: str) -> dict[int, list[Sample]]:
        """The samples with log-probabilities of the policy as it is now, or of the reference."""
        flat = [sample for pieces in samples.values() for sample in pieces]
        if name == REFERENCE:
            assert self.reference is not None
            scored = with_logprobs(flat, name, self.reference, self.limits, adapters=False)
        else:
            scored = with_logprobs(flat, name, self.engine, self.limits)
        filled: dict[int, list[Sample]] = {i: [] for i in samples}
        for sample in scored:
            filled[sample.row].append(sample)
        return filled

    def _divergences(self, samples: dict[int, list[Sample]]) -> np.ndarray:
        """The divergence of each answer (N) from the reference, summed over its trained tokens."""

        def of(sample: Sample) -> float:
            trained_T = sample.weights_T > 0
            logprobs, reference = (torch.from_numpy(sample.signals[name][trained_T]) for name in (OLD, REFERENCE))
            return float(DIVERGENCES[self.algorithm.kl_type](logprobs, reference).sum())

        return np.array([sum(map(of, pieces)) for pieces in samples.values()])


def policy_gradient(algorithm: AlgorithmOptions) -> PolicyGradient:
    """The loss as the options want it."""
    return PolicyGradient(
        ratio=algorithm.policy_loss,
        clip_low=algorithm.clip_ratio_low,
        clip_high=algorithm.clip_ratio_high,
        dual_clip=algorithm.dual_clip,
        kl_coef=algorithm.kl_coef if algorithm.kl_in == "loss" else 0.0,
        kl_type=algorithm.kl_type,
        entropy_coef=algorithm.entropy_coef,
        rollout_cap=algorithm.rollout_is_cap,
        has_reference=bool(algorithm.kl_coef),
    )


def _weighted(update: Update, samples: dict[int, list[Sample]], gains_N: np.ndarray) -> Sequence[Sample]:
    """The update's samples, with their advantages and the weights of their tokens."""
    return [
        replace(
            sample,
            weights_T=(sample.weights_T * weight).astype(np.float32),
            signals={**sample.signals, "advantages": np.full(len(sample), gains_N[i], dtype=np.float32)},
        )
        for i, weight in zip(update.numbers, update.weights, strict=True)
        for sample in samples[i]
    ]
