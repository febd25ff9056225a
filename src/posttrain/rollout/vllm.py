"""Answers by vLLM, in a process of its own that speaks token ids; weights reach it through memory. docs/vllm.md tells more."""

# T tokens

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from posttrain.config.schema import VLLMOptions
from posttrain.distributed.device import Device, environment_with
from posttrain.errors import InputError, RunError
from posttrain.records import Completion, Segment
from posttrain.rollout.handover import DeviceMemory, HostMemory, Memory, name_of, shares_device, size_of, write
from posttrain.rollout.noise import stream
from posttrain.rollout.rollout import Request, Sampling
from posttrain.rollout.server_process import SCRIPT, ServerProcess
from posttrain.rollout.vllm_server import split

CHUNK_BYTES = 2**28  # of weights that lie in shared memory at the same time; a larger tensor has a chunk of its own
IN_MEMORY = Path("/dev/shm")


class VLLMRollout:
    """A server that answers prompts given as token ids, with weights that the trainer handed over last."""

    def __init__(
        self, server: ServerProcess, tokenizer: Any, end_ids: Sequence[int], dtype: torch.dtype, memory: Memory,
        sleep_level: int,
    ):  # fmt: skip
        self.server, self.tokenizer, self.end_ids = server, tokenizer, sorted(end_ids)
        self._dtype, self._memory, self._sleep_level = dtype, memory, sleep_level
        self._has_weights = False
        self.warnings: list[str] = []

    @property
    def has_weights(self) -> bool:
        return self._has_weights

    @classmethod
    def start(
        cls,
        model_folder: Path,
        tokenizer: Any,
        end_ids: Sequence[int],
        options: VLLMOptions,
        *,
        dtype: torch.dtype,
        device: Device,
        log: Path,
        lora_rank: int = 0,
        local_rank: int = 0,
    ) -> VLLMRollout:
        """A server for this process. It has no weights before the first `take`. Raises InputError, RunError.

        `model_folder` holds config.json and needs no weights; see `write_model_folder`. `device` is the trainer's own, used
        where `vllm.devices` names no other; then the two take turns by `sleep`. With `lora_rank` it has room for an adapter.
        """
        if not end_ids:
            raise InputError("The tokenizer has no end-of-turn token, so that no answer would end.")
        devices = _devices(options, device, local_rank)
        sleeps = device.has_own_memory and not options.devices
        settings = {
            "model": str(model_folder),
            "dtype": name_of(dtype),
            "lora_rank": lora_rank,
            "sleeps": sleeps,
            "tensor_parallel_size": options.tensor_parallel_size,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "max_model_len": options.max_model_len,
            "enforce_eager": options.enforce_eager,
        }
        host = HostMemory()
        server = ServerProcess(
            [options.python or sys.executable, str(SCRIPT)],
            settings,
            log,
            start_seconds=options.start_timeout_seconds,
            seconds=options.timeout_seconds,
            shared=[host.descriptor],
            environment={**environment_with(devices), "VLLM_NO_USAGE_STATS": "1"},
        )
        uuids, memory = server.facts["devices"], cast(Memory, host)
        if device.has_own_memory and len(uuids) == 1 and shares_device(device.torch_device, uuids[0]):
            memory = DeviceMemory(device.torch_device)
        # of frozen weights beside an adapter the host keeps a copy, since only the adapter comes again
        return cls(server, tokenizer, end_ids, dtype, memory, (1 if lora_rank else 2) if sleeps else 0)

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Answer with these weights from now on, and without the adapter that there was. Raises RunError."""
        self._has_weights = False
        self.server.ask("begin_weights", {})
        tensors: list[tuple[str, str, list[int], int]] = []
        memory, used = self._memory.reserve(CHUNK_BYTES), 0
        for name, weight in weights:
            dtype = self._dtype if weight.is_floating_point() else weight.dtype
            needed = size_of(weight, dtype)
            if used + needed > CHUNK_BYTES:
                self._load(tensors)
                memory, tensors, used = self._memory.reserve(max(needed, CHUNK_BYTES)), [], 0
            tensors.append((name, name_of(dtype), list(weight.shape), used))
            used = write(memory, used, weight.detach(), dtype)
        self._load(tensors)
        self.server.ask("finish_weights", {})
        self._memory.release()
        self._has_weights = True

    def take_adapter(self, weights: Iterable[tuple[str, Tensor]], config: dict[str, Any]) -> None:
        """Answer with this adapter beside the weights taken before, in place of any other. Raises RunError.

        Names are those of peft's adapter_model.safetensors, `config` what its adapter_config.json holds.
        """
        from safetensors.torch import save_file

        self._check_weights()
        tensors = {name: weight.detach().float().cpu().contiguous() for name, weight in weights}
        folder = Path(tempfile.mkdtemp(prefix="posttrain-adapter-", dir=_place(tensors.values())))
        try:
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            (folder / "adapter_config.json").write_text(json.dumps(config, default=sorted))  # peft has sets
            self.server.ask("take_adapter", {"folder": str(folder)})
        finally:
            shutil.rmtree(folder)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Callable[[int], None] = lambda done: None
    ) -> list[Completion]:
        """One completion a request, in their order; vLLM decides which are written at the same time. Raises RunError."""
        self._check_weights()
        if not requests:
            return []
        self._check_lengths(requests)
        header = {
            "lengths": [len(request.prompt_ids_T) for request in requests],
            "max_new_tokens": [request.max_new_tokens for request in requests],
            "seeds": [stream((*request.key, request.first_position)) >> 1 for request in requests],
            "end_ids": self.end_ids,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
        prompts = np.concatenate([request.prompt_ids_T for request in requests]).astype(np.int32).tobytes()
        answer, data = self.server.ask("generate", header, prompts, advance)
        lengths = answer["lengths"]
        ids, logprobs = np.frombuffer(data, np.int32, sum(lengths)), np.frombuffer(data, np.float32)[sum(lengths) :]
        each = zip(requests, split(ids, lengths), split(logprobs, lengths), answer["stopped"], strict=True)
        return [self._completion(*parts) for parts in each]

    def sleep(self) -> None:
        """Give the device's memory back until the next `take` or `take_adapter`, where the trainer works on it too."""
        if self._sleep_level:
            self._has_weights = self._sleep_level == 1
            self.server.ask("sleep", {"level": self._sleep_level})

    def close(self) -> None:
        self.server.close()
        self._memory.release()

    def _load(self, tensors: list[tuple[str, str, list[int], int]]) -> None:
        if tensors:
            self.server.ask("load_weights", {"memory": self._memory.handle(), "tensors": tensors})

    def _check_weights(self) -> None:
        if not self._has_weights:
            raise RunError("The vLLM server has no weights: take() comes first, and again after it slept.")

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        limit = self.server.facts["max_model_len"]
        longest = max(len(request.prompt_ids_T) + request.max_new_tokens for request in requests)
        if longest > limit:
            raise RunError(
                f"A prompt and its answer may take {longest} tokens, and the vLLM server has room for {limit}. Set "
                f"vllm.max_model_len={longest}, or lower rollout.max_new_tokens or data.max_prompt_length."
            )

    def _completion(self, request: Request, ids_T: np.ndarray, logprobs_T: np.ndarray, stopped: bool) -> Completion:
        text = self.tokenizer.decode(ids_T, skip_special_tokens=True)
        segment = Segment(ids_T.copy(), logprobs_T.copy())
        return Completion(request.prompt_ids_T, [segment], text, stopped=stopped)


