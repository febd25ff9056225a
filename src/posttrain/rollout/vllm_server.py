"""The process in which vLLM answers. It runs in vLLM's interpreter, which need not have posttrain: it knows only vLLM and torch.

Started as `python vllm_server.py FD PID SETTINGS`: the socket to the trainer, the trainer's process id, and JSON. What the
trainer asks and what is answered stands in `Server`. Everything that is printed belongs to the log.
"""

# T tokens

from __future__ import annotations

import json
import math
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

IDS, LOGPROBS = "i", "f"  # of Python's arrays: 32 bits each
SECONDS_BETWEEN_SIGNS = 1.0  # of life, while answers are written
SECONDS_TO_END = 5.0  # for a busy server whose trainer is gone
_LENGTHS = struct.Struct("<IQ")


class Channel:
    """Messages over a socket: a JSON object and bytes, with the lengths of both in front."""

    def __init__(self, connection: socket.socket):
        self.connection = connection

    def send(self, header: dict[str, Any], payload: bytes = b"", seconds: float | None = None) -> None:
        """Raises TimeoutError where it takes longer than so many seconds, and OSError where nobody is there."""
        self.connection.settimeout(seconds)
        text = json.dumps(header).encode()
        self.connection.sendall(_LENGTHS.pack(len(text), len(payload)) + text + payload)

    def receive(self, seconds: float | None = None) -> tuple[dict[str, Any], bytes]:
        """Raises TimeoutError after so many seconds of silence, and EOFError where the other side is gone."""
        self.connection.settimeout(seconds)
        text_bytes, payload_bytes = _LENGTHS.unpack(self._read(_LENGTHS.size))
        return json.loads(self._read(text_bytes)), self._read(payload_bytes)

    def _read(self, num_bytes: int) -> bytes:
        read = bytearray(num_bytes)
        place = memoryview(read)
        while place:
            got = self.connection.recv_into(place)
            if not got:
                raise EOFError
            place = place[got:]
        return bytes(read)


