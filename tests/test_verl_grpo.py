"""verl's RL commands with another module name: what becomes of every option, and runs of a few."""

import json
import shlex
from pathlib import Path

import pytest

import forked
from conftest import records
from posttrain.config.compose import Resolved, compose
from posttrain.config.describe import options
from posttrain.config.dialects.tables import read_table
from posttrain.errors import InputError

# every option that main_ppo has had from v0.1 to January 2026, in its files and in commands published with it
NAMES = Path(__file__).with_name("verl_grpo_names.txt").read_text().split()
BASE = (
    "algorithm.adv_estimator=grpo data.train_files=gsm8k/train.parquet data.val_files=gsm8k/test.parquet "
    "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=5 "
)
GEO3K = (  # what verl's scripts with images have in common
    "data.train_batch_size=512 data.max_prompt_length=1024 data.max_response_length=2048 data.filter_overlong_prompts=True "
    "data.truncation='error' data.image_key=images actor_rollout_ref.model.use_fused_kernels=True "
    "actor_rollout_ref.actor.ppo_mini_batch_size=128 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=10 "
    "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.01 "
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.disable_mm_preprocessor_cache=True actor_rollout_ref.actor.use_torch_compile=False "
    "--config-path=./config --config-name=ppo_trainer.yaml actor_rollout_ref.rollout.enforce_eager=True trainer.use_legacy_worker_impl=disable trainer.device=npu"
)
# by what it is for: further arguments, and what posttrain makes of them
COMMANDS = {
    "nothing but what must be": (
        "",
        {
            "model.path": "Qwen/Qwen2.5-0.5B-Instruct", "data.train_batch_size": 1024, "data.max_prompt_length": 512,
            "rollout.max_new_tokens": 512, "algorithm.ppo_mini_batch_size": 256, "optim.lr": 1e-6, "optim.weight_decay": 0.01,
            "optim.betas": (0.9, 0.999), "optim.lr_scheduler_type": "constant", "optim.lr_warmup_steps_ratio": 0.0,
            "algorithm.dual_clip": 3.0, "algorithm.clip_ratio_high": 0.2, "algorithm.kl_coef": 0.0, "algorithm.entropy_coef": 0.0,
            "algorithm.rollout_is_cap": None, "algorithm.loss_agg_mode": "token-mean", "rollout.n": 5, "rollout.val_temperature": 0.0,
            "reward.name": ["data_source"], "trainer.total_epochs": 30, "trainer.test_freq": -1, "trainer.save_freq": -1,
            "trainer.default_local_dir": "checkpoints/verl_examples/gsm8k", "data.truncation": "error", "trainer.seed": 42,
        },
    ),
    "full fine-tuning of a script": (
        "data.train_batch_size=512 data.val_batch_size=1312 data.filter_overlong_prompts=True data.truncation='error' "
        "actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 "
        "actor_rollout_ref.model.enable_gradient_checkpointing=True trainer.critic_warmup=0 trainer.logger=\"['console','wandb']\" "
        "trainer.project_name=maths trainer.experiment_name=small trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.test_freq=5 "
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.6 critic.optim.lr=1e-5 ray_init.num_cpus=8",
        {
            "data.train_batch_size": 512, "data.truncation": "drop", "data.micro_batch_size_per_gpu": 16, "trainer.test_freq": 5,
            "model.enable_gradient_checkpointing": True, "trainer.logger": ["console", "wandb"], "trainer.n_gpus_per_node": 8,
            "trainer.default_local_dir": "checkpoints/maths/small", "vllm.gpu_memory_utilization": 0.6,
        },
    ),
    "LoRA": (
        "actor_rollout_ref.model.lora_rank=32 actor_rollout_ref.model.lora_alpha=64 actor_rollout_ref.model.target_modules=all-linear "
        "actor_rollout_ref.rollout.load_format=safetensors actor_rollout_ref.rollout.layered_summon=True data.shuffle=False "
        "actor_rollout_ref.actor.optim.lr=3e-5",
        {"model.lora_rank": 32, "model.lora_alpha": 64, "model.target_modules": ["all-linear"], "optim.lr": 3e-5, "data.shuffle": False},
    ),
    "some layers": ("actor_rollout_ref.model.lora_rank=8 actor_rollout_ref.model.target_modules=[q_proj,v_proj]", {"model.target_modules": ["q_proj", "v_proj"]}),
    "divergence in the loss": (
        "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type=low_var_kl algorithm.kl_ctrl.kl_coef=0.3",
        {"algorithm.kl_coef": 0.001, "algorithm.kl_in": "loss", "algorithm.kl_type": "k3"},
    ),
    "its gradient straight through": (
        "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.1 actor_rollout_ref.actor.kl_loss_type=k3+",
        {"algorithm.kl_coef": 0.1, "algorithm.kl_type": "k2"},
    ),
    "divergence off the reward": (
        "algorithm.use_kl_in_reward=True algorithm.kl_penalty=abs algorithm.kl_ctrl.kl_coef=0.02 algorithm.kl_ctrl.type=fixed",
        {"algorithm.kl_coef": 0.02, "algorithm.kl_in": "reward", "algorithm.kl_type": "abs"},
    ),
    "divergence off the reward, as before v0.3": (
        "algorithm.kl_ctrl.kl_coef=0.02 actor_rollout_ref.actor.use_kl_loss=False",
        {"algorithm.kl_coef": 0.02, "algorithm.kl_in": "reward", "algorithm.kl_type": "k1"},
    ),
    "no divergence": ("algorithm.use_kl_in_reward=False algorithm.kl_ctrl.kl_coef=0.02", {"algorithm.kl_coef": 0.0}),
    "DAPO, older": (
        "data.gen_batch_size=1536 data.train_batch_size=512 actor_rollout_ref.actor.ppo_mini_batch_size=32 data.truncation=left "
        "algorithm.filter_groups.enable=True algorithm.filter_groups.metric=acc algorithm.filter_groups.max_num_gen_batches=10 "
        "actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.clip_ratio_c=10.0 "
        "data.max_response_length=20480 reward_model.reward_manager=dapo reward_model.overlong_buffer.enable=True "
        "reward_model.overlong_buffer.len=4096 reward_model.overlong_buffer.penalty_factor=1.0 "
        "actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=22528 "
        "actor_rollout_ref.actor.optim.lr_warmup_steps=10 actor_rollout_ref.actor.optim.weight_decay=0.1 "
        "actor_rollout_ref.rollout.top_k=-1 actor_rollout_ref.rollout.val_kwargs.temperature=1.0 "
        "actor_rollout_ref.rollout.val_kwargs.top_p=0.7 actor_rollout_ref.rollout.val_kwargs.do_sample=True",
        {
            "data.train_batch_size": 512, "algorithm.max_num_gen_batches": 30, "algorithm.filter_groups": True,
            "algorithm.filter_metric": "right", "algorithm.dual_clip": 10.0, "algorithm.clip_ratio_high": 0.28, "data.truncation": "left",
            "algorithm.overlong_buffer_tokens": 4096, "algorithm.overlong_penalty": 1.0, "data.max_tokens_per_gpu": 22528,
            "optim.lr_warmup_steps": 160, "optim.weight_decay": 0.1, "rollout.top_k": 0, "rollout.val_temperature": 1.0,
            "rollout.val_top_p": 0.7, "rollout.val_top_k": 0,
        },
    ),
    "DAPO, newer, filtering nothing": (
        "data.gen_batch_size=64 data.train_batch_size=64 reward_model.reward_manager=dapo +reward_model.reward_kwargs.max_resp_len=512 "
        "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True +reward_model.reward_kwargs.overlong_buffer_cfg.len=128 "
        "+reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor=0.5 +reward_model.reward_kwargs.overlong_buffer_cfg.log=False",
        {"data.train_batch_size": 64, "algorithm.ppo_mini_batch_size": 64, "algorithm.overlong_buffer_tokens": 128, "algorithm.overlong_penalty": 0.5},
    ),
    "GSPO": (
        "actor_rollout_ref.actor.policy_loss.loss_mode=gspo actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum "
        "actor_rollout_ref.actor.clip_ratio_low=0.0003 actor_rollout_ref.actor.clip_ratio_high=0.0004",
        {"algorithm.policy_loss": "gspo", "algorithm.loss_agg_mode": "seq-mean-token-mean", "algorithm.dual_clip": None, "algorithm.clip_ratio_high": 4e-4},
    ),
    "CISPO": ("actor_rollout_ref.actor.policy_loss.loss_mode=cispo actor_rollout_ref.actor.clip_ratio_low=10", {"algorithm.policy_loss": "cispo", "algorithm.clip_ratio_low": 10}),
    "Dr. GRPO": (
        "algorithm.norm_adv_by_std_in_grpo=False actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm",
        {"algorithm.adv_estimator": "dr_grpo", "algorithm.loss_agg_mode": "constant-length"},
    ),
    "RLOO": ("algorithm.adv_estimator=rloo actor_rollout_ref.actor.entropy_coeff=0.001", {"algorithm.adv_estimator": "rloo", "algorithm.entropy_coef": 0.001}),
    "one bound for both sides": ("actor_rollout_ref.actor.clip_ratio=0.3", {"algorithm.clip_ratio_low": 0.3, "algorithm.clip_ratio_high": 0.3}),
    "offloading": (
        "actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True "
        "actor_rollout_ref.ref.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.fsdp_size=-1",
        {"engine.param_offload": True, "engine.optimizer_offload": True, "engine.reference_offload": True, "engine.fsdp_size": None},
    ),
    "offloading by FSDP2": (
        "actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.offload_policy=True",
        {"engine.param_offload": True, "engine.optimizer_offload": True},
    ),
    "rows shared by two": ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", {"engine.ulysses_sequence_parallel_size": 2}),
    "one's own reward": (
        "custom_reward_function.path=rewards.py custom_reward_function.name=mine +custom_reward_function.reward_kwargs.bonus=0.5",
        {"reward.path": "rewards.py", "reward.name": ["mine"], "reward.kwargs": {"bonus": 0.5}},
    ),
    "one's own reward, by verl's name": ("custom_reward_function.path=rewards.py", {"reward.name": ["compute_score"]}),
    "truncated importance weights, v0.5": ("+actor_rollout_ref.actor.tis_imp_ratio_cap=3", {"algorithm.rollout_is_cap": 3}),
    "truncated importance weights, v0.6": ("algorithm.rollout_is=True algorithm.rollout_is_threshold=4.0", {"algorithm.rollout_is_cap": 4.0}),
    "truncated importance weights, later": ("algorithm.rollout_correction.rollout_is=token", {"algorithm.rollout_is_cap": 2.0}),
    "a template's arguments": ("+data.apply_chat_template_kwargs.enable_thinking=False", {"data.chat_template_kwargs": {"enable_thinking": False}}),
    "fields of the model": ("++actor_rollout_ref.model.override_config.max_position_embeddings=32768", {"model.override_config": {"max_position_embeddings": 32768}}),
    "no adapters": ("actor_rollout_ref.model.lora_rank=0 actor_rollout_ref.model.lora_alpha=0 trainer.test_freq=False", {"model.lora_alpha": 16, "trainer.test_freq": -1}),
    "a path that the mode does not ask for": ("trainer.resume_from_path=checkpoints/", {"trainer.resume_from_path": None}),
    "a path that it asks for": ("trainer.resume_from_path=a/b trainer.resume_mode=resume_path", {"trainer.resume_from_path": "a/b"}),
    "a seed, and all rows": ("data.seed=7 data.train_max_samples=-1", {"trainer.seed": 7}),
    "cosine, two names": (
        "actor_rollout_ref.actor.optim.warmup_style=cosine actor_rollout_ref.actor.optim.lr_warmup_steps=-1 "
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.1 actor_rollout_ref.actor.optim.min_lr_ratio=0.1",
        {"optim.lr_scheduler_type": "cosine", "optim.lr_warmup_steps_ratio": 0.1, "optim.lr_warmup_steps": None, "optim.min_lr_ratio": 0.1},
    ),
    "what is off anyway": (
        "reward_model.enable=False actor_rollout_ref.rollout.multi_turn.enable=False actor_rollout_ref.rollout.mode=async "
        "data.custom_cls.path=null algorithm.rollout_correction.rollout_rs=null transfer_queue.enable=True "
        "actor_rollout_ref.rollout.multi_turn.tool_config_path=null global_profiler.tool=null trainer.logger=[\\'console\\',file]",
        {"trainer.logger": ["console"]},
    ),
    "problems with figures": (
        f"{GEO3K} +actor_rollout_ref.rollout.engine_kwargs.vllm.limit_mm_per_prompt.image=2 data.return_multi_modal_inputs=True",
        {
            "data.image_key": "images", "data.train_batch_size": 512, "data.max_prompt_length": 1024, "data.truncation": "drop",
            "rollout.max_new_tokens": 2048, "algorithm.kl_coef": 0.01, "algorithm.kl_in": "loss", "reward.name": ["data_source"],
            "model.freeze_vision_tower": False, "algorithm.ppo_mini_batch_size": 128,
        },
    ),
    "problems with figures, the tower frozen": (
        f"{GEO3K} actor_rollout_ref.actor.freeze_vision_tower=True",
        {"model.freeze_vision_tower": True, "model.freeze_projector": True},
    ),
    "problems with figures, adapters in the language model": (
        f"{GEO3K} actor_rollout_ref.model.lora_rank=64 actor_rollout_ref.model.lora_alpha=32 "
        "actor_rollout_ref.model.target_modules=all-linear actor_rollout_ref.model.exclude_modules='.*visual.*'",
        {"model.lora_rank": 64, "model.lora_vision": False, "data.image_key": "images"},
    ),
    "problems with figures, adapters everywhere": (
        f"{GEO3K} actor_rollout_ref.model.lora_rank=64", {"model.lora_vision": True, "model.freeze_vision_tower": False},
    ),
    "our names over verl's": (
        "optim.lr_warmup_steps=3 rollout.n=4 algorithm.clip_ratio_high=0.4 trainer.num_val_generations=50 reward.name=math",
        {"optim.lr_warmup_steps": 3, "optim.lr_warmup_steps_ratio": None, "rollout.n": 4, "algorithm.clip_ratio_high": 0.4,
         "trainer.num_val_generations": 50, "reward.name": ["math"]},
    ),
}  # fmt: skip
# arguments -> what the error must name
REFUSED = {
    "algorithm.adv_estimator=gae": "needs a critic",
    "algorithm.adv_estimator=grpo_passk": "grpo_passk: posttrain has dr_grpo, grpo, rloo",
    "algorithm.adv_estimator=remax": "remax",
    "algorithm.adv_estimator=reinforce_plus_plus": "reinforce_plus_plus",
    "actor_rollout_ref.rollout.n=1": "actor_rollout_ref.rollout.n=1",
    "actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov": "loss_mode=clip_cov",
    "actor_rollout_ref.actor.use_kl_loss=True algorithm.use_kl_in_reward=True": "not in both",
    "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type=full": "kl_loss_type=full",
    "algorithm.kl_ctrl.type=adaptive": "does not adapt",
    "algorithm.rollout_correction.rollout_is=sequence": "rollout_is=sequence",
    "algorithm.rollout_correction.bypass_mode=True": "bypass_mode=True",
    "actor_rollout_ref.actor.strategy=megatron": "FSDP2 alone",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2": "not with Megatron",
    "actor_rollout_ref.actor.optim.optimizer=SGD": "found 'SGD' (command line), expected adamw | adamw_8bit",
    "reward_model.enable=True": "not models",
    "reward_model.reward_manager=batch": "judged by itself",
    "reward_model.sandbox_fusion.url=http://x": "no code of answers",
    "data.video_key=clips": "not from videos",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.mm_processor_kwargs.max_pixels=9": "model.processor_kwargs sets both",
    "actor_rollout_ref.model.lora_rank=8 actor_rollout_ref.model.exclude_modules=[lm_head]": "actor_rollout_ref.model.exclude_modules=",
    "data.custom_cls.path=mine.py": "data prepare",
    "data.truncation=middle": "cut at one end",
    "actor_rollout_ref.rollout.multi_turn.enable=True": "docs/tools.md",
    "actor_rollout_ref.rollout.multi_turn.tool_config_path=tools.yaml": "tools.functions=",
    "actor_rollout_ref.rollout.name=other": "expected vllm, sglang",
    "actor_rollout_ref.rollout.quantization=fp8": "weights that are trained",
    "trainer.critic_warmup=5": "no critic",
    "trainer.val_only=True": "posttrain evaluate",
    "--config-name=ppo_megatron_trainer": "ppo_trainer alone is known",
    "reward_model.overlong_buffer.enable=True reward_model.overlong_buffer.len=8 +reward_model.reward_kwargs.max_resp_len=64": "max_resp_len=64",
    "actor_rollout_ref.actor.clip_ratios=0.2": "Nearest: actor_rollout_ref.actor.clip_ratio",
    "actor_rollout_ref.rollout.temprature=1": "rollout.temperature",
}  # fmt: skip


