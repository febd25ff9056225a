"""Every option: its name, type, default, unit and reason. This file is their only home, and imports no torch.

The sentence below a field is what `posttrain sft --help` prints. Names follow verl's where those are sound.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from posttrain.config.values import (
    DeviceList,
    Endpoint,
    Frequency,
    LocalFolder,
    NumberList,
    PathList,
    PathText,
    Share,
    TemplateText,
    TextList,
    as_list,
    checked_date,
    checked_kwargs,
    checked_pattern,
    unquoted,
)

BUILT_IN_REWARDS = ("gsm8k_strict", "gsm8k_flexible", "math", "exact_match", "data_source", "format", "length")


class Section(BaseModel):
    """A group of options: unknown names are errors, values never change after they are checked."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )


class ModelOptions(Section):
    """Who learns."""

    path: PathText | None = None
    """The model: a folder, a run folder of posttrain (its best or final export is meant), or a name on the hub."""
    tokenizer_path: PathText | None = None
    """Where the tokenizer lies, if not in `model.path`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; naming a commit makes a run repeatable."""
    random_weights: bool = False
    """Start from random weights by `config.json` alone, for tests and for training from scratch."""
    override_config: dict[str, Any] = {}
    """Fields of the model's `config.json` to replace, such as `{num_hidden_layers: 2}`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of forward and backward; weights and optimizer stay in float32. `auto`: bfloat16 where the device is
    fast at it, float32 on CPU."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which trained weights, their gradients and optimizer states are kept. bfloat16 needs half of that
    memory and loses small updates; gradients are summed over processes in float32 either way."""
    enable_gradient_checkpointing: bool = False
    """Keep only each block's input and compute the block again in the backward pass: about a third more time for a
    fraction of the activation memory."""
    gradient_checkpointing_every: PositiveInt = 1
    """Compute every so many blocks again instead of all: 2 costs half the time and saves half the memory."""
    enable_activation_offload: bool = False
    """Keep the inputs of recomputed blocks in CPU memory until the backward pass, copied while the device computes: the same
    result; with `model.enable_gradient_checkpointing`, for long rows."""
    torch_compile: bool = False
    """Compile each block once, by torch.compile, for rows of any length: faster steps after a slow first one."""
    use_liger: bool = False
    """Compute norms, rotary positions and gated layers by Liger's fused kernels (Hsu et al. 2024): less memory, faster steps; on
    CUDA, for the architectures that the package liger-kernel knows."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each block's output that is dropped in training, the rest scaled up by as much."""
    lora_rank: NonNegativeInt = 0
    """Rank of LoRA adapters beside frozen weights (Hu et al. 2021); 0 trains all weights."""
    lora_alpha: PositiveFloat = 16
    """An adapter's output is scaled by `model.lora_alpha / model.lora_rank`."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    target_modules: TextList = ["all-linear"]
    """Linear layers that get an adapter, by the ends of their names such as [q_proj,v_proj]; all-linear: all but the output
    layer."""
    lora_adapter_path: PathText | None = None
    """Adapter folder of peft to go on from; its rank, alpha and layers are used."""
    load_in_4bit: bool = False
    """Keep the frozen linear layers of the language model's blocks in 4 bits (Dettmers et al. 2023, QLoRA): a quarter of bfloat16's
    memory, slower steps. Needs adapters; exports are full models whose weights are those that were trained beside."""
    processor_kwargs: dict[str, Any] = {}
    """What the model's processor of images is given besides its own settings, such as `{max_pixels: 602112}`; saved with the
    model, so that it sees images in use as it saw them in training."""
    freeze_vision_tower: bool = False
    """Leave the weights that turn pixels into features as they are."""
    freeze_projector: bool = False
    """Leave the weights that bring image features into the language model as they are."""
    lora_vision: bool = False
    """Give the vision tower and its projector LoRA adapters too; else the language model alone has them."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; say yes only to authors that you trust."""

    @model_validator(mode="after")
    def _four_bits_are_frozen(self) -> ModelOptions:
        if self.load_in_4bit and not (self.lora_rank or self.lora_adapter_path):
            raise ValueError(
                "model.load_in_4bit freezes the model's linear layers, and nothing is trained beside them; give model.lora_rank=16, "
                "or leave it out"
            )
        return self


