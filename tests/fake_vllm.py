"""A rollout server without vLLM, which speaks as the real one does: its answers tell what it was given.

The name of the model's folder says how it fails, if it does.
"""

import os
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from posttrain.rollout.vllm_server import IDS, LOGPROBS, Channel, main, open_memory, split, view


class Server:
    def __init__(self, channel: Channel, settings: dict):
        self.channel, self.settings, self.how = channel, settings, Path(settings["model"]).name
        self.weights: dict[str, Any] = {}
        print("the fake server says something", flush=True)
        match self.how:
            case "too-large":
                raise ValueError("no room for this model")
            case "dies-at-start":
                os.abort()
            case "sleeps-at-start":
                time.sleep(60)
        self.child = subprocess.Popen(["sleep", "600"])

    def facts(self) -> dict:
        return {"devices": [None], "max_model_len": 50, "settings": self.settings, "child": self.child.pid,
                "environment": dict(os.environ)}  # fmt: skip

    def begin_weights(self, header: dict, payload: bytes) -> None:
        self.weights, self.num_loads = {}, 0

    def load_weights(self, header: dict, payload: bytes) -> None:
        import torch

        self.num_loads += 1
        memory = {**header["memory"], "path": f"/proc/{os.getpid()}/fd/{header['memory']['fd']}"}
        shared = open_memory(memory, torch.device("cpu"))
        self.weights |= {name: view(shared, *place).clone() for name, *place in header["tensors"]}

    def finish_weights(self, header: dict, payload: bytes) -> None:
        pass

    def weights_as_they_came(self, header: dict, payload: bytes) -> dict:
        import torch

        return {"num_loads": self.num_loads}, b"".join(
            weight.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for weight in self.weights.values()
        )

    def take_adapter(self, header: dict, payload: bytes) -> None:
        self.adapter = {path.name: path.read_bytes() for path in Path(header["folder"]).iterdir()}

    def adapter_as_it_came(self, header: dict, payload: bytes) -> dict:
        name = header["file"]
        return {"names": sorted(self.adapter)}, self.adapter[name]

    def generate(self, header: dict, payload: bytes) -> tuple[dict, bytes]:
        """The prompt backwards as the answer, and its seed, a float, as each log-probability."""
        match self.how:
            case "dies":
                os.kill(os.getpid(), 9)
            case "raises":
                raise RuntimeError("the engine is dead\nand more")
            case "hangs":
                time.sleep(600)
        prompts = [prompt.tolist()[::-1] for prompt in split(array(IDS, payload), header["lengths"])]
        self.channel.send({"done": 0})
        self.channel.send({"done": len(prompts)})
        ids = array(IDS, [token for prompt in prompts for token in prompt])
        logprobs = array(LOGPROBS, [seed / 2**63 for seed, p in zip(header["seeds"], prompts, strict=True) for _ in p])
        answer = {"lengths": header["lengths"], "stopped": [p[-1] in header["end_ids"] for p in prompts]}
        return answer, ids.tobytes() + logprobs.tobytes()

    def close(self) -> None:
        if self.how == "does-not-close":
            time.sleep(600)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Server))
