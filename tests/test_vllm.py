"""Rollouts by vLLM: what holds without it, with a server that only pretends, and what vLLM itself does where it is installed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from posttrain.config.schema import Config, VLLMOptions
from posttrain.distributed.device import Device, choose_device
from posttrain.errors import InputError, RunError
from posttrain.loops.rollout_engine import adapter_rank, hand_over, open_rollout
from posttrain.models.lora import Adapters
from posttrain.rollout import vllm
from posttrain.rollout.noise import stream
from posttrain.rollout.rollout import Request, Sampling
from posttrain.rollout.vllm import VLLMRollout, write_model_folder
from posttrain.rollout.vllm_server import Channel
from tiny import alone, make_engine, tiny_lm

TESTS = Path(__file__).parent
FAKE = TESTS / "fake_vllm.py"
HERE = choose_device("cpu")


class Numbers:
    """A tokenizer whose text is the ids."""

    def decode(self, ids_T, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids_T))


def start(folder: Path, lora_rank: int = 0, end_ids=(3,), dtype=torch.float32, **options) -> VLLMRollout:
    return VLLMRollout.start(
        folder, Numbers(), end_ids, VLLMOptions(**options), dtype=dtype, device=HERE, log=folder.with_suffix(".log"),
        lora_rank=lora_rank,
    )  # fmt: skip


def requests(prompts: list[list[int]], max_new_tokens: int = 20, first_position: int = 0) -> list[Request]:
    return [
        Request(np.array(prompt, dtype=np.int32), (7, number), max_new_tokens, first_position)
        for number, prompt in enumerate(prompts)
    ]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not is_alive(pid)


# ---- messages


def test_messages_arrive_as_they_were_sent_whatever_their_size():
    here, there = map(Channel, socket.socketpair())
    sent = [({"do": "x", "text": "é\n"}, b""), ({}, bytes(range(256)) * 40_000), ({"n": [1, 2.5, None]}, b"1")]
    thread = threading.Thread(target=lambda: [here.send(*message) for message in sent])
    thread.start()
    assert [there.receive(5) for _ in sent] == sent
    thread.join()
    with pytest.raises(TimeoutError):
        there.receive(0.05)
    here.connection.sendall(b"\x05\x00\x00")  # the other side ends in the middle of a message
    here.connection.close()
    with pytest.raises(EOFError):
        there.receive(5)


# ---- a server that pretends


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(vllm, "SCRIPT", FAKE)


@pytest.fixture(scope="module")
def pretender(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "SCRIPT", FAKE)
        patch.setenv("RANK", "1")
        patch.setenv("TORCHELASTIC_RUN_ID", "1")
        rollout = start(tmp_path_factory.mktemp("fake") / "model", dtype=torch.bfloat16, gpu_memory_utilization=0.25)
    yield rollout
    rollout.close()


def test_weights_arrive_in_the_servers_number_format_and_in_chunks(pretender, monkeypatch):
    monkeypatch.setattr(vllm, "CHUNK_BYTES", 4096)
    generator = torch.Generator().manual_seed(0)
    weights = {f"w{n}": torch.randn(n, 30, generator=generator) for n in (1, 7, 40, 500, 3)}
    weights |= {"transposed": torch.randn(8, 9, generator=generator).T, "scalar": torch.tensor(2.5),
                "counts": torch.arange(5), "empty": torch.zeros(0, 4)}  # fmt: skip
    for scale in (1, -3):  # the second time too
        pretender.take((name, weight * scale) for name, weight in weights.items())
        told, data = pretender.server.ask("weights_as_they_came", {})
        expected = [w * scale if name == "counts" else (w * scale).bfloat16() for name, w in weights.items()]
        assert data == b"".join(w.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for w in expected)
        assert told["num_loads"] == 3  # w1, w7 and w40 together, w500 alone, the small ones after it
    assert os.fstat(pretender._memory.descriptor).st_size == 0


def test_answers_belong_to_their_requests(pretender):
    pretender.take([("w", torch.ones(2))])
    heard = []
    asked = requests([[5, 6, 7], [3, 9], [8]], first_position=2)
    completions = pretender.generate(asked, Sampling(1.0), heard.append)
    assert [c.segments[0].ids_T.tolist() for c in completions] == [[7, 6, 5], [9, 3], [8]]
    assert [c.text for c in completions] == ["7 6 5", "9 3", "8"]
    assert [c.stopped for c in completions] == [False, True, False]
    assert [c.prompt_ids_T.tolist() for c in completions] == [[5, 6, 7], [3, 9], [8]]
    for number, completion in enumerate(completions):
        segment = completion.segments[0]
        assert (segment.ids_T.dtype, segment.logprobs_T.dtype) == (np.int32, np.float32)
        assert segment.logprobs_T[0] == np.float32((stream((7, number, 2)) >> 1) / 2**63)
    assert heard == [3]
    assert pretender.generate([], Sampling()) == []


def test_a_longer_answer_than_the_server_has_room_for_is_refused(pretender):
    pretender.take([("w", torch.ones(2))])
    with pytest.raises(RunError, match=r"54 tokens, and the vLLM server has room for 50\. Set\s+vllm.max_model_len=54"):
        pretender.generate(requests([[1, 2, 3, 4]], 50), Sampling())


def test_an_adapter_arrives_as_peft_writes_it_and_leaves_no_file(pretender):
    from safetensors.torch import load, save

    pretender.take([("w", torch.ones(2))])
    weight = torch.arange(6.0).view(2, 3).T
    pretender.take_adapter([("base_model.model.q.lora_A.weight", weight)], {"r": 2, "target_modules": {"q", "k"}})
    told, data = pretender.server.ask("adapter_as_it_came", {"file": "adapter_model.safetensors"})
    assert told["names"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(load(data)["base_model.model.q.lora_A.weight"], weight) and save
    _, data = pretender.server.ask("adapter_as_it_came", {"file": "adapter_config.json"})
    assert json.loads(data) == {"r": 2, "target_modules": ["k", "q"]}
    assert not list(Path("/dev/shm").glob("posttrain-adapter-*"))


def test_a_server_is_told_its_options_and_is_nobodys_worker(pretender):
    facts = pretender.server.facts
    assert facts["settings"] == {
        "model": facts["settings"]["model"], "dtype": "bfloat16", "lora_rank": 0, "sleeps": False,
        "tensor_parallel_size": 1, "gpu_memory_utilization": 0.25, "max_model_len": None, "enforce_eager": None,
    }  # fmt: skip
    assert all(facts["environment"][name] == "" for name in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"))
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & facts["environment"].keys()


def test_a_server_has_room_for_the_adapter_in_use(fake, tmp_path):
    """Also for one that goes on from a folder, where model.lora_rank is 0."""
    from peft import LoraConfig

    config = Config(rollout={"name": "vllm"})
    for adapter, rank in ((LoraConfig(r=16, rank_pattern={"q_proj": 24}), 24), (LoraConfig(r=4), 4), (None, 0)):
        engine = SimpleNamespace(adapters=adapter and Adapters(adapter, "", ""))
        lm = tiny_lm()
        with open_rollout(config, lm, None, Numbers(), [3], alone(), tmp_path, adapter_rank(engine)) as rollout:
            assert rollout.server.facts["settings"]["lora_rank"] == rank


def test_the_trainers_unused_memory_is_free_when_the_server_takes_weights(monkeypatch):
    order = []
    monkeypatch.setattr(Device, "empty_cache", lambda device: order.append("emptied"))
    engine = make_engine(tiny_lm())
    weights = {}
    hand_over(engine, SimpleNamespace(take=lambda given: order.append("took") or weights.update(given)))
    assert order == ["emptied", "took"] and weights.keys() == engine.policy.lm.state_dict().keys()
    assert engine.world.watchdog.place.phase == "handing over weights"


def test_without_weights_there_is_no_answer(fake, tmp_path):
    rollout = start(tmp_path / "model")
    with pytest.raises(RunError, match=r"no weights: take\(\) comes first"):
        rollout.generate(requests([[1]]), Sampling())
    rollout.take([])

    def broken():
        yield "w", torch.ones(2)
        raise KeyError("gathering failed")

    with pytest.raises(KeyError):
        rollout.take(broken())
    with pytest.raises(RunError, match=r"no weights"):
        rollout.generate(requests([[1]]), Sampling())
    child = rollout.server.facts["child"]
    rollout.close()
    assert ends(child, 5)
    with pytest.raises(RunError, match="was closed"):
        rollout.take([])


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("too-large", InputError, r"vLLM could not start: ValueError: no room for this model\. Its options"),
        ("dies-at-start", RunError, r"server ended by SIGABRT \(doing: start\)"),
        ("sleeps-at-start", RunError, r"no sign of life for 6 seconds \(doing: start\).*raise vllm.start_timeout_seconds"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_start_is_told_with_its_last_lines(fake, tmp_path, how, kind, said):
    with pytest.raises(kind, match=said) as error:
        start(tmp_path / how, start_timeout_seconds=6 if how == "sleeps-at-start" else 60)
    assert "    the fake server says something" in str(error.value)
    assert str(tmp_path / f"{how}.log") in str(error.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dies", r"server ended by SIGKILL \(doing: generate\)\. Where memory ran out, lower vllm\.gpu_memory"),
        ("raises", r"The vLLM server failed: RuntimeError: the engine is dead\."),
        ("hangs", r"no sign of life for 1 seconds \(doing: generate\).*raise vllm\.timeout_seconds"),
    ],
)
def test_a_server_that_fails_later_ends_with_all_that_it_started(fake, tmp_path, how, said):
    rollout = start(tmp_path / how, timeout_seconds=1)
    rollout.take([])
    with pytest.raises(RunError, match=said) as error:
        rollout.generate(requests([[1]]), Sampling())
    assert "    the fake server says something" in str(error.value)
    assert ends(rollout.server._process.pid, 2) and ends(rollout.server.facts["child"], 2)
    with pytest.raises(RunError, match=said):  # and again, whoever asks
        rollout.generate(requests([[1]]), Sampling())
    rollout.close()


def test_a_server_that_does_not_close_is_ended(fake, tmp_path):
    rollout = start(tmp_path / "does-not-close")
    rollout.close()
    assert ends(rollout.server._process.pid, 1) and ends(rollout.server.facts["child"], 1)


def test_a_busy_server_ends_with_its_trainer_even_where_a_fork_holds_the_socket(tmp_path):
    trainer = f"""
