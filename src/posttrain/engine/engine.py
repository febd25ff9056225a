"""The engine: it alone owns gradients, accumulation, the count of tokens of a step, and the guard around it.

Five verbs: `forward`, `forward_backward`, `optim_step`, `state`, `named_weights`. Any layout (processes, micro-batches,
packing) gives the same numbers: a loss is a sum over the trained tokens of a whole step, divided once by their weight.
"""

# T tokens of a packed row, S tokens among them that count in the loss

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posttrain.distributed.sharding import at_rest, sum_copies, whole
from posttrain.distributed.world import World, seed_all
from posttrain.engine.optimizer import AdamW, StepReport
from posttrain.losses.loss import Loss, Scored
from posttrain.models.attention import Documents
from posttrain.models.four_bit import four_bit_layers, unpacked
from posttrain.models.lora import Adapters, base_weights, is_adapter_weight, merged_weights, without_adapters
from posttrain.models.policy import Policy
from posttrain.models.vision import Images
from posttrain.records import MicroBatch


@dataclass(frozen=True)
class LossReport:
    """The loss of one step over all processes, as a tensor that nobody has waited for, and what it was taken over.

    `measured` are the loss's own measures, summed over all tokens.
    """

    loss: Tensor
    total_weight: Tensor
    measured: dict[str, Tensor] = field(default_factory=dict)


