"""What training takes of a device's memory, by arithmetic, and what would take less. docs/memory.md has the formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from posttrain.config.schema import Config
from posttrain.run.advice.advice import Advice

GIB = 2**30
# kept for the backward pass of a block, in elements a token: counted in transformers' Qwen2 (docs/memory.md)
HIDDEN_KEPT, INNER_KEPT = 11, 4
FOUR_BITS = 0.5 + 2 / 64  # bytes a weight: its code, and its part of a block's scale
EIGHT_BITS = 1 + 4 / 256  # likewise of one of AdamW's averages
INPUTS_HERE = 2  # of blocks, where the others' are in the host's memory


@dataclass(frozen=True)
class Needs:
    """What one process's device must hold. Bytes are those of one number."""

    num_weights: int
    num_trained: int
    num_blocks: int
    hidden: int
    inner: int
    shards: int  # processes that share one copy of the weights
    sharded: bool  # whether FSDP2 lays them out
    kept_bytes: int
    computed_bytes: int
    reference: bool  # a frozen copy is held
    tokens: int  # of a micro-batch
    longest: int  # of a row
    param_offload: bool = False
    optimizer_offload: bool = False
    reference_offload: bool = False
    recompute_every: int | None = None
    activation_offload: bool = False
    num_linear: int = 0  # frozen weights that could be kept in 4 bits
    in_4bit: bool = False
    averages_in_8bit: bool = False
    stays_gathered: bool = False  # all weights, from the forward pass to the backward pass
    tower_learns: bool = False  # so that its activations are kept, which are not reckoned here

    @property
    def computed(self) -> float:
        """All weights in the form in which they are gathered to compute."""
        in_4bit = self.num_linear if self.in_4bit else 0
        return (self.num_weights - in_4bit) * self.computed_bytes + in_4bit * FOUR_BITS

    @property
    def at_rest(self) -> float:
        """This device's part of the weights: trained ones as they are kept, frozen ones as they are computed with."""
        kept = self.computed + self.num_trained * (self.kept_bytes - self.computed_bytes)
        return 0 if self.param_offload else kept / self.shards

    @property
    def weights(self) -> float:
        """That, and what is gathered of them for a while."""
        whole = self.shards > 1 or self.param_offload or self.computed_bytes != self.kept_bytes
        share = 1 if self.stays_gathered else 2 / max(self.num_blocks, 1)
        return self.at_rest + (share * self.computed if self.sharded and whole else 0)

    @property
    def gradients(self) -> float:
        return 0 if self.param_offload else self.num_trained * self.kept_bytes / self.shards

    @property
    def averages(self) -> float:
        """Both of AdamW's."""
        size = EIGHT_BITS if self.averages_in_8bit else self.kept_bytes
        return 0 if self.optimizer_offload else 2 * self.num_trained * size / self.shards

    @property
    def copy(self) -> float:
        """The reference policy's weights."""
        if not self.reference or self.reference_offload:
            return 0
        return self.num_weights * self.kept_bytes / self.shards

    @property
    def activations(self) -> float:
        """Roughly: what is kept for the backward pass of a micro-batch."""
        block = (HIDDEN_KEPT * self.hidden + INNER_KEPT * self.inner) * self.computed_bytes
        if self.recompute_every is None:
            return self.tokens * self.num_blocks * block
        recomputed = -(-self.num_blocks // self.recompute_every)
        here = min(recomputed, INPUTS_HERE) if self.activation_offload else recomputed
        inputs = here * self.hidden * self.computed_bytes
        return self.tokens * (inputs + (self.num_blocks - recomputed + 1) * block)

    @property
    def fixed(self) -> float:
        """What does not depend on the rows."""
        return self.weights + self.gradients + self.averages + self.copy

    @property
    def total(self) -> float:
        return self.fixed + self.activations

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "AdamW's averages": self.averages,
            "the reference": self.copy,
        }
        said = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        beside = " beside what its images take in the vision tower" if self.tower_learns else ""
        return f"{said}, about {gib(self.activations)} for a micro-batch of {self.tokens:,} tokens{beside}"