import os, sys, time
from pathlib import Path
from posttrain.rollout.server_process import ServerProcess
folder = {str(tmp_path)!r}
server = ServerProcess([sys.executable, {str(FAKE)!r}], {{"model": folder + "/hangs"}}, Path(folder, "log"), start_seconds=60, seconds=600)
fork = os.fork()
if not fork:
    time.sleep(600)
print(server._process.pid, server.facts["child"], fork, flush=True)
server.ask("generate", {{"lengths": []}})
"""
    process = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True)
    server, child, fork = map(int, process.stdout.readline().split())
    try:
        time.sleep(0.5)
        process.kill()
        process.wait()
        assert ends(server, 15) and ends(child, 1)
        assert is_alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


# ---- what is refused before anything starts


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_interpreter_without_vllm_is_told_what_to_install(tmp_path):
    with pytest.raises(InputError, match=r"No module named 'vllm'.*pip install posttrain\[vllm\].*vllm\.python=/path"):
        start(tmp_path / "model")


def test_a_vllm_that_cannot_be_imported_is_told(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(
        InputError, match=r"cannot be imported by .*operator torchvision::nms does not exist\. docs/vllm"
    ):
        start(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"python": "/nowhere/python"}, r"vllm\.python=/nowhere/python cannot be started: No such file"),
        ({"tensor_parallel_size": 2}, r"vllm\.tensor_parallel_size=2 needs vllm\.devices"),
        ({"devices": [4, 5, 6], "tensor_parallel_size": 2, "local_rank": 1}, r"process 1 .* needs 2 .* 4 up to it"),
        ({"end_ids": []}, "no answer would end"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, options, said):
    local_rank = options.pop("local_rank", 0)
    with pytest.raises(InputError, match=said):
        if local_rank:
            vllm._devices(VLLMOptions(**options), HERE, local_rank)
        start(tmp_path / "model", **options)


def test_each_process_has_its_share_of_the_devices(monkeypatch):
    options = VLLMOptions(devices=[4, 5, 6, 7], tensor_parallel_size=2)
    assert [vllm._devices(options, HERE, rank) for rank in (0, 1)] == ["4,5", "6,7"]


# ---- vLLM itself

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256,
}  # fmt: skip
# one is longer than a block of tokens, so that vLLM keeps what it computed for it
PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 30, [12, 13, 14], [n % 90 + 4 for n in range(150)]]


def vllm_python() -> str:
    found = os.environ.get("POSTTRAIN_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
    if not found:
        pytest.skip("needs vLLM: it is not installed here, and POSTTRAIN_VLLM_PYTHON names no interpreter that has it")
    return found


def lm_of(config) -> torch.nn.Module:
    """With weights larger than usual, so that mistakes show."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.dim() >= 2:
                weight.mul_(4)
    return lm.eval()