def read(arguments: str) -> Resolved:
    return compose(shlex.split(BASE + arguments), "grpo")


def value(resolved: Resolved, key: str):
    section, option = key.split(".")
    return getattr(getattr(resolved.config, section), option)


@pytest.mark.parametrize("what", COMMANDS)
def test_a_command_becomes_the_options_that_mean_the_same(what):
    arguments, expected = COMMANDS[what]
    resolved = read(arguments)
    assert {key: value(resolved, key) for key in expected} == expected


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(arguments):
    with pytest.raises(InputError) as error:
        read(arguments)
    assert REFUSED[arguments] in str(error.value)
    assert len(str(error.value).splitlines()) == 1, error.value


def test_every_option_that_verl_has_had_is_known():
    table = read_table("verl_grpo")
    assert len(NAMES) > 900
    assert [name for name in NAMES if table.row(name) is None and name not in options()] == []


def test_without_verls_own_names_no_default_of_verl_holds():
    ours = compose(["algorithm.adv_estimator=grpo", "data.train_batch_size=8", "trainer.logger=console"], "grpo")
    assert not [key for key, origin in ours.origins.items() if origin == "verl's default"]
    assert ours.config.reward.names == ["gsm8k_strict"] and ours.config.algorithm.ppo_mini_batch_size is None