def gib(size: float) -> str:
    """Bytes as GiB, or as MiB where they are few."""
    return f"{size / GIB:.1f} GiB" if size >= 0.95 * GIB else f"{size / 2**20:,.1f} MiB"


def memory_line(needs: Needs, capacity_gib: float | None) -> str:
    """The arithmetic of memory, as a run prints it before a model is loaded."""
    trained = "all" if needs.num_trained == needs.num_weights else f"{needs.num_trained:,}"
    of = f", of {capacity_gib:.1f} GiB" if capacity_gib is not None else ""
    return f"memory: {needs.num_weights:,} weights, {trained} trained; on each device {needs}{of}"


def does_not_fit(needs: Needs, config: Config, capacity_gib: float | None, has_own_memory: bool) -> Advice | None:
    """does-not-fit: weights, gradients and averages alone are more than the device has."""
    if capacity_gib is None or needs.fixed <= capacity_gib * GIB:
        return None
    found = f"Weights, gradients and AdamW's averages alone take {gib(needs.fixed)}, more than the {capacity_gib:.1f} GiB of this device ({needs})."
    return Advice("does-not-fit", found, remedies(needs, config, has_own_memory, capacity_gib))


def out_of_memory(
    needs: Needs | None,
    config: Config,
    *,
    place: str,
    cause: str,
    peak_gib: float | None,
    capacity_gib: float | None,
    has_own_memory: bool,
    answering: bool,
) -> Advice:
    """out-of-memory: what would fit, nearest first, of what is not on already."""
    used = f" This process had used up to {peak_gib:.1f} GiB" if peak_gib is not None else ""
    used += f" of {capacity_gib:.1f} GiB." if used and capacity_gib is not None else "." if used else ""
    found = f"Memory ran out ({place}): {cause}\n{used.strip()}"
    if needs is None:
        return Advice("out-of-memory", found, ["Fewer rows at a time while they are read: data.num_workers=1."])
    found += f" By arithmetic it needs {needs}."
    first = list(_for_answers(config)) if answering else []
    return Advice("out-of-memory", found, [*first, *remedies(needs, config, has_own_memory, capacity_gib)])


def remedies(needs: Needs, config: Config, has_own_memory: bool, capacity_gib: float | None) -> list[str]:
    """What takes less, nearest first; where even without rows nothing would fit, not what only makes rows smaller."""
    fits_else = capacity_gib is None or needs.fixed < capacity_gib * GIB
    found = [*_smaller_rows(needs, config, has_own_memory, capacity_gib)] if fits_else else []
    found += [*_fewer_numbers(needs, config, has_own_memory)]
    if fits_else:
        found += [*_shorter_samples(needs, config)]
    return [*found, *_more_devices(needs, config, has_own_memory, fits_else)]


def _smaller_rows(needs: Needs, config: Config, has_own_memory: bool, capacity_gib: float | None) -> Iterator[str]:
    data, model = config.data, config.model
    fewer = _halved(needs)
    while capacity_gib and fewer.total > capacity_gib * GIB and fewer.tokens > needs.longest:
        fewer = _halved(fewer)
    saved = needs.activations - fewer.activations
    same = f"same result: micro-batches add up to the step of {data.train_batch_size} by themselves (gradient accumulation)"
    if data.packing and data.micro_batch_size_per_gpu is not None and data.micro_batch_size_per_gpu > 1:
        saved = needs.activations - _halved(needs).activations
        yield f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu // 2}: about {gib(saved)} less, the {same}."
    elif data.micro_batch_size_per_gpu is None and data.packing and fewer.tokens < needs.tokens:
        yield f"data.max_tokens_per_gpu={fewer.tokens}: about {gib(saved)} less, the {same}."
    if not model.enable_gradient_checkpointing or model.gradient_checkpointing_every > 1:
        saved = needs.activations - replace(needs, recompute_every=1).activations
        every = " model.gradient_checkpointing_every=1" if model.gradient_checkpointing_every > 1 else ""
        yield f"model.enable_gradient_checkpointing=true{every}: about {gib(saved)} less, a third more time."
    elif has_own_memory and not model.enable_activation_offload:
        saved = needs.activations - replace(needs, activation_offload=True).activations
        yield f"model.enable_activation_offload=true: about {gib(saved)} less on the device, the same result."