def check_against(lm, completions, temperature: float = 1.0, greedy: bool = False) -> None:
    """Log-probabilities are those of transformers' forward pass; measured: 3e-6 at most."""
    for completion in completions:
        segment, start = completion.segments[0], len(completion.prompt_ids_T)
        ids_T = torch.tensor(np.concatenate([completion.prompt_ids_T, segment.ids_T]).astype(np.int64))
        with torch.no_grad():
            logprobs_TV = (lm(ids_T[None]).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
        if greedy:
            assert logprobs_TV.argmax(-1).tolist() == segment.ids_T.tolist()
        expected_T = logprobs_TV.gather(1, ids_T[start:, None])[:, 0]
        assert torch.allclose(torch.from_numpy(segment.logprobs_T), expected_T, rtol=0, atol=5e-5)


def ids(completions) -> list[list[int]]:
    return [completion.segments[0].ids_T.tolist() for completion in completions]


@pytest.mark.slow
def test_vllm_answers_as_transformers_with_the_weights_that_it_took_last(tmp_path):
    """A tied model, whose output layer vLLM would pack on CPU, and a chunk for nearly every tensor."""
    python, lm = vllm_python(), lm_of(Qwen2Config(**SHAPE, tie_word_embeddings=True))
    write_model_folder(lm, tmp_path / "qwen2")
    rollout = start(tmp_path / "qwen2", python=python, gpu_memory_utilization=0.05, max_model_len=200)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm, "CHUNK_BYTES", 20_000)
            rollout.take(lm.state_dict().items())  # names a tied weight twice
        first = rollout.generate(requests(PROMPTS), Sampling())
        check_against(lm, first, greedy=True)
        with torch.no_grad():  # a training step
            for weight in lm.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        rollout.take(lm.named_parameters())  # names it once
        second = rollout.generate(requests(PROMPTS), Sampling())
        assert ids(second) != ids(first)
        check_against(lm, second, greedy=True)
        check_against(lm, rollout.generate(requests(PROMPTS), Sampling(0.7, top_p=0.8, top_k=20)), 0.7)
        check_against(lm, rollout.generate(requests(PROMPTS), Sampling(1.5)), 1.5)
        with pytest.raises(
            RunError, match=r"RuntimeError: 1 weights of vLLM's model did not come, such as model\.norm"
        ):
            rollout.take((name, weight) for name, weight in lm.state_dict().items() if name != "model.norm.weight")
    finally:
        rollout.close()


