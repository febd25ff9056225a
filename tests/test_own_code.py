"""Models that bring their own code."""

import json
import shutil

import forked

CODE = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.drop_paths = [x.item() for x in torch.linspace(0, 0.1, 3)]  # which torch's meta device cannot do
"""


def test_a_model_whose_code_needs_values_to_be_made_trains_and_its_memory_is_told_when_it_is_there(tiny, tmp_path):
    forked.start_server()
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    (model / "modeling_own.py").write_text(CODE)
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    options = [
        f"data.train_files={tiny / 'train.parquet'}", f"data.cache_dir={tiny / 'cache'}", f"model.path={model}",
        f"trainer.default_local_dir={tmp_path / 'run'}", "data.train_batch_size=16", "trainer.total_training_steps=2",
        "model.trust_remote_code=true", "optim.lr=0.5",
    ]  # fmt: skip
    said = forked.run(["sft", *options], tmp_path)
    assert said.count("memory: 852,992 weights, all trained") == 1
    assert "model with 0.853M weights" in said and "finished after 2 steps" in said