def write_model_folder(lm: Any, folder: Path) -> None:
    """Write what vLLM needs to know of a transformers model before it has weights: its config.json."""
    config = deepcopy(lm.config)
    # fully_shard renames the class
    config.architectures = config.architectures or [type(lm).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)


def _devices(options: VLLMOptions, device: Device, local_rank: int) -> str:
    """The devices that a server may see: its share of those named, else the trainer's own."""
    wanted = options.tensor_parallel_size
    if options.devices:
        share = options.devices[local_rank * wanted : (local_rank + 1) * wanted]
        if len(share) < wanted:
            raise InputError(
                f"vllm.devices={options.devices}: process {local_rank} of this machine needs {wanted} of its own for its "
                f"server, {(local_rank + 1) * wanted} up to it."
            )
        return ",".join(map(str, share))
    if wanted > 1:
        raise InputError(
            f"vllm.tensor_parallel_size={wanted} needs vllm.devices: a server on the trainer's own device has one, and on CPU "
            "none."
        )
    return device.number if device.has_own_memory else ""


def _place(tensors: Iterable[Tensor]) -> Path | None:
    """Where an adapter lies until the server has read it: in memory, where that has room for it, else in the temporary folder."""
    needed = 2 * sum(tensor.nbytes for tensor in tensors)
    return IN_MEMORY if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > needed else None
