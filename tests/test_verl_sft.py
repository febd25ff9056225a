"""Commands as verl's users and readers of tutorials write them: what their options become, and that they run."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forked
from conftest import records
from posttrain.config.compose import Resolved, compose
from posttrain.config.describe import is_free, options
from posttrain.config.dialects.tables import row_of, tables_of
from posttrain.errors import InputError

NAMES = Path(__file__).with_name("verl_sft_options.txt")
OLD = "model.partial_pretrain=some/model data.train_files=train.parquet data.val_files=test.parquet"
NEW = "engine=fsdp model.path=some/model data.train_files=train.parquet"
OURS = "model.path=some/model data.train_files=train.parquet"
QUOTES_LEFT_IN = shlex.quote("+data.response_dict_keys=\"['answer']\"")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def resolve(command: str) -> Resolved:
    return compose(shlex.split(command), "sft")


def value(resolved: Resolved, key: str) -> Any:
    found: Any = resolved.config.model_dump(mode="json")
    for part in key.split("."):
        found = found[part]
    return found


def refusal(command: str) -> str:
    with pytest.raises(InputError) as refused:
        resolve(command)
    return str(refused.value)


def test_no_option_that_verl_ever_had_is_missing():
    tables = tables_of("sft")
    free = tuple(f"{option}." for option in options() if is_free(option))
    names = NAMES.read_text().split()
    assert len(names) > 350
    missing = [name for name in names if not (name in options() or name.startswith(free) or row_of(tables, name))]
    assert missing == []


# a command, and some of what it becomes
COMMANDS: list[tuple[str, dict[str, Any]]] = [
    # the older trainer
    (f"{OLD} data.prompt_key=question data.response_key=answer", {"model.path": "some/model", "data.prompt_key": "question"}),
    (
        f"{OLD} data.prompt_key=extra_info data.response_key=extra_info +data.prompt_dict_keys=['question'] "
        "+data.response_dict_keys=['answer']",
        {"data.prompt_key": "extra_info.question", "data.response_key": "extra_info.answer"},
    ),
    (
        f"{OLD} data.prompt_key=extra_info data.response_key=extra_info "
        f"++data.prompt_dict_keys=\"['question']\" {QUOTES_LEFT_IN}",
        {"data.prompt_key": "extra_info.question", "data.response_key": "extra_info.answer"},
    ),
    (
        f"{OLD} data.prompt_key=extra_info data.response_key=reward_model +data.prompt_dict_keys=question "
        "+data.response_dict_keys=[ground_truth]",
        {"data.prompt_key": "extra_info.question", "data.response_key": "reward_model.ground_truth"},
    ),
    (
        f"{OLD} data.prompt_key=prompt data.prompt_dict_keys=[content] data.response_key=response data.response_dict_keys=null",
        {"data.prompt_key": "prompt", "data.response_key": "response"},
    ),
    (
        f"{OLD} data.multiturn.enable=true data.multiturn.messages_key=turns data.multiturn.tools_key=tools "
        "data.multiturn.enable_thinking_key=enable_thinking",
        {"data.messages_key": "turns", "data.tools_key": None},
    ),
    (f"{OLD} data.multiturn.enable=True data.multiturn.tools_key=functions", {"data.messages_key": "messages", "data.tools_key": "functions"}),
    (f"{OLD} data.multiturn.enable=False data.multiturn.messages_key=turns", {"data.messages_key": None, "data.prompt_key": "question"}),
    (f"{OLD} data.micro_batch_size=32 trainer.n_gpus_per_node=8 ulysses_sequence_parallel_size=2", {"data.micro_batch_size_per_gpu": 8}),
    (f"{OLD} data.micro_batch_size=4 trainer.n_gpus_per_node=8 trainer.nnodes=2", {"data.micro_batch_size_per_gpu": 1}),
    (f"{OLD} data.micro_batch_size=32 data.micro_batch_size_per_gpu=2", {"data.micro_batch_size_per_gpu": 2}),
    (
        f"{OLD} ulysses_sequence_parallel_size=4 use_remove_padding=true model.use_liger=True trainer.n_gpus_per_node=4",
        {"engine.ulysses_sequence_parallel_size": 4, "model.use_liger": True},
    ),
    (f"{OLD} model.fsdp_config.cpu_offload=true model.fsdp_config.offload_params=true", {"engine.param_offload": True}),
    (f"{OLD} model.fsdp_config.cpu_offload=true model.fsdp_config.offload_params=false", {"engine.param_offload": False}),
    (f"{OLD} model.fsdp_config.cpu_offload=false model.fsdp_config.offload_params=true", {"engine.param_offload": False}),
    (
        f"{OLD} model.fsdp_config.model_dtype=bf16 +model.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap=[Block] "
        "model.fsdp_config.wrap_policy.min_num_params=0",
        {"model.weights_dtype": "bfloat16"},
    ),
    (f"{OLD} model.lora_rank=32 model.lora_alpha=16 model.target_modules=all-linear", {"model.lora_rank": 32, "model.target_modules": ["all-linear"]}),
    (f"{OLD} model.lora_rank=8 \"model.target_modules=['q_proj','v_proj']\"", {"model.target_modules": ["q_proj", "v_proj"]}),
    (f"{OLD} model.lora_rank=8 model.target_modules=[q_proj,v_proj] +model.lora_dropout=0.1", {"model.lora_dropout": 0.1}),
    (f"{OLD} optim.lr_scheduler=wsd optim.warmup_steps_ratio=0.2", {"optim.lr_scheduler_type": "wsd", "optim.lr_warmup_steps_ratio": 0.2}),
    (f"{OLD} +optim.lr_warmup_steps=20", {"optim.lr_warmup_steps": 20, "optim.lr_warmup_steps_ratio": None}),
    (f"{OLD} optim.betas=\"[0.9,0.98]\" optim.clip_grad=0.5 optim.weight_decay=0.1", {"optim.betas": [0.9, 0.98], "optim.clip_grad": 0.5}),
    (f"{OLD} trainer.total_epochs=2 trainer.total_epochs=3", {"trainer.total_epochs": 3}),
    (f"{OLD} trainer.default_hdfs_dir=null trainer.resume_from_path=null data.chat_template=null", {"trainer.default_hdfs_dir": None}),
    (f"{OLD} 'trainer.logger=[\"console\",\"wandb\"]'", {"trainer.logger": ["console", "wandb"]}),
    (f"{OLD} trainer.logger=['console','tracking','file']", {"trainer.logger": ["console", "wandb"]}),
    (f"{OLD} trainer.logger=console trainer.experiment_name=qwen-2.5-0.5b", {"trainer.logger": ["console"], "trainer.experiment_name": "qwen-2.5-0.5b"}),
    (f"{OLD} trainer.save_freq=after_each_epoch trainer.test_freq=after_each_epoch", {"trainer.save_freq": "1ep", "trainer.test_freq": "1ep"}),
    (f"{OLD} '\\ ' ' ' \\\\ trainer.save_contents=[model,hf_model] engine.fsdp_size=16 ", {"engine.fsdp_size": 16}),  # a backslash before a blank
    (f"{OLD} trainer.max_ckpt_to_keep=0", {"trainer.max_ckpt_to_keep": None}),
    (f"{OLD} trainer.checkpoint.save_contents=[model,optimizer,extra,hf_model] trainer.checkpoint.load_contents=[model,optimizer,extra]", {}),
    (f"{OLD} data.train_max_samples=-1 data.val_max_samples=100 trainer.device=cpu hydra.run.dir=/tmp/x", {"data.train_max_samples": None, "data.val_max_samples": 100}),
    (f"{OLD} trainer.default_local_dir='runs/${{trainer.project_name}}/a' trainer.project_name=p", {"trainer.default_local_dir": "runs/p/a"}),
    # the newer trainer
    (
        f"{NEW} optim=fsdp model@model=hf_model engine.strategy=fsdp2 data.messages_key=messages data.tools_key=tools "
        "engine.ulysses_sequence_parallel_size=2 trainer.n_gpus_per_node=2 model.use_remove_padding=true",
        {"engine.ulysses_sequence_parallel_size": 2, "data.messages_key": "messages"},
    ),
    (
        f"{NEW} data.use_dynamic_bsz=True data.max_token_len_per_gpu=2048 data.micro_batch_size_per_gpu=1",
        {"data.max_tokens_per_gpu": 2048, "data.micro_batch_size_per_gpu": None},
    ),
    (
        f"{NEW} data.use_dynamic_bsz=False data.max_token_len_per_gpu=2048",
        {"data.max_tokens_per_gpu": None, "data.micro_batch_size_per_gpu": 4},
    ),
    (f"{NEW} data.pad_mode=no_padding", {"data.truncation": "right"}),
    (f"{NEW} data.pad_mode=right", {"data.truncation": "error"}),
    (f"{NEW} data.pad_mode=no_padding data.truncation=left", {"data.truncation": "left"}),
    (f"{NEW} engine.fsdp_size=-1 engine.model_dtype=fp32 engine.dtype=bfloat16", {"engine.fsdp_size": None, "model.weights_dtype": "float32", "model.dtype": "bfloat16"}),
    (f"{NEW} engine.param_offload=true engine.optimizer_offload=true", {"engine.param_offload": True, "engine.optimizer_offload": True}),
    (f"{NEW} engine.param_offload=false engine.offload_policy=true engine.seed=7", {"engine.param_offload": True, "trainer.seed": 7}),
    (f"{NEW} engine.seed=7 trainer.seed=1", {"trainer.seed": 1}),
    (
        f"{NEW} optim.lr_scheduler_type=cosine optim.lr_warmup_steps=-1 optim.lr_warmup_steps_ratio=0.2 optim.min_lr_ratio=0.1",
        {"optim.lr_warmup_steps": None, "optim.lr_warmup_steps_ratio": 0.2, "optim.min_lr_ratio": 0.1},
    ),
    (f"{NEW} optim.lr_warmup_steps=10 optim.lr_warmup_steps_ratio=0.2", {"optim.lr_warmup_steps": 10, "optim.lr_warmup_steps_ratio": None}),
    (f"{NEW} optim.warmup_style=cosine optim.num_cycles=0.5 optim.optimizer=AdamW8bit optim.optimizer_impl=bitsandbytes.optim", {"optim.lr_scheduler_type": "cosine", "optim.optimizer": "adamw_8bit"}),
    (f"{NEW} optim.lr=1e-5 optim.min_lr=1e-6 +optim.override_optimizer_config.eps=1e-6", {"optim.min_lr_ratio": 0.1, "optim.eps": 1e-6}),
    (
        f"{NEW} data.train_max_samples=128 data.enable_thinking_key=enable_thinking ++data.ignore_input_ids_mismatch=true "
        "+data.apply_chat_template_kwargs.enable_thinking=false",
        {"data.train_max_samples": 128, "data.chat_template_kwargs": {"enable_thinking": False}},
    ),
    (f"{NEW} '+data.apply_chat_template_kwargs={{enable_thinking: false}}'", {"data.chat_template_kwargs": {"enable_thinking": False}}),
    (f"{NEW} data.apply_chat_template_kwargs={{}}", {"data.chat_template_kwargs": {}}),
    (f"{NEW} {shlex.quote('model.custom_chat_template=' + shlex.quote(TEMPLATE.replace(chr(39), chr(34))))}", {"data.chat_template": TEMPLATE.replace("'", '"')}),
    (f"{NEW} checkpoint.save_contents=[model] trainer.resume_mode=disable trainer.profile_interval=[-1,-1] profiler.enable=False", {"trainer.resume_mode": "disable"}),
    (f"{NEW} engine.tensor_model_parallel_size=1 engine.pipeline_model_parallel_size=1 engine.virtual_pipeline_model_parallel_size=null engine.use_mbridge=True", {}),
    (f"{NEW} +model.override_config.attn_implementation=eager +model.override_config.num_hidden_layers=2", {"model.override_config": {"num_hidden_layers": 2}}),
    # tutorials
    (
        f"{OURS} model.peft_config.enable=True model.peft_config.r=16 model.peft_config.alpha=32 "
        "model.peft_config.target_modules=['q_proj','v_proj'] model.peft_config.lora_dropout=0.05",
        {"model.lora_rank": 16, "model.lora_alpha": 32, "model.target_modules": ["q_proj", "v_proj"], "model.lora_dropout": 0.05},
    ),
    (f"{OURS} model.peft_config.enable=False model.peft_config.r=16", {"model.lora_rank": 0}),
    (f"{OURS} data.max_prompt_length=512 data.max_response_length=256", {"data.max_length": 768, "data.max_prompt_length": None}),
    (f"{OURS} data.max_prompt_length=512", {"data.max_prompt_length": 512, "data.max_length": 4096}),
    (
        f"{OURS} optim.warmup_steps=30 optim.lr_scheduler=linear trainer.max_grad_norm=0.3 model.strategy=fsdp data.num_workers=2",
        {"optim.lr_warmup_steps": 30, "optim.lr_scheduler_type": "linear", "optim.clip_grad": 0.3, "data.num_workers": 2},
    ),
    (f"{OURS} trainer.eval_freq=1 trainer.save_freq=2", {"trainer.test_freq": "1ep", "trainer.save_freq": "2ep"}),
    (f"{OURS} trainer.save_freq=-1 trainer.eval_freq=2", {"trainer.test_freq": "2ep", "trainer.save_freq": -1}),
    (f"{OURS} trainer.save_freq=100 trainer.test_freq=50", {"trainer.test_freq": 50, "trainer.save_freq": 100}),
    (f"{OURS} data.train_batch_size=8 trainer.gradient_accumulation_steps=4", {"data.train_batch_size": 32}),
    (f"{OURS} gradient_accumulation_steps=2", {"data.train_batch_size": 64}),
    (f"{OURS} gradient_accumulation_steps=2 trainer.gradient_accumulation_steps=2 data.train_batch_size=3", {"data.train_batch_size": 6}),
    (f"{OURS} trainer.mixed_precision=bf16", {"model.dtype": "bfloat16"}),
    (f"{OURS} trainer.mixed_precision=no", {"model.dtype": "float32"}),
    (
        f"{OURS} model.fsdp_config.param_offload=True model.fsdp_config.optimizer_offload=True "
        "model.fsdp_config.gradient_checkpointing=True",
        {"engine.param_offload": True, "engine.optimizer_offload": True, "model.enable_gradient_checkpointing": True},
    ),
    (f"{OURS} model.dropout=0.1", {"model.dropout": 0.1}),
    # images
    (
        f"{NEW} data.image_key=pictures data.video_key=videos data.image_patch_size=16",
        {"data.image_key": "pictures", "model.lora_vision": False},
    ),
    (f"{NEW} data.image_key=null model.lora_rank=8", {"data.image_key": None, "model.lora_vision": True}),
    (f"{NEW} model.lora_rank=8 model.exclude_modules='.*visual.*'", {"model.lora_vision": False}),
    (f"{NEW} model.lora_rank=8 model.exclude_modules='.*(vision_tower|multi_modal_projector).*'", {"model.lora_vision": False}),
    (f"{NEW} model.lora_rank=8 model.exclude_modules=[]", {"model.lora_vision": True}),
    (f"{NEW} model.exclude_modules=lm_head", {"model.lora_vision": False, "model.target_modules": ["all-linear"]}),
    (f"{OLD} model.lora_rank=8", {"model.lora_vision": False}),
    (
        f"{OURS} freeze_vision_tower=true freeze_multi_modal_projector=true freeze_language_model=false media_dir=photos "
        "image_max_pixels=262144 image_min_pixels=1024",
        {
            "model.freeze_vision_tower": True, "model.freeze_projector": True, "data.image_dir": "photos",
            "model.processor_kwargs": {"max_pixels": 262144, "min_pixels": 1024},
        },
    ),
    (f"{OURS} freeze_vit=true freeze_aligner=false data.max_pixels=602112", {"model.freeze_vision_tower": True, "model.freeze_projector": False}),
    (
        # verl's example of fine-tuning with images
        "engine=fsdp optim=fsdp optim.lr=2e-5 optim.lr_warmup_steps_ratio=0.01 optim.weight_decay=0.1 optim.betas=[0.9,0.95] "
        "optim.clip_grad=1.0 optim.min_lr_ratio=0.1 optim.warmup_style=cosine engine.ulysses_sequence_parallel_size=2 "
        "engine.strategy=fsdp2 engine.fsdp_size=-1 data.train_files=captions/train.parquet data.train_batch_size=96 "
        "data.max_length=2048 data.pad_mode=no_padding data.truncation=error data.use_dynamic_bsz=True "
        "data.max_token_len_per_gpu=65536 model.path=model/Qwen3-VL-2B-Instruct model.use_remove_padding=True "
        "trainer.test_freq=-1 trainer.save_freq=4000 trainer.logger=['console','wandb'] trainer.total_epochs=10 "
        "trainer.default_local_dir=runs/captions trainer.resume_mode=auto trainer.max_ckpt_to_keep=5 "
        "checkpoint.save_contents=[model,optimizer,extra] trainer.n_gpus_per_node=8",
        {"data.max_tokens_per_gpu": 65536, "engine.ulysses_sequence_parallel_size": 2, "optim.lr": 2e-5, "data.truncation": "error"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("command", "becomes"), COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_becomes_what_it_meant(command: str, becomes: dict[str, Any]):
    resolved = resolve(command)
    assert {key: value(resolved, key) for key in becomes} == becomes


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        (
            OLD,
            {
                "data.train_batch_size": 256, "data.max_length": 1024, "data.prompt_key": "question", "trainer.total_epochs": 4,
                "data.response_key": "answer", "optim.lr": 1e-5, "optim.betas": [0.9, 0.95], "optim.lr_warmup_steps_ratio": 0.1,
                "optim.lr_scheduler_type": "cosine", "trainer.test_freq": -1, "trainer.max_ckpt_to_keep": None,
                "trainer.default_local_dir": "checkpoints/gsm8k-sft/test", "data.truncation": "error",
            },
        ),
        (
            NEW,
            {
                "data.train_batch_size": 256, "data.max_length": 1024, "data.prompt_key": None, "trainer.total_epochs": 4,
                "optim.lr": 1e-3, "optim.betas": [0.9, 0.999], "optim.lr_warmup_steps_ratio": 0.0, "data.truncation": "right",
                "optim.lr_scheduler_type": "constant", "trainer.save_freq": -1, "trainer.max_ckpt_to_keep": None,
                "trainer.default_local_dir": "checkpoints/gsm8k-sft/test",
            },
        ),
        (f"{OURS} --config-name=sft_trainer_engine", {"optim.betas": [0.9, 0.999], "data.train_batch_size": 256}),
        (f"{OURS} --config-name=sft_trainer", {"optim.betas": [0.9, 0.95], "data.prompt_key": "question"}),
        (f"{OURS} trainer.max_grad_norm=1 ulysses_sequence_parallel_size=1", {"data.train_batch_size": 32, "trainer.total_epochs": 1, "optim.betas": [0.9, 0.95]}),
    ],
    ids=["fsdp_sft_trainer", "sft_trainer", "sft_trainer by name", "fsdp_sft_trainer by name", "neither"],
)  # fmt: skip
def test_the_defaults_of_each_release_line_hold_and_launch_is_left_alone(command: str, defaults: dict[str, Any]):
    resolved = resolve(command)
    assert {key: value(resolved, key) for key in defaults} == defaults
    assert value(resolved, "trainer.n_gpus_per_node") is None and value(resolved, "trainer.logger") == ["console"]


REFUSED = [
    (f"{NEW} engine=megatron", "engine=megatron (command line): posttrain shards with FSDP2 alone"),
    (f"{NEW} optim=megatron", "optim=megatron"),
    (f"{NEW} engine.tensor_model_parallel_size=2", "engine.tensor_model_parallel_size=2"),
    (f"{NEW} engine.pipeline_model_parallel_size=2", "engine.pipeline_model_parallel_size=2"),
    (f"{NEW} engine.context_parallel_size=2", "engine.ulysses_sequence_parallel_size"),
    (f"{NEW} engine.override_transformer_config.recompute_granularity=full", "model.enable_gradient_checkpointing"),
    (f"{NEW} engine.strategy=veomni", "engine.strategy=veomni"),
    (f"{NEW} engine.full_determinism=true", "engine.full_determinism=true"),
    (f"{NEW} optim.optimizer=Muon", "optim.optimizer: found 'Muon' (command line), expected adamw | adamw_8bit"),
    (f"{NEW} optim.optimizer_impl=apex.optim", "optim.optimizer_impl=apex.optim"),
    (f"{NEW} optim.num_cycles=2", "optim.num_cycles=2"),
    (f"{NEW} model.mtp.enable=true", "model.mtp.enable=true"),
    (f"{NEW} data.enable_thinking_key=think", "data.enable_thinking"),
    (f"{NEW} data.pad_mode=diagonal", "data.pad_mode=diagonal"),
    (f"{NEW} checkpoint.load_contents=[model]", "checkpoint.load_contents=['model']"),
    (f"{NEW} engine.dtype=float16", "float16"),
    (f"{NEW} model.lora_rank=8 model.exclude_modules=lm_head", "model.target_modules"),
    (f"{NEW} model.lora_rank=8 model.exclude_modules='.*vision_tower.*'", "together with its projector"),
    (f"{NEW} model.lora_rank=8 model.exclude_modules='*visual'", "no regular expression"),
    (f"{NEW} data.video_key=clips", "not from videos"),
    (f"{OURS} freeze_language_model=true", "freeze_language_model=true"),
    (f"{OLD} data.custom_cls.path=mine.py data.custom_cls.name=Mine", "data.custom_cls.path=mine.py"),
    (f"{OLD} model.external_lib=my.module", "model.external_lib=my.module"),
    (f"{OLD} model.strategy=deepspeed", "model.strategy=deepspeed"),
    (f"{OLD} data.prompt_key=[question,context]", "expected one column"),
    (f"{OLD} optim.lr_scheduler=polynomial", "polynomial"),
    (f"{OLD} data.micro_batchsize=4", "data.micro_batchsize (command line): there is no such option."),
    (f"{OURS} --config-name=ppo_trainer", "--config-name=ppo_trainer"),
    (f"{OURS} trainer.mixed_precision=fp16", "trainer.mixed_precision=fp16"),
    (f"{OURS} model.peft_config.enable=True", "model.peft_config.r"),
    (f"{OURS} model.peft_config.use_dora=True", "model.peft_config.use_dora=True"),
    (f"{OURS} data.max_response_length=256", "data.max_prompt_length"),
    (f"{OURS} trainer.gradient_accumulation_steps=2 gradient_accumulation_steps=4", "expected one of them"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(command: str, says: str):
    assert says in refusal(command)


def test_what_changes_nothing_is_told_with_its_reason():
    resolved = resolve(
        f"{OLD} use_remove_padding=True data.balance_dp_token=True model.use_shm=True model.fsdp_config.wrap_policy.min_num_params=0 "
        "trainer.checkpoint.save_contents=[model] data.multiturn.enable=False hydra.run.dir=out data.use_shm=null"
    )
    assert {note["key"] for note in resolved.ignored} >= {
        "use_remove_padding", "data.balance_dp_token", "model.use_shm", "model.fsdp_config.wrap_policy.min_num_params",
        "trainer.checkpoint.save_contents", "data.multiturn.enable", "hydra.run.dir", "data.use_shm",
    }  # fmt: skip
    assert all(note["reason"] for note in resolved.ignored)


def test_of_two_names_of_an_option_the_later_wins_and_alone_is_told():
    resolved = resolve(f"{OLD} optim.warmup_steps_ratio=0.2 model.path=another/model")
    assert value(resolved, "model.path") == "another/model"
    assert {told["given"] for told in resolved.translated} == {"optim.warmup_steps_ratio"}
    assert {"key": "model.partial_pretrain", "reason": "model.path is given after it"} in resolved.ignored
    assert value(resolve(f"model.path=another/model {OLD}"), "model.path") == "some/model"


def test_options_of_ours_say_nothing_of_translation():
    resolved = resolve(
        f"{OURS} data.prompt_key=prompt data.response_key=response data.train_batch_size=8 trainer.save_freq=10 "
        "data.truncation=drop data.micro_batch_size_per_gpu=2 optim.lr_warmup_steps=0 "
        "trainer.max_ckpt_to_keep=null engine.param_offload=true trainer.logger=[console,tensorboard]"
    )
    assert resolved.translated == [] and resolved.ignored == []
    assert (value(resolved, "optim.lr_warmup_steps"), value(resolved, "data.truncation")) == (0, "drop")


# --- and they run

SHORT = "trainer.total_training_steps=2 data.train_batch_size=4 trainer.logger=console trainer.val_before_train=false"
RUNS = [
    "model.partial_pretrain=MODEL data.prompt_key=question data.response_key=answer data.micro_batch_size_per_gpu=2",
    "model.partial_pretrain=MODEL data.prompt_key=extra_info data.response_key=extra_info +data.prompt_dict_keys=['question'] "
    "+data.response_dict_keys=\"['answer']\" optim.lr_scheduler=wsd",
    "model.partial_pretrain=MODEL data.prompt_key=prompt +data.prompt_dict_keys=[content] data.response_key=response "
    "data.micro_batch_size=4 optim.betas=[0.9,0.98]",
    "model.partial_pretrain=MODEL data.multiturn.enable=true data.multiturn.messages_key=messages "
    "data.multiturn.tools_key=tools use_remove_padding=true data.max_length=512 data.truncation=error",
    "model.partial_pretrain=MODEL model.lora_rank=4 model.lora_alpha=8 model.target_modules=all-linear model.strategy=fsdp "
    "model.fsdp_config.cpu_offload=true model.fsdp_config.offload_params=true",
    "model.partial_pretrain=MODEL model.fsdp_config.model_dtype=bf16 trainer.default_hdfs_dir=null "
    "trainer.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
    "model.path=MODEL engine=fsdp optim=fsdp engine.strategy=fsdp2 data.messages_key=messages data.use_dynamic_bsz=true "
    "data.max_token_len_per_gpu=1024 data.pad_mode=no_padding optim.lr=1e-4 optim.lr_warmup_steps_ratio=0.2",
    "model.path=MODEL engine=fsdp data.max_length=96 data.ignore_input_ids_mismatch=true optim.lr_scheduler_type=cosine "
    "optim.min_lr_ratio=0.1 checkpoint.save_contents=[model,optimizer,extra] trainer.test_freq=after_each_epoch",
    "model.path=MODEL model.peft_config.enable=true model.peft_config.r=4 model.peft_config.alpha=8 "
    "model.peft_config.target_modules=['q_proj','v_proj'] model.peft_config.lora_dropout=0.1",
    "model.path=MODEL data.max_prompt_length=256 data.max_response_length=256 optim.warmup_steps=1 optim.lr_scheduler=linear "
    "trainer.eval_freq=1 trainer.save_freq=1 trainer.max_grad_norm=0.5 trainer.gradient_accumulation_steps=2",
    "model.path=MODEL model.fsdp_config.gradient_checkpointing=true model.fsdp_config.optimizer_offload=true "
    "trainer.mixed_precision=bf16",
]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """What the commands name: train.parquet, with a row's question and answer in every form that verl's users have."""
    folder = tmp_path_factory.mktemp("verl")
    rows = pq.read_table(tiny / "train.parquet").slice(0, 12).to_pylist()
    rows = [{**row, "question": row["extra_info"]["question"], "answer": row["extra_info"]["answer"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def run_all(rank: int, size: int, folder: Path, commands: list[list[str]]) -> None:
    from posttrain import cli

    os.chdir(folder)
    for command in commands:
        sys.argv = ["posttrain", "sft", *command]
        try:
            cli.main()
        except SystemExit as end:
            if end.code not in (0, None):
                print(*command)
                raise


def test_commands_run(tiny, folder):
    forked.start_server()
    commands = [
        shlex.split(
            f"{command.replace('MODEL', str(tiny / 'model'))} data.train_files=train.parquet data.val_files=train.parquet "
            f"data.cache_dir={tiny / 'cache'} trainer.default_local_dir=run-{number} {SHORT}"
        )
        for number, command in enumerate(RUNS)
    ]
    group = forked.start(run_all, 1, folder, commands, said=folder / "said.txt")
    group.ends([0])
    for number, command in enumerate(RUNS):
        run = folder / f"run-{number}"
        state = json.loads((run / "run.json").read_text())
        assert (state["status"], state["step"]) == ("finished", 2), command
        assert [record["step"] for record in records(run)] == [1, 2], command
        assert json.loads((run / "data_report.json").read_text())["rows_used"] == 12, command
    said = group.output()
    assert "model.partial_pretrain -> model.path=" in said and "verl's default" in said