class DataOptions(Section):
    """From what it learns."""

    train_files: PathList = []
    """Training rows: parquet, JSON lines, JSON or Arrow files, folders of them, fsspec paths such as s3://..., or the name
    of a data set on the hub."""
    val_files: PathList = []
    """Validation rows, never trained on; in the same forms as `data.train_files`."""
    train_max_samples: PositiveInt | None = None
    """Use only so many of the training rows that can be used: with `data.shuffle` a random choice, a function of `trainer.seed`
    alone, else the first. Not given: all."""
    val_max_samples: PositiveInt | None = None
    """Use only so many of the validation rows, chosen like those of `data.train_max_samples`. Not given: all."""
    hub_config: str | None = None
    """Configuration of a hub data set, such as `main` for openai/gsm8k."""
    train_split: str = "train"
    """Split of a hub data set that `data.train_files` means."""
    val_split: str = "test"
    """Split of a hub data set that `data.val_files` means."""
    messages_key: str | None = None
    """Column with a list of {role, content} messages; dots reach into structs. Not given: recognised."""
    prompt_key: str | None = None
    """Column with the prompt, as text or messages; dots reach into structs. Not given: recognised."""
    response_key: str | None = None
    """Column with the answer to `data.prompt_key`, as text. Not given: recognised."""
    format: Literal["auto", "messages", "prompt_response", "sharegpt", "alpaca", "question_answer", "tokens"] = "auto"
    """Form of the rows; `auto` knows it by their columns. docs/data.md shows a row of each."""
    tools_key: str | None = None
    """Column with the tools, as a list or as JSON text of one; dots reach into structs. Not given: `tools`."""
    image_key: str | None = None
    """Column with the images of a row, in the order of their marks; dots reach into structs. Not given: `images` or `image`."""
    image_dir: PathText | None = None
    """Folder from which relative paths of images begin. Not given: that of the file which names them."""
    system_prompt: str | None = None
    """Text put in front as a system message where a row has none."""
    chat_template: TemplateText | None = None
    """The chat template to use instead of the tokenizer's own, as a file or as the Jinja text itself, which has {% or {{ in it; it
    is saved with the model."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(checked_kwargs)] = {}
    """What the chat template is given besides messages and tools; a row's own `chat_template_kwargs` come first."""
    enable_thinking: bool | None = None
    """Whether templates that know `enable_thinking` let the model think: true, false, or null, which leaves it to the
    template. A row's own `enable_thinking` comes first."""
    date: Annotated[str, AfterValidator(checked_date)] | None = None
    """The day that templates print which print one, as 2026-01-31. Not given: the day the run began; resuming keeps it."""
    train_on: Literal["all", "last"] = "all"
    """Which turns of `data.train_roles` are trained: all of a conversation or its last. A message's own `train`, `loss_mask`
    or `weight` comes first."""
    train_roles: Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)] = ["assistant"]
    """Whose turns are trained."""
    train_reasoning: bool = True
    """Train the reasoning before an answer too; `false` leaves it as context."""
    expand_turns: bool = False
    """Make one sample of each trained turn, rendered as inference would see it, with all before it as context: for templates
    that leave earlier reasoning out. `false` renders a conversation once, and trains what that rendering still contains."""
    control_strings: Literal["text", "allow"] = "text"
    """What becomes of a control string, such as <|im_end|>, that a user, a system prompt or a tool merely wrote: ordinary text,
    or (allow) a control token as everywhere else."""
    max_prompt_length: PositiveInt | None = None
    """Longest prompt of reinforcement learning in tokens; what happens to longer ones is `data.truncation`. Not given: any."""
    max_length: PositiveInt = 4096
    """Longest sample in tokens. What happens to longer ones is `data.truncation`; how many there were is always printed."""
    truncation: Literal["error", "drop", "left", "right"] = "error"
    """What happens to a sample longer than `data.max_length`, or a prompt of GRPO longer than its limit: stop, leave it out, or cut its beginning (left) or end
    (right)."""
    invalid_rows: Literal["error", "drop"] = "drop"
    """What happens to a row that cannot be used: stop at the first, or leave it out. The number, the reasons and the first
    rows of each are printed."""
    train_batch_size: PositiveInt = 32
    """Rows of one optimizer step, in GRPO prompts of one step, over all processes. The last batch of an epoch holds what is left."""
    micro_batch_size_per_gpu: PositiveInt | None = None
    """Rows of one forward pass on one device. Never changes the result. Not given: `data.max_tokens_per_gpu` decides."""
    max_tokens_per_gpu: PositiveInt | None = None
    """Tokens of one forward pass on one device: rows are packed up to it without padding. Never changes the result. Not
    given: 16,384 on accelerators, 4,096 on CPU, and `data.max_length` if that is more. Devices that share a row add up."""
    packing: bool = True
    """Rows of a micro-batch share one forward pass, without seeing each other. `false` runs them one by one: slower, the
    same result; for models whose layers carry state along the row."""
    shuffle: bool = True
    """Each epoch in its own order, a function of `trainer.seed` and the epoch alone; `false` keeps the files' order."""
    num_workers: NonNegativeInt | None = None
    """Processes that render and tokenize. Not given: one per core for large sets, none for small ones."""
    cache_dir: PathText = "~/.cache/posttrain"
    """Where tokenized rows are kept; a second run with the same rows, tokenizer and template starts at once."""