def _halved(needs: Needs) -> Needs:
    return replace(needs, tokens=max(needs.tokens // 2, needs.longest))


def _fewer_numbers(needs: Needs, config: Config, has_own_memory: bool) -> Iterator[str]:
    model, engine = config.model, config.engine
    if saved := needs.fixed - replace(needs, stays_gathered=False).fixed:
        yield f"engine.reshard_after_forward=true: {gib(saved)} less, more talk between processes, the same result."
    if not (model.lora_rank or model.lora_adapter_path):
        adapters = replace(needs, num_trained=0, reference=False)
        yield f"model.lora_rank=16 with ten times the rate: {gib(needs.fixed - adapters.fixed)} less, only adapters learn."
    elif needs.num_linear and not model.load_in_4bit:
        saved = needs.fixed - replace(needs, in_4bit=True).fixed
        yield f"model.load_in_4bit=true: {gib(saved)} less, frozen weights are rounded, slower."
    if has_own_memory and not engine.optimizer_offload:
        yield f"engine.optimizer_offload=true: {gib(needs.averages)} less on the device."
    if config.optim.optimizer == "adamw" and not needs.optimizer_offload:
        saved = needs.averages - replace(needs, averages_in_8bit=True).averages
        yield f"optim.optimizer=adamw_8bit: {gib(saved)} less, nearly the same result, slower steps of the optimizer."
    if has_own_memory and not engine.param_offload:
        yield f"engine.param_offload=true: {gib(needs.at_rest + needs.gradients)} less on the device, slower."
    if has_own_memory and needs.reference and not engine.reference_offload:
        yield f"engine.reference_offload=true: {gib(needs.copy)} less on the device."
    if has_own_memory and needs.computed_bytes == 4:
        saved = needs.activations - replace(needs, computed_bytes=2).activations
        yield f"model.dtype=bfloat16: about {gib(saved)} less, and faster where the device is made for it."
    if needs.kept_bytes == 4 and needs.num_trained == needs.num_weights:
        saved = needs.fixed - replace(needs, kept_bytes=2).fixed
        yield f"model.weights_dtype=bfloat16: {gib(saved)} less, and small updates are lost."


def _shorter_samples(needs: Needs, config: Config) -> Iterator[str]:
    longest = config.data.max_length
    yield f"data.max_length={longest // 2} data.truncation=drop (or right): shorter samples, fewer tokens that must go together."


def _more_devices(needs: Needs, config: Config, has_own_memory: bool, fits_else: bool) -> Iterator[str]:
    engine = config.engine
    saved = (needs.at_rest + needs.gradients + needs.averages + needs.copy) / 2
    hybrid = engine.fsdp_size and needs.shards == engine.fsdp_size
    shared = f"engine.fsdp_size={2 * needs.shards}" if hybrid else "as many again"
    where = (
        "trainer.n_gpus_per_node, trainer.nnodes"
        if has_own_memory
        else "trainer.nnodes; processes of one machine share its memory"
    )
    yield f"More devices, {shared} ({where}): FSDP2 shares weights, gradients and averages, about {gib(saved)} less on each."
    if config.data.packing and fits_else:
        size = 2 * engine.ulysses_sequence_parallel_size
        yield f"engine.ulysses_sequence_parallel_size={size}: devices share a row, for rows that are too long for one."


def _for_answers(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.name == "vllm" and not config.vllm.devices:
        less = round(config.vllm.gpu_memory_utilization / 2, 2)
        yield f"vllm.gpu_memory_utilization={less}, or devices of its own (vllm.devices)."
    elif rollout.batch_size > 1:
        yield f"rollout.batch_size={rollout.batch_size // 2}: fewer answers at the same time, the same answers."
    yield f"rollout.max_new_tokens={max(1, rollout.max_new_tokens // 2)}, if answers need not be so long."