class Engine:
    """A policy that learns. Every process must call every verb, with as many micro-batches as any other."""

    def __init__(
        self,
        policy: Policy,
        world: World,
        make_optimizer: Callable[[Policy, World], AdamW],
        seed: int = 0,
        adapters: Adapters | None = None,
    ):
        self.policy, self.world, self.seed, self.adapters = policy, world, seed, adapters
        self.optimizer = make_optimizer(policy, world)
        self.step = 0  # optimizer steps taken or skipped

    def forward(self, micro_batches: Sequence[MicroBatch], adapters: bool = True) -> list[np.ndarray]:
        """Log-probabilities (float32, T) of each micro-batch's labels; 0 where a label has no weight. No gradients.

        Without `adapters` they are those of the model that the adapters began from.
        """
        self.policy.eval()
        with torch.no_grad(), nullcontext() if adapters else without_adapters(self.policy.lm):
            out = []
            for index, micro_batch in enumerate(micro_batches):
                self._begin(index, micro_batches)
                out.append(self._logprobs(micro_batch)[0].cpu().numpy())
        at_rest(self.policy)
        return out

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: Loss, total_weight: float | None = None
    ) -> LossReport:
        """Add the gradients of one step's loss, of which these micro-batches are this process's part.

        The loss is divided by `total_weight`, the same on all processes, or else by the sum of the weights over all.
        """
        self.world.watchdog.beat("forward and backward")
        device = self.world.device.torch_device
        if total_weight is None:
            local_weight = sum(float(m.weights_T.sum(dtype=np.float64)) for m in micro_batches)
            total = self.world.total(local_weight).float()
        else:
            total = torch.tensor(total_weight, dtype=torch.float32, device=device)
        sums: dict[str, Tensor] = {"loss": torch.zeros((), device=device)}
        self.policy.train()
        for index, micro_batch in enumerate(micro_batches):
            self._begin(index, micro_batches)
            seed_all(self.seed, self.step, index, self.world.rank)  # dropout is a function of where it falls
            scored = self._scored(micro_batch, loss, total)
            value = loss.value(scored)
            sum_copies(self.policy, self.world, now=index == len(micro_batches) - 1)
            value.backward()
            with torch.no_grad():
                found = {"loss": value, **(loss.measures(scored) if loss.measures else {})}
                sums = {name: sums.get(name, 0) + x.detach() for name, x in found.items()}
        summed = self.world.sum_over_readers(torch.stack(list(sums.values())))
        measured = dict(zip(sums, summed.unbind(), strict=True))
        return LossReport(measured.pop("loss"), total, measured)

    def optim_step(self) -> StepReport:
        """Clip, move the weights, clear the gradients; a gradient that is not finite moves nothing."""
        self.world.watchdog.beat("optimizer")
        report = self.optimizer.step(self.step)
        self.step += 1
        return report

    def num_weights(self) -> tuple[int, int]:
        """Those that are trained, and all."""
        packed = four_bit_layers(self.policy.lm)
        every = {name: p for name, p in self.policy.lm.named_parameters() if name not in packed}
        trained = sum(p.numel() for p in every.values() if p.requires_grad)
        in_4bit = sum(layer.in_features * layer.out_features for layer in packed.values())
        return trained, sum(p.numel() for p in every.values()) + in_4bit

    def skip_step(self) -> None:
        """Count a step in which there was nothing to learn."""
        self.step += 1

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Trained weights and optimizer state by name, sharing memory with the engine: what checkpoints write and fill.

        Frozen weights are left out; `adapters` tells by a fingerprint which they are.
        """
        lm = self.policy.lm
        trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
        buffers = {name for name, _ in lm.named_buffers()}
        weights = {name: weight for name, weight in lm.state_dict().items() if name in trained | buffers}
        return {"model": weights, "optimizer": self.optimizer.state()}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The plain model's whole weights, adapters merged in, one at a time, on every process."""
        weights = self._whole_weights()
        return merged_weights(self.policy.lm, weights) if self.adapters else weights

    def named_base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The same without the adapters."""
        return base_weights(self._whole_weights())

    def named_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """The whole adapter weights by their own names, one at a time, on every process."""
        for name, weight in self.policy.lm.state_dict().items():
            if is_adapter_weight(name):
                yield name, whole(weight, self.world.device.torch_device)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The whole gradients gathered so far, one at a time, on every process."""
        for name, parameter in self.policy.lm.named_parameters():
            if parameter.grad is not None:
                yield name, whole(parameter.grad, self.world.device.torch_device)

    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        lm, device = self.policy.lm, self.world.device.torch_device
        return unpacked(lm, ((name, whole(weight, device)) for name, weight in lm.state_dict().items()))

    def _begin(self, index: int, micro_batches: Sequence[MicroBatch]) -> None:
        self.world.watchdog.beat(part=f"micro-batch {index + 1} of {len(micro_batches)}")

    def _scored(self, micro_batch: MicroBatch, loss: Loss, total_weight: Tensor) -> Scored:
        device = self.world.device.torch_device
        weights_T = torch.from_numpy(micro_batch.weights_T).to(device, non_blocking=True)
        signals = {name: torch.from_numpy(x).to(device, non_blocking=True) for name, x in micro_batch.signals.items()}
        slope_T = loss.slope(weights_T, total_weight) if loss.slope else None
        logprobs_T, entropies_T = self._logprobs(micro_batch, slope_T, loss.wants_entropies)
        return Scored(logprobs_T, weights_T, total_weight, entropies_T, micro_batch.parts, signals)

    def _logprobs(
        self, micro_batch: MicroBatch, slope_T: Tensor | None = None, entropies: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (T) of the labels with weight, 0 elsewhere: only those tokens meet the vocabulary. Entropies likewise.

        Processes that share a row each compute a part of it, and all get the whole: a loss may need whole sequences.
        """
        device, sequence = self.world.device.torch_device, self.world.sequence
        row = sequence.filled(micro_batch) if sequence else micro_batch
        part = sequence.cut(row) if sequence else row
        counting_S = np.flatnonzero(part.weights_T)
        if not len(counting_S):
            counting_S = np.zeros(1, dtype=np.int64)  # a part without any takes part with one token of weight 0
        labels_T, chosen_S = (
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (np.maximum(part.labels_T, 0), counting_S)
        )
        ids_T, positions_T, images = self._read(row, part, device)
        seen_whole = images.seen_whole if images else ()
        documents = Documents.of(part.lengths_N, device, sequence, part.branches_N, seen_whole)
        if slope_T is not None and sequence:
            slope_T = sequence.own_part(slope_T)
        slope_S = None if slope_T is None else slope_T[chosen_S]
        logprobs_S, entropies_S = self.policy(
            ids_T, positions_T, labels_T, chosen_S, documents, slope_S, entropies, images
        )

        def whole_row(values_S: Tensor) -> Tensor:
            values_T = torch.zeros(len(labels_T), device=device).index_copy(0, chosen_S, values_S)
            return sequence.join(values_T, len(micro_batch.ids_T)) if sequence else values_T

        return whole_row(logprobs_S), None if entropies_S is None else whole_row(entropies_S)

    def _read(self, row: MicroBatch, part: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Images | None]:
        """Ids, positions and images on the device: of this process's part, or of the whole row where it holds images."""
        if row.images is None or self.policy.vision is None:
            ids_T, positions_T = (
                torch.from_numpy(a).to(device, non_blocking=True) for a in (part.ids_T, part.positions_T)
            )
            return ids_T, positions_T, None
        arrays = self.policy.vision.taken(row.images())
        ids_T = torch.from_numpy(row.ids_T)
        positions_AT = self.policy.vision.positions(ids_T, row.lengths_N, arrays)
        return (
            ids_T.to(device, non_blocking=True),
            positions_AT.to(device, non_blocking=True),
            Images(arrays, device, self.policy.vision.seen_whole(ids_T, row.lengths_N, device)),
        )