class EngineOptions(Section):
    """How one model is laid over several processes. Nothing here changes the result, but for the noise of dropout."""

    fsdp_size: PositiveInt | None = None
    """At most so many processes share one copy of the weights; further processes hold copies of it (hybrid sharding). Not
    given: all share one."""
    reshard_after_forward: bool = True
    """Give back a block's whole weights after its forward pass and gather them again for the backward pass; `false` talks
    less and holds the whole weights in between."""
    ulysses_sequence_parallel_size: PositiveInt = 1
    """Processes that share one packed row, each with a part of its tokens (Jacobs et al. 2023, DeepSpeed Ulysses): for rows
    whose activations do not fit on one device."""
    param_offload: bool = False
    """Keep weights and gradients in CPU memory, and bring each block to the device when it computes: slower, for models
    that do not fit."""
    reference_offload: bool = False
    """Keep the weights of the reference policy in CPU memory, and bring each block to the device when it computes."""
    optimizer_offload: bool = False
    """Keep the optimizer's averages in CPU memory, and bring each tensor's to the device when it moves: 8 bytes a weight
    less on the device."""


class OptimOptions(Section):
    """How the weights move: AdamW, with decay on matrices only."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps AdamW's averages in 8 bits each (Dettmers et al. 2022): 2 bytes a trained weight instead of 8, slower steps,
    nearly the same result."""
    lr: PositiveFloat = 1e-5
    """Highest learning rate."""
    betas: Annotated[tuple[Share, Share], BeforeValidator(unquoted)] = (0.9, 0.95)
    """Decay of AdamW's averages of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """AdamW's guard against division by zero."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of matrices and embeddings; biases and norms are left alone."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Course of the rate after warm-up: constant, a straight line or half a cosine down to the floor, or constant with a
    straight fall at the end (warm-up, stable, decay)."""
    lr_warmup_steps: NonNegativeInt | None = None
    """Steps over which the rate climbs from zero."""
    lr_warmup_steps_ratio: Share | None = None
    """The same as a share of all steps. Neither given: 0.05."""
    min_lr_ratio: Share = 0.0
    """Floor of the rate as a share of `optim.lr`."""
    wsd_decay_ratio: Share = 0.1
    """Share of all steps in which `wsd` falls to the floor."""

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimOptions:
        if self.lr_warmup_steps is not None and self.lr_warmup_steps_ratio is not None:
            raise ValueError("give optim.lr_warmup_steps or optim.lr_warmup_steps_ratio, not both")
        return self


class RolloutOptions(Section):
    """How answers are generated: those that reinforcement learning learns from, and those of evaluation."""

    name: Literal["transformers", "vllm"] = "transformers"
    """Who writes them: transformers in this process, or vLLM in a process of its own, which the section `vllm` describes."""
    n: PositiveInt | None = None
    """Answers to each prompt: in GRPO the group that they are compared in (8 if not given), in `evaluate` how many are judged
    (1 if not given)."""
    max_new_tokens: PositiveInt = 512
    """Longest answer in tokens; longer ones are cut and counted."""
    temperature: NonNegativeFloat | None = None
    """Above 0 tokens are drawn from the model's probabilities, sharpened below 1; 0 takes the likeliest each time. Not given: 1 in
    GRPO, 0 in `evaluate` and `generate`."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw only among the likeliest tokens that make up this share of the probability."""
    top_k: NonNegativeInt = 0
    """Draw only among so many of the likeliest tokens; 0 draws among all."""
    val_n: PositiveInt = 1
    """Answers to each validation problem: pass@1 is their mean, pass@k the chance that one of k is right."""
    val_temperature: NonNegativeFloat = 0.0
    """`rollout.temperature` of validation during training."""
    val_top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """`rollout.top_p` of validation during training. Not given: the same."""
    val_top_k: NonNegativeInt | None = None
    """`rollout.top_k` of validation during training. Not given: the same."""
    batch_size: PositiveInt = 64
    """Answers written at the same time on one device."""