def test_an_estimator_must_be_chosen():
    with pytest.raises(InputError, match="gae, which is verl's default"):
        compose(["actor_rollout_ref.model.path=m", "actor_rollout_ref.rollout.n=5"], "grpo")


def test_any_engine_is_vllm_where_that_is_installed(tmp_path, monkeypatch):
    assert {
        value(read(f"actor_rollout_ref.rollout.name={name}"), "rollout.name") for name in ("vllm", "sglang", "hf")
    } == {"transformers"}
    assert value(read("vllm.python=/opt/vllm/bin/python"), "rollout.name") == "vllm"
    (tmp_path / "vllm.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = [value(read(f"actor_rollout_ref.rollout.name={name}"), "rollout.name") for name in ("vllm", "hf")]
    assert found == ["vllm", "transformers"]


def test_what_has_no_effect_is_said_with_its_reason():
    told = read(
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2 critic.model.path=other trainer.balance_batch=True"
    ).ignored
    reasons = {note["key"]: note["reason"] for note in told}
    assert "vllm.devices" in reasons["actor_rollout_ref.rollout.tensor_model_parallel_size"]
    assert {"critic.model.path", "trainer.balance_batch"} <= reasons.keys()


REWARD = """
def judge(data_source, solution_str, ground_truth, extra_info, bonus):
    return {"score": bonus + sum(c.isdigit() for c in solution_str) / max(len(solution_str), 1), "acc": len(solution_str) % 2}
"""
SHORT = (
    "algorithm.adv_estimator=grpo data.train_batch_size=8 actor_rollout_ref.actor.ppo_mini_batch_size=4 data.max_response_length=12 "
    "actor_rollout_ref.rollout.n=4 actor_rollout_ref.rollout.name=vllm trainer.total_training_steps=2 trainer.logger=['console'] "
)
RUNS = {
    "full": (1, "actor_rollout_ref.actor.use_kl_loss=True trainer.test_freq=1 trainer.num_val_generations=8 +custom_reward_function.reward_kwargs.bonus=1"),
    "lora": (1, "actor_rollout_ref.model.lora_rank=4 algorithm.use_kl_in_reward=True algorithm.norm_adv_by_std_in_grpo=False "
                "custom_reward_function.path=null trainer.val_before_train=False"),
    "dapo": (1, "algorithm.filter_groups.enable=True algorithm.filter_groups.metric=acc actor_rollout_ref.actor.clip_ratio_high=0.28 "
                "reward_model.overlong_buffer.enable=True reward_model.overlong_buffer.len=4 trainer.val_before_train=False "
                "+custom_reward_function.reward_kwargs={bonus:1}"),
    "gspo on two": (2, "actor_rollout_ref.actor.policy_loss.loss_mode=gspo actor_rollout_ref.actor.ulysses_sequence_parallel_size=2 "
                       "trainer.val_before_train=False +custom_reward_function.reward_kwargs.bonus=1 trainer.n_gpus_per_node=2"),
}  # fmt: skip


def test_commands_run(tiny, tmp_path):
    forked.start_server()
    (tmp_path / "reward.py").write_text(REWARD)
    where = (
        f"actor_rollout_ref.model.path={tiny / 'model'} data.train_files={tiny / 'train.parquet'} data.val_files={tiny / 'test.parquet'} "
        f"custom_reward_function.path={tmp_path / 'reward.py'} custom_reward_function.name=judge trainer.project_name=runs "
    )  # fmt: skip
    ran = {}
    for name, (size, more) in RUNS.items():
        folder = tmp_path / name.replace(" ", "-")
        arguments = shlex.split(f"{where}{SHORT}trainer.default_local_dir={folder} {more}")
        ran[name] = folder, forked.run(["grpo", *arguments], tmp_path, size)
    for name, (folder, said) in ran.items():
        rollout = records(folder, "rollout")
        assert [record["step"] for record in rollout] == [1, 2], name
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
        assert "read as options of posttrain (docs/dialects.md)" in said and "no effect in this run" in said
    full, lora = (ran[name][0] for name in ("full", "lora"))
    assert [record["step"] for record in records(full, "val")] == [0, 1, 2]
    assert records(full, "rollout")[0]["reward_mean"] > 1, "reward.kwargs were not passed"
    assert 0 <= records(lora, "rollout")[0]["reward_mean"] <= 1 and records(lora, "rollout")[0]["rewards_unknown"] == 0
    assert (lora / "checkpoint-final" / "adapter").is_dir()


def test_a_file_of_verls_options_is_read_as_it_stands(tmp_path):
    """With what it builds on, Hydra's section, classes, a section that is an option of ours, and values that name others."""
    file = tmp_path / "run.yaml"
    file.write_text(
        """
defaults: [ppo_trainer, _self_]
hydra: {searchpath: [file://verl/trainer/config]}
data: {max_prompt_length: 256, max_response_length: 1024, image_key: images}
algorithm:
  _target_: verl.Algorithm
  adv_estimator: grpo
  filter_groups: {_target_: verl.Filter, enable: true, metric: acc, max_num_gen_batches: 4}
actor_rollout_ref:
  rollout:
    n: 8
    prompt_length: ${data.max_prompt_length}
    response_length: ${oc.select:data.max_response_length,512}
  actor: {use_dynamic_bsz: true, ppo_max_token_len_per_gpu: 16384, strategy: fsdp}
  ref: {strategy: "${..actor.strategy}", log_prob_max_token_len_per_gpu: "${actor_rollout_ref.actor.ppo_max_token_len_per_gpu}"}
trainer: {experiment_name: "run-${actor_rollout_ref.rollout.n}"}
"""
    )
    config = compose([str(file)], "grpo").config
    assert (config.data.max_prompt_length, config.rollout.max_new_tokens, config.rollout.n) == (256, 1024, 8)
    assert (config.algorithm.filter_groups, config.algorithm.filter_metric) == (True, "right")
    assert (config.algorithm.max_num_gen_batches, config.data.max_tokens_per_gpu) == (4, 16384)
    assert config.trainer.default_local_dir == "checkpoints/verl_examples/run-8"


def test_verl_keeps_all_checkpoints_unless_told():
    assert read("").config.trainer.max_ckpt_to_keep is None
    assert read("trainer.max_actor_ckpt_to_keep=3").config.trainer.max_ckpt_to_keep == 3
    assert read("trainer.remove_previous_ckpt_in_save=True").config.trainer.max_ckpt_to_keep == 1


def test_one_tracker_without_brackets_is_our_own_option_and_no_translation():
    for command in ("sft", "grpo"):
        read = compose(["trainer.logger=wandb", "trainer.project_name=x"], command)
        assert (read.config.trainer.logger, read.translated) == (["wandb"], [])