@pytest.mark.slow
def test_vllm_answers_with_an_adapter_and_draws_by_the_requests_key(tmp_path):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    python, lm = vllm_python(), lm_of(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    write_model_folder(lm, tmp_path / "llama")
    rollout = start(tmp_path / "llama", lora_rank=4, python=python, gpu_memory_utilization=0.05, max_model_len=200)
    try:
        rollout.take(lm.state_dict().items())
        plain = rollout.generate(requests(PROMPTS), Sampling())
        check_against(lm, plain, greedy=True)

        drawn = rollout.generate(requests(PROMPTS, 40), Sampling(1.0))
        alone = [rollout.generate([request], Sampling(1.0))[0] for request in requests(PROMPTS, 40)]
        assert ids(drawn) == ids(alone)
        many = rollout.generate(requests(PROMPTS * 30, 40), Sampling(1.0))  # more than are written at the same time
        assert ids(many)[: len(PROMPTS)] == ids(drawn)
        assert len({tuple(answer) for answer in ids(many)[:: len(PROMPTS)]}) > 20
        assert ids(rollout.generate(requests(PROMPTS, 40, first_position=1), Sampling(1.0))) != ids(drawn)
        check_against(lm, drawn)

        adapted = get_peft_model(lm, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        config = adapted.peft_config["default"].to_dict()
        previous = plain
        for step in range(2):  # the second adapter replaces the first
            torch.manual_seed(step)
            with torch.no_grad():
                for name, weight in adapted.named_parameters():
                    if "lora_" in name:
                        weight.normal_(std=0.2)
            rollout.take_adapter(get_peft_model_state_dict(adapted).items(), config)
            answers = rollout.generate(requests(PROMPTS), Sampling())
            assert ids(answers) != ids(previous)
            check_against(adapted, answers, greedy=True)
            previous = answers
        with adapted.disable_adapter():
            rollout.take((n.replace(".base_layer", ""), w) for n, w in lm.state_dict().items() if "lora_" not in n)
            assert ids(rollout.generate(requests(PROMPTS), Sampling())) == ids(plain)
        with pytest.raises(ZeroDivisionError):
            rollout.take((name, weight / (1 // (n < 3))) for n, (name, weight) in enumerate(lm.named_parameters()))
        with pytest.raises(RunError, match=r"weights came only in part the last time"):
            rollout.take(lm.named_parameters())
    finally:
        rollout.close()