class VLLMOptions(Section):
    """The process that answers where rollout.name is vllm."""

    python: PathText | None = None
    """Interpreter that has vLLM, in an environment of its own if need be. Not given: the one that runs posttrain."""
    devices: DeviceList = []
    """Devices of the servers, by their numbers on the machine; each process of a machine takes
    `vllm.tensor_parallel_size` of them for its server. Not given: the process's own device, where trainer and server take turns."""
    tensor_parallel_size: PositiveInt = 1
    """Devices that share each layer of a server's model."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of a device's memory that a server takes for weights and for what it keeps of each token; on CPU, of the host's."""
    max_model_len: PositiveInt | None = None
    """Longest prompt with its answer, in tokens. Not given: what the model allows."""
    enforce_eager: bool | None = None
    """Do without compiled kernels and CUDA graphs: a faster start, slower answers. Not given: only on CPU."""
    start_timeout_seconds: PositiveFloat = 600.0
    """Seconds after which a server that has not started is given up."""
    timeout_seconds: PositiveFloat = 300.0
    """Seconds without a sign of life after which a server that was asked for something is given up."""


class RewardOptions(Section):
    """How an answer is judged. docs/rewards.md defines each reward."""

    name: TextList = []
    """One reward or several, whose weighted sum counts: gsm8k_strict, gsm8k_flexible, math, exact_match, data_source, format,
    length, or functions of `reward.path`. Not given: gsm8k_strict, or compute_score where there is a `reward.path`."""
    weights: NumberList = []
    """What each of `reward.name` is multiplied by, in their order. Not given: 1 each."""
    path: PathText | None = None
    """Python file with functions of your own: compute_score(data_source, solution_str, ground_truth, extra_info), as verl
    calls them. They run in processes of their own."""
    kwargs: dict[str, Any] = {}
    """Further arguments of every function of `reward.path`, by name, such as `{penalty: 0.5}`."""
    right_at: float = 1.0
    """An answer is right if a reward that only gives numbers gives at least this."""
    answer_mark: Annotated[str, Field(min_length=1)] = "####"
    """What stands before the number in an answer that gsm8k_strict can read."""
    format_pattern: Annotated[str, AfterValidator(checked_pattern)] | None = None
    """Regular expression that `format` wants the whole answer to match; a dot matches line ends too. Not given: the last line
    is `reward.answer_mark` and a number."""
    length_target: PositiveInt = 256
    """Tokens up to which `length` gives 1; it falls in a straight line to 0 at twice as many."""
    timeout_seconds: PositiveFloat = 10.0
    """Time for one answer in a process of its own; then the process is killed, and nobody can tell whether it was right."""
    num_workers: PositiveInt | None = None
    """Processes for math, functions of your own and a `reward.format_pattern`. Not given: one a core, shared by the processes
    of this machine."""

    @property
    def names(self) -> list[str]:
        """The rewards in force."""
        return self.name or ["compute_score" if self.path else "gsm8k_strict"]

    @model_validator(mode="after")
    def _known_and_weighted(self) -> RewardOptions:
        unknown = [name for name in self.names if name not in BUILT_IN_REWARDS]
        if unknown and self.path is None:
            near = difflib.get_close_matches(unknown[0], BUILT_IN_REWARDS, n=1)
            raise ValueError(
                f"there is no reward '{unknown[0]}'{f', nearest is {near[0]}' if near else ''}; reward.name can be "
                f"{', '.join(BUILT_IN_REWARDS)}, or a function in the file that reward.path names"
            )
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(f"reward.name has {twice[0]} twice; give it once, with reward.weights")
        if self.weights and len(self.weights) != len(self.names):
            raise ValueError(
                f"reward.weights has {len(self.weights)} numbers, and reward.name {len(self.names)}: {', '.join(self.names)}; "
                "give one number each"
            )
        return self