class Server:
    """vLLM's engine, and what a trainer can ask of it: each method is a request, by its name."""

    def __init__(self, channel: Channel, settings: dict[str, Any]):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is vLLM's own already
        import torch

        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
        except RuntimeError as error:  # torchvision of another build
            raise ImportError(str(error)) from error
        if not torch.accelerator.is_available():
            _keep_plain_weights()
        self.channel = channel
        self.engine: Any = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(settings)))
        self.num_requests = self.num_adapters = 0
        self.adapter: Any = None

    def facts(self) -> dict[str, Any]:
        """What the trainer needs to know of an engine that has started."""
        import torch
        import vllm

        devices = self.engine.collective_rpc("device_uuid")
        longest = self.engine.model_config.max_model_len
        return {"vllm": vllm.__version__, "torch": torch.__version__, "devices": devices, "max_model_len": longest}

    def begin_weights(self, header: dict[str, Any], payload: bytes) -> None:
        """New weights come: those of the whole model, in parts."""
        if self.engine.is_sleeping():
            self.engine.wake_up(["weights"])
        self.adapter = None
        self.engine.collective_rpc("begin_weights")

    def load_weights(self, header: dict[str, Any], payload: bytes) -> None:
        """Some of them: their names, number formats, shapes, and where they lie in shared memory."""
        memory = header["memory"]
        if "fd" in memory:  # vLLM's workers may be processes of their own
            memory = {**memory, "path": f"/proc/{os.getpid()}/fd/{memory['fd']}"}
        self.engine.collective_rpc("load_weights", args=(memory, header["tensors"]))

    def finish_weights(self, header: dict[str, Any], payload: bytes) -> None:
        """That was all."""
        self.engine.collective_rpc("finish_weights")
        if self.engine.is_sleeping():
            self.engine.wake_up(["kv_cache"])
        self._forget_prefixes()

    def take_adapter(self, header: dict[str, Any], payload: bytes) -> None:
        """Answer with the adapter in this folder, which may go afterwards."""
        from vllm.lora.request import LoRARequest

        self._wake()
        if self.adapter:
            self.engine.remove_lora(self.adapter.lora_int_id)
        self.num_adapters += 1  # vLLM keeps adapters by their number, and would not load one again
        self.adapter = LoRARequest(f"step-{self.num_adapters}", self.num_adapters, header["folder"])
        if not self.engine.add_lora(self.adapter):
            raise RuntimeError("vLLM did not take the adapter")
        self._forget_prefixes()

    def sleep(self, header: dict[str, Any], payload: bytes) -> None:
        """Give memory back. Level 1 keeps the weights in the host's memory, level 2 forgets them."""
        self.engine.sleep(header["level"])

    def generate(self, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        """Answers to prompts, whose ids are the payload one after the other; says meanwhile how many are done."""
        self._wake()
        temperature = header["temperature"]
        # dividing here, before vLLM sees them, makes its raw log-probabilities those that are wanted
        self.engine.collective_rpc("divide_logits", args=(temperature or 1.0,))
        wanted: dict[str, int] = {}
        for number, prompt_T in enumerate(split(array(IDS, payload), header["lengths"])):
            self.num_requests += 1
            wanted[str(self.num_requests)] = number
            parameters = _sampling(header, number, random=temperature > 0)
            prompt = {"prompt_token_ids": prompt_T.tolist()}
            self.engine.add_request(str(self.num_requests), prompt, parameters, lora_request=self.adapter)
        answers: list[Any] = [None] * len(wanted)
        for request, answer in self._finished():
            answers[wanted[request]] = answer
        ids = array(IDS, [token for answer in answers for token in answer.token_ids])
        logprobs = array(LOGPROBS, [logprob for answer in answers for logprob in _logprobs(answer)])
        stopped = [answer.finish_reason == "stop" for answer in answers]
        lengths = [len(answer.token_ids) for answer in answers]
        return {"lengths": lengths, "stopped": stopped}, ids.tobytes() + logprobs.tobytes()

    def close(self) -> None:
        self.engine.engine_core.shutdown()

    def _finished(self) -> Iterator[tuple[str, Any]]:
        done, said = 0, time.monotonic()
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    done += 1
                    yield output.request_id, output.outputs[0]
            if time.monotonic() - said > SECONDS_BETWEEN_SIGNS:
                self.channel.send({"done": done})
                done, said = 0, time.monotonic()
        self.channel.send({"done": done})

    def _wake(self) -> None:
        if self.engine.is_sleeping():  # with weights that the host kept
            self.engine.wake_up()

    def _forget_prefixes(self) -> None:
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not give up what it had computed with the old weights")


class WeightReceiver:
    """What each of vLLM's workers can do besides its own: vLLM mixes it into their class."""

    device: Any
    model_config: Any
    model_runner: Any
    vllm_config: Any
    waiting: Any  # names of weights that have not come yet, while they come

    def device_uuid(self) -> str | None:
        """Of the device that this worker computes on; None on the host."""
        import torch

        if self.device.index is None:
            return None
        facts = torch.get_device_module(self.device).get_device_properties(self.device)
        return str(facts.uuid) if hasattr(facts, "uuid") else None

    def divide_logits(self, divisor: float) -> None:
        model = self.model_runner.get_model()
        plain = type(model).compute_logits

        def divided(*args: Any, **kwargs: Any) -> Any:
            logits = plain(model, *args, **kwargs)
            return logits if logits is None else logits.float() / divisor

        model.__dict__.pop("compute_logits", None)
        if divisor != 1:
            model.compute_logits = divided

    def begin_weights(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if getattr(self, "waiting", None) is not None:
            raise RuntimeError("weights came only in part the last time, and vLLM cannot begin anew")
        model = self.model_runner.get_model()
        self.waiting = {_plain_name(name) for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)

    def load_weights(self, memory: dict[str, Any], tensors: list[tuple[str, str, list[int], int]]) -> None:
        from vllm.config import set_current_vllm_config

        shared = open_memory(memory, self.device)
        # copied, since vLLM keeps the parts of a layer until it has all of them
        weights = [(name, view(shared, dtype, shape, start).to(self.device, copy=True))
                   for name, dtype, shape, start in tensors]  # fmt: skip
        with set_current_vllm_config(self.vllm_config):
            self.waiting -= {_plain_name(name) for name in self.model_runner.get_model().load_weights(weights)}
        if "parts" in memory:
            import torch

            torch.accelerator.synchronize()

    def finish_weights(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self.waiting:
            raise RuntimeError(f"{len(self.waiting)} weights of vLLM's model did not come, such as {min(self.waiting)}")
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)
        self.waiting = None
        self.model_runner.reset_lora_state()


def engine_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """vLLM's own names for what the trainer asks for."""
    import torch

    eager = settings["enforce_eager"]
    arguments = {
        "model": settings["model"],
        "dtype": settings["dtype"],
        "tensor_parallel_size": settings["tensor_parallel_size"],
        "gpu_memory_utilization": settings["gpu_memory_utilization"],
        "max_model_len": settings["max_model_len"],
        # compiling takes half a minute on a CPU, which a run that has one seldom earns back
        "enforce_eager": not torch.accelerator.is_available() if eager is None else eager,
        "enable_sleep_mode": settings["sleeps"],
        "load_format": "dummy",  # weights come from the trainer
        "generation_config": "vllm",  # what the model's folder says about sampling does not count
        "skip_tokenizer_init": True,
        # a prompt that is cut in two would draw noise twice: vLLM's model runner on CPU even ends there
        "enable_chunked_prefill": False,
        "logprobs_mode": "raw_logprobs",
        "worker_extension_cls": f"{WeightReceiver.__module__}.{WeightReceiver.__qualname__}",
    }
    if settings["lora_rank"]:
        ranks = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
        room = next((rank for rank in ranks if rank >= settings["lora_rank"]), settings["lora_rank"])
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
    return arguments


def open_memory(memory: dict[str, Any], device: Any) -> Any:
    """Shared bytes as a tensor (uint8): a file of the host's memory, or parts of a device tensor's CUDA IPC handle."""
    import torch

    if "path" in memory:
        with open(memory["path"], "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), memory["bytes"]), dtype=torch.uint8)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    parts = [bytes.fromhex(part["hex"]) if isinstance(part, dict) else part for part in memory["parts"]]
    size, stride, start, storage, num_bytes, first, counter, counter_start, event, event_counts = parts
    return rebuild_cuda_tensor(
        torch.Tensor, tuple(size), tuple(stride), start, torch.UntypedStorage, torch.uint8, device.index, storage, num_bytes, first,
        False, counter, counter_start, event, event_counts,
    )  # fmt: skip


def view(memory: Any, dtype: str, shape: Sequence[int], start: int) -> Any:
    """The tensor that lies in shared bytes from `start` on."""
    import torch

    number_format = getattr(torch, dtype)
    num_bytes = math.prod(shape) * number_format.itemsize
    return memory[start : start + num_bytes].view(number_format).view(tuple(shape))


def split(values: Any, lengths: Sequence[int]) -> Iterator[Any]:
    """Consecutive parts of these lengths."""
    start = 0
    for length in lengths:
        yield values[start : start + length]
        start += length


def main(arguments: Sequence[str], start: Callable[[Channel, dict[str, Any]], Any] = Server) -> int:
    """Serve until the trainer is gone; the exit code."""
    fd, parent, settings = int(arguments[0]), int(arguments[1]), json.loads(arguments[2])
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    threading.Thread(target=_end_with, args=(parent, fd), daemon=True).start()
    channel, server = Channel(connection), None
    try:
        server = start(channel, settings)
        channel.send({"ready": server.facts()})
        while (asked := _next(channel)) is not None:
            answer, data = getattr(server, asked[0]["do"])(*asked) or ({}, b"")
            channel.send({"answer": answer}, data)
        server.close()
        return 0
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):  # the trainer is gone too
            channel.send({"failed": "work" if server else "start", **_described(error)}, seconds=SECONDS_TO_END)
        return 1


def _next(channel: Channel) -> tuple[dict[str, Any], bytes] | None:
    """What is asked next; None where the trainer has closed, or is gone."""
    try:
        return channel.receive()
    except (EOFError, ConnectionResetError):
        return None


def _described(error: BaseException) -> dict[str, Any]:
    first_line = (str(error).strip() or "no reason given").splitlines()[0]
    missing = isinstance(error, ModuleNotFoundError) and error.name in ("torch", "vllm")
    return {
        "missing": missing,
        "imported": not isinstance(error, ImportError),
        "error": f"{type(error).__name__}: {first_line}",
    }


def _sampling(header: dict[str, Any], number: int, random: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    drawn = {"temperature": 1.0, "top_p": header["top_p"], "top_k": header["top_k"], "seed": header["seeds"][number]}
    return SamplingParams(
        **(drawn if random else {"temperature": 0.0}),
        max_tokens=header["max_new_tokens"][number],
        stop_token_ids=header["end_ids"],
        ignore_eos=True,  # only those end an answer
        logprobs=0,  # of the token that was drawn
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _logprobs(answer: Any) -> list[float]:
    return [found[token].logprob for token, found in zip(answer.token_ids, answer.logprobs, strict=True)]


def _plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".")  # of layers with room for an adapter


def _keep_plain_weights() -> None:
    """Have vLLM multiply by the weights themselves on CPU.

    Else it multiplies by packed copies and drops the weights: a tied output layer would keep its old copy, in silence.
    """
    import torch
    from vllm.model_executor.layers import utils

    def multiply_plainly(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = multiply_plainly


def _end_with(parent: int, fd: int) -> None:
    """End this process and all that it started soon after the trainer is gone, whatever it is doing."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    # those that the trainer forked may hold its end of the socket open, so that its process id is watched too
    while os.getppid() == parent and not poll.poll(1000):
        pass
    time.sleep(SECONDS_TO_END)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place or ".") != here]  # transformers.py lies here
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of the libraries would take seconds to end