class AlgorithmOptions(Section):
    """How reinforcement learning turns rewards into a gradient. docs/grpo.md has the formulas."""

    adv_estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """What a reward is compared with. grpo: (reward - mean of its group) / (std + 1e-6) (Shao et al. 2024); dr_grpo: without the
    std (Liu et al. 2025); rloo: minus the mean of the others (Ahmadian et al. 2024)."""
    policy_loss: Literal["clip", "gspo", "cispo"] = "clip"
    """clip: each token's ratio to the old policy, clipped (Schulman et al. 2017); gspo: one ratio an answer (Zheng et al. 2025);
    cispo: the clipped ratio as a constant weight (MiniMax 2025)."""
    clip_ratio_low: NonNegativeFloat = 0.2
    """Ratios below 1 minus this are clipped; gspo wants about 3e-4."""
    clip_ratio_high: NonNegativeFloat = 0.2
    """Ratios above 1 plus this are clipped; 0.28 lets rare tokens grow (DAPO, Yu et al. 2025), gspo wants about 4e-4."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """With a bad answer the objective of a token is at least this times its advantage (Ye et al. 2020), often 3. Not given: off."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant-length"] = "token-mean"
    """How tokens' losses become one: each token alike (DAPO), each answer alike (seq-mean-token-mean, the first GRPO), sums over
    answers, or sums by `rollout.max_new_tokens` (Dr. GRPO)."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the divergence from the reference: the model that the run began with, or the one without adapters. 0 needs no
    reference."""
    kl_type: Literal["k1", "k2", "k3", "abs"] = "k3"
    """Estimate of that divergence from the tokens drawn (Schulman 2020); k3 is GRPO's."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it counts: each token's in the loss, or an answer's sum taken off its reward."""
    entropy_coef: float = 0.0
    """Weight of the entropy that the loss rewards."""
    filter_groups: bool = False
    """Leave out groups whose answers all have the same reward: nothing can be learnt from them (dynamic sampling, DAPO)."""
    filter_metric: Literal["reward", "score", "right"] = "reward"
    """What is compared for `algorithm.filter_groups`: the reward with over-long shaping, the score without it, or whether answers
    are right."""
    max_num_gen_batches: PositiveInt = 1
    """With `algorithm.filter_groups`, how often further prompts may be asked in a step until `data.train_batch_size` groups are
    left; 1 makes do with those that are."""
    overlong_buffer_tokens: NonNegativeInt = 0
    """In the last so many tokens before `rollout.max_new_tokens` the reward falls, in a straight line, by up to
    `algorithm.overlong_penalty` (over-long shaping, DAPO); 0: off."""
    overlong_penalty: PositiveFloat = 1.0
    """What an answer of the greatest length loses."""
    mask_truncated: bool = False
    """Learn nothing from answers that were cut at the limit (over-long filtering, DAPO); their rewards still count in the
    group."""
    ppo_mini_batch_size: PositiveInt | None = None
    """Prompts of one update of the weights. Not given: all of a step, so that the policy is always the one that answered."""
    ppo_epochs: PositiveInt = 1
    """Passes over the answers of a step."""
    rollout_is_cap: PositiveFloat | None = 2.0
    """Weigh each token by trainer's probability / rollout engine's, at most this (truncated importance sampling, Yao et al. 2025);
    null: off. The gap is measured in any case."""


class ToolOptions(Section):
    """What the model may call while it answers."""

    functions: TextList = []
    """Tools: calculator, or functions of Python files as path/to/file.py:function. They are run: name only files that you
    trust. Not given: every answer is one turn."""
    max_turns: PositiveInt = 4
    """Most answers of the model to one prompt; one that calls a tool in the last of them is cut there."""
    max_answer_tokens: PositiveInt = 256
    """Longest answer of a tool in tokens; longer ones are cut. They do not count for `rollout.max_new_tokens`."""
    timeout_seconds: PositiveFloat = 5.0
    """Time for one call, after which its process is killed and the model is told."""


class TrainerOptions(Section):
    """How long, where, and what is kept."""

    default_local_dir: LocalFolder = "checkpoints/sft"
    """The run folder: options, metrics, checkpoints and the finished model."""
    default_hdfs_dir: PathText | None = None
    """A folder elsewhere, such as hdfs://... or s3://..., that gets a copy of the run folder at each save and at the end. Not
    given: none."""
    project_name: str = "posttrain"
    """Name of the project in trackers."""
    experiment_name: str | None = None
    """Name of this run in trackers. Not given: the name of the run folder."""
    logger: TextList = ["console"]
    """Where metrics go besides metrics.jsonl: console, tensorboard, wandb, mlflow, trackio, swanlab."""
    total_epochs: PositiveInt = 1
    """Passes over the training rows."""
    total_training_steps: PositiveInt | None = None
    """Steps, instead of `trainer.total_epochs`; each has `data.train_batch_size` rows and one update of the weights, in GRPO so many
    prompts and one update or several."""
    seed: NonNegativeInt = 42
    """Decides the order of rows, dropout, random weights and sampling."""
    val_before_train: bool = True
    """Validate once before the first step, to know where the run started."""
    test_freq: Frequency = "1ep"
    """Validate every so many steps (100) or epochs (1ep); -1 only at the end. Every validation row counts."""
    num_val_generations: NonNegativeInt = 0
    """Validation rows answered by generation at each validation, for the accuracy; 0 for none, which in GRPO, that has no other
    validation, is said by leaving out `data.val_files`."""
    best_metric: Literal["val_loss", "val_accuracy", "val_reward"] = "val_loss"
    """What makes a checkpoint the best one, and what early stopping watches."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many validations without a better `trainer.best_metric`. Not given: never."""
    save_freq: Frequency = "1ep"
    """Save a checkpoint to resume from every so many steps (100) or epochs (2ep); -1 only when the run ends or is
    stopped."""
    max_ckpt_to_keep: PositiveInt | None = 2
    """Newest checkpoints that are kept, also after a restart; null keeps all. The best and the final model are always
    kept."""
    resume_mode: Literal["auto", "disable", "resume_path"] = "auto"
    """auto: go on from the newest checkpoint in the run folder, else from `trainer.resume_from_path` if that is given. disable:
    refuse to write into a run folder that holds checkpoints. resume_path: begin from `trainer.resume_from_path`."""
    resume_from_path: PathText | None = None
    """A checkpoint-<step> folder to go on from, of this or another run folder."""
    sample_freq: Frequency = 10
    """Show answers with their rewards, and write all of the step to samples/step-<N>.jsonl, every so many steps (10) or epochs
    (1ep) of reinforcement learning and at its end; -1 only at the end."""
    log_freq: PositiveInt = 1
    """Write training metrics every so many steps; counts and sums still cover all of them."""
    max_skipped_steps: PositiveInt = 5
    """A step whose loss or gradient is not finite is skipped; so many in a row stop the run."""
    hang_timeout_seconds: NonNegativeFloat = 600.0
    """Seconds without progress of any process after which the run stops, says which one holds it up and writes every stack
    to hang.txt; six times as long while it starts, saves or answers. 0 never stops."""
    n_gpus_per_node: PositiveInt | None = None
    """Processes to start on each machine, one per device; on CPU they talk by gloo. Not given: one. Under torchrun, its
    world is used, over as many machines as it spans."""
    nnodes: PositiveInt = 1
    """Machines that the run spans; the same command is started once on each."""
    rdzv_endpoint: Endpoint | None = None
    """Where they meet: HOST:PORT of the first machine, the same on each. Slurm's tasks find it by themselves."""
    max_restarts: NonNegativeInt = 0
    """How often all processes are started again after one was lost; a run goes on from its newest checkpoint."""
    device: str = "auto"
    """What to compute on, by torch's name for it: cpu, cuda, npu, xpu, ...; auto takes the accelerator that torch finds, else
    the CPU."""

    @model_validator(mode="after")
    def _path_to_resume_from(self) -> TrainerOptions:
        if self.resume_mode == "resume_path" and self.resume_from_path is None:
            raise ValueError(
                "trainer.resume_mode=resume_path needs trainer.resume_from_path, the checkpoint-<step> folder to go on from; auto "
                "finds the newest of the run folder by itself"
            )
        return self

    @model_validator(mode="after")
    def _accuracy_needs_answers(self) -> TrainerOptions:
        if self.best_metric != "val_loss" and not self.num_val_generations:
            raise ValueError(
                f"trainer.best_metric={self.best_metric} needs trainer.num_val_generations, the rows to answer; to validate "
                "nothing, leave out data.val_files"
            )
        return self


class Config(Section):
    """All options of a run."""

    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    engine: EngineOptions = EngineOptions()
    optim: OptimOptions = OptimOptions()
    trainer: TrainerOptions = TrainerOptions()
    algorithm: AlgorithmOptions = AlgorithmOptions()
    rollout: RolloutOptions = RolloutOptions()
    vllm: VLLMOptions = VLLMOptions()
    reward: RewardOptions = RewardOptions()
    tools: ToolOptions = ToolOptions()
