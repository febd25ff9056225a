from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.config.arguments import DEFAULT_OF_COMMAND, packaged_recipe, recipes
from posttrain.config.catalog import Page
from posttrain.config.compose import Resolved, compose
from posttrain.config.describe import default_of, describe_options, options, sections, type_name
from posttrain.config.schema import Config
from posttrain.errors import InputError

ROOT = Path(__file__).parents[1]
ALL_RECIPES = [(group, name) for group, names in recipes().items() for name in names if group != "job"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def value(resolved: Resolved, key: str):
    section, option = key.split(".")
    return getattr(getattr(resolved.config, section), option)


def given(argument: str):
    """What the option of `option=value` becomes."""
    return value(compose([argument]), argument.partition("=")[0].lstrip("+"))


def problems(*arguments: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        compose(list(arguments))
    return str(caught.value).splitlines()


def problem(*arguments: str) -> str:
    (only,) = problems(*arguments)
    return only


def ignored(*arguments: str) -> set[str]:
    return {note["key"] for note in compose(list(arguments)).ignored}


def shown_text(renderable, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


# the schema


def test_options_are_checked_without_importing_torch():
    code = (
        "import sys; from posttrain.config.compose import compose; import posttrain.config.schema;"
        "compose(['model=qwen2.5-0.5b', 'optim.lr=1e-5']);"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_every_option_says_what_it_is_for():
    assert [option for option, field in options().items() if not field.description] == []


def test_every_default_is_valid():
    assert compose([]).config == Config.model_validate(Config().model_dump())


def test_every_section_says_what_it_is_for():
    assert all(section.__doc__ for section in sections().values())


# recipes


@pytest.mark.parametrize(("group", "name"), ALL_RECIPES)
def test_every_packaged_recipe_resolves(group: str, name: str):
    resolved = compose([f"{group}={name}"], Page(group, name).command)
    origins = set(resolved.origins.values()) - {DEFAULT_OF_COMMAND}
    assert origins == {"default", f"recipe {group}/{name}"} or packaged_recipe(group, name).values == {}
    assert packaged_recipe(group, name).choices == {}
    if name != "grpo":  # which says what to watch in validation, for those who give some
        assert resolved.ignored == []


@pytest.mark.parametrize("name", recipes()["model"])
def test_every_model_recipe_names_a_model_and_a_rate(name: str):
    resolved = compose([f"model={name}"])
    assert "/" in value(resolved, "model.path")
    assert 1e-6 <= value(resolved, "optim.lr") <= 1e-3


def test_recipes_of_several_groups_combine():
    resolved = compose(["model=qwen2.5-0.5b", "data=gsm8k", "method=[full,checkpointing]"])
    assert value(resolved, "model.path") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert value(resolved, "data.train_files") == ["openai/gsm8k"]
    assert value(resolved, "model.enable_gradient_checkpointing") is True


def test_mapping_for_a_group_merges_as_values():
    resolved = compose(["model=qwen2.5-0.5b", "model={path: ~/mine, override_config: {num_hidden_layers: 2}}"])
    assert value(resolved, "model.path") == "/home/ada/mine"
    assert value(resolved, "model.override_config") == {"num_hidden_layers": 2}
    assert resolved.origins["optim.lr"] == "recipe model/qwen2.5-0.5b"


def test_command_line_choice_replaces_the_choice_of_a_file():
    Path("run.yaml").write_text("defaults:\n- model: qwen2.5-7b\n- method: [full]\n- _self_\n")
    resolved = compose(["run.yaml", "model=smollm2-135m", "+method=checkpointing"])
    assert value(resolved, "model.path") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolved.origins["model.enable_gradient_checkpointing"] == "recipe method/checkpointing"
    assert value(compose(["run.yaml", "~model"]), "model.path") is None


def test_unknown_recipe_lists_what_there_is():
    assert "nearest: qwen" in problem("model=qwen") and "model.path=" in problem("model=qwen")
    assert "only model, data, method, job have recipes" in problem("trainer=x")


# layers and origins


def test_later_layers_win_and_every_option_knows_its_layer():
    Path("run.yaml").write_text(
        "defaults:\n- model: qwen2.5-0.5b\noptim:\n  lr: 3e-5\n  eps: 1e-7\ntrainer: {seed: 1, total_epochs: 2}\n"
    )
    resolved = compose(["trainer.seed=2", "data=gsm8k", "run.yaml", "trainer.seed=3"])
    found = {key: (value(resolved, key), origin) for key, origin in resolved.origins.items() if origin != "default"}
    assert found["model.path"] == ("Qwen/Qwen2.5-0.5B-Instruct", "recipe model/qwen2.5-0.5b")
    assert found["optim.lr"] == (3e-5, "file run.yaml")
    assert found["optim.eps"] == (1e-7, "file run.yaml")
    assert found["trainer.total_epochs"] == (2, "file run.yaml")
    assert found["data.train_batch_size"] == (64, "recipe data/gsm8k")
    assert found["trainer.seed"] == (3, "command line")
    assert resolved.origins["trainer.device"] == "default"


def test_tilde_resets_to_the_default():
    resolved = compose(["model=qwen2.5-0.5b", "~optim.lr", "trainer.seed=1", "~trainer.seed"])
    assert value(resolved, "optim.lr") == default_of("optim.lr")
    assert value(resolved, "trainer.seed") == default_of("trainer.seed")
    assert resolved.origins["optim.lr"] == resolved.origins["trainer.seed"] == "default"


def test_free_mapping_takes_dotted_keys_and_merges():
    Path("run.yaml").write_text("model:\n  override_config:\n    rope: {theta: 1e4, kind: yarn}\n    a: 1\n")
    resolved = compose(["run.yaml", "+model.override_config.rope.theta=5", "~model.override_config.a"])
    assert value(resolved, "model.override_config") == {"rope": {"theta": 5, "kind": "yarn"}}
    assert resolved.origins["model.override_config"] == "command line"
    assert value(compose(["run.yaml", "model.override_config={}"]), "model.override_config") == {}


def test_recipe_file_may_have_an_equals_sign_in_its_path():
    Path("lr=1").mkdir()
    Path("lr=1/run.yml").write_text("optim: {lr: 1}\n")
    assert compose(["lr=1/run.yml"]).origins["optim.lr"] == "file lr=1/run.yml"


def test_file_of_comments_and_empty_sections_changes_nothing():
    Path("run.yaml").write_text("# nothing yet\n")
    Path("sections.yaml").write_text("model:\noptim: {}\n")
    assert compose(["run.yaml", "sections.yaml"]).config == compose([]).config


# values


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("optim.lr=1e-5", 1e-5),
        ("+optim.lr=2", 2.0),
        ("++optim.betas=[0.9,0.99]", (0.9, 0.99)),
        ("data.packing=false", False),
        ("data.packing=no", False),
        ("trainer.max_ckpt_to_keep=null", None),
        ("trainer.save_freq=2ep", "2ep"),
        ("trainer.save_freq=100", 100),
        ("trainer.save_freq=-1", -1),
        ("data.train_files=[a.parquet,b.parquet]", ["a.parquet", "b.parquet"]),
        ("data.train_files=['a, b.parquet', \"c.parquet\"]", ["a, b.parquet", "c.parquet"]),
        ("data.train_files=a.parquet", ["a.parquet"]),
        ("data.train_files=hdfs://host/part-*.parquet", ["hdfs://host/part-*.parquet"]),
        (
            "data.train_files=[~/a.parquet, my rows/lr=1, é]",
            ["/home/ada/a.parquet", "my rows/lr=1", "é"],
        ),
        ("data.train_files=[2024_01,1e5,true]", ["2024_01", "1e5", "true"]),
        ("model.path=~/models/x", "/home/ada/models/x"),
        ("model.path=$HOME/x", "/home/ada/x"),
        ("model.path=${oc.env:HOME}/x", "/home/ada/x"),
        ("model.path=/runs/lr=1e-5,seed=3/(best) #1", "/runs/lr=1e-5,seed=3/(best) #1"),
        ("model.path=数据", "数据"),
        ("model.path='~/x'", "/home/ada/x"),
        ("model.path=123", "123"),
        ("model.revision=12e4", "12e4"),
        ("model.revision=007", "007"),
        ("model.revision=true", "true"),
        ("trainer.experiment_name=${trainer.seed}", "42"),
        ("trainer.experiment_name=run-${trainer.seed}", "run-42"),
        ("trainer.experiment_name=\\${trainer.seed}", "${trainer.seed}"),
        ("model.override_config={a: 1, b: {c: [x, 2]}}", {"a": 1, "b": {"c": ["x", 2]}}),
    ],
)
def test_command_line_value_becomes(argument: str, expected):
    assert given(argument) == expected


@pytest.mark.parametrize(
    ("option", "yaml", "expected"),
    [
        ("optim.lr", "1e-5", 1e-5),
        ("optim.lr", "'1e-5'", 1e-5),
        ("model.revision", "12e4", "12e4"),
        ("model.revision", "0123", "0123"),
        ("model.revision", "null", None),
        ("trainer.experiment_name", "no", "no"),
        ("trainer.experiment_name", "2024-01-01", "2024-01-01"),
        ("trainer.experiment_name", "${trainer.seed}", "42"),
        ("data.train_files", "[1_000, a]", ["1_000", "a"]),
        ("data.train_files", "a.parquet", ["a.parquet"]),
        ("data.shuffle", "off", False),
        ("trainer.test_freq", "3ep", "3ep"),
    ],
)
def test_recipe_file_value_becomes(option: str, yaml: str, expected):
    section, name = option.split(".")
    Path("run.yaml").write_text(f"{section}:\n  {name}: {yaml}\n")
    assert value(compose(["run.yaml"]), option) == expected


# errors


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("optim.learning_rate=1", "optim.lr"),
        ("+trainer.train_batch_size=1", "data.train_batch_size"),
        ("train_batch_size=1", "data.train_batch_size"),
        ("~trainer.sed", "trainer.seed"),
        ("data={max_len: 3}", "data.max_length"),
    ],
)
def test_unknown_option_is_named_with_the_nearest(argument: str, nearest: str):
    message = problem(argument)
    assert "(command line): there is no such option. Nearest: " in message
    assert message.partition("Nearest: ")[2].startswith(nearest)


def test_unknown_option_of_a_file_names_the_file():
    Path("run.yaml").write_text("optim:\n  learning_rate: 1\n")
    assert problem("run.yaml").startswith("optim.learning_rate (file run.yaml): there is no such option.")


def test_unknown_section_lists_the_sections():
    assert "there is no section 'actor', only model, data, " in problem("actor.optim.lr=1")
    assert "Nearest: optim.lr" in problem("actor.optim.lr=1")


@pytest.mark.parametrize(
    ("argument", "found", "expected"),
    [
        ("optim.lr=fast", "'fast'", "float > 0"),
        ("optim.lr=-1", "-1", "float > 0"),
        ("trainer.seed=true", "'true'", "int >= 0"),
        ("data.max_length=2.5", "2.5", "int > 0"),
        ("data.micro_batch_size_per_gpu=0", "0", "int > 0 | null"),
        ("data.truncation=cut", "'cut'", "error | drop | left | right"),
        ("data.packing=perhaps", "'perhaps'", "true | false"),
        ("optim.betas=[0.9,2]", "2", "list of 2, each float >= 0, <= 1"),
        ("trainer.save_freq=often", "'often'", "a number of steps such as 100"),
        ("model.override_config=3", "3", "mapping such as {name: value}"),
    ],
)
def test_wrong_value_says_what_was_found_and_expected(argument: str, found: str, expected: str):
    key = argument.partition("=")[0]
    assert problem(argument).startswith(f"{key}: found {found} (command line), expected {expected}")


@pytest.mark.parametrize("malformed", ["[a", "[a]]", "{path", "{path}", "'a", '"a'])
def test_malformed_value_is_shown_with_what_was_expected(malformed: str):
    message = problem(f"model.path={malformed}")
    assert message.startswith(f"model.path={malformed}: this list, mapping or quoted text is not complete; expected [")


def test_sweep_is_refused():
    assert "this is a sweep" in problem("optim.lr=1e-5,1e-6")


@pytest.mark.parametrize("argument", ["", "[", "=3", "gsm8k"])
def test_argument_of_no_known_form_is_refused(argument: str):
    assert "expected option=value, group=recipe or a recipe file (.yaml)" in problem(argument)


def test_name_of_a_recipe_alone_suggests_its_group():
    assert problem("gsm8k").endswith("Did you mean data=gsm8k?")


def test_file_of_rows_alone_is_told_by_which_option_it_is_given(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    assert problem(str(rows)).endswith(
        f"A file of rows is data.train_files={rows}; `posttrain data` takes --files {rows} too."
    )


def test_reset_takes_no_value():
    assert "takes no value" in problem("~optim.lr=3")


def test_missing_recipe_file_is_named():
    assert problem("nowhere.yaml").startswith("file nowhere.yaml: there is no such file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: [1\nlr: 3", "line 2 is not YAML"),
        ("optim: {lr: 1}\noptim: {lr: 2}", "line 2 is not YAML: found duplicate key optim"),
        ("just words", "found no options"),
        ("- a\n- b", "found no options"),
        ("optim:\n  lr: ${optim.eps", "is not YAML: no viable alternative"),
        ("model: qwen2.5-0.5b", "`- model: name` under `defaults:`"),
        ("defaults: [qwen2.5-0.5b]", "`- model: name` under `defaults:`"),
        ("defaults: [_self_, model: qwen2.5-0.5b]", "found '_self_' under `defaults:`"),
        ("defaults: [motor: x]", "found {'motor': 'x'} under `defaults:`"),
        ("defaults: [model: qwen]", "there is no such recipe; nearest: "),
    ],
)
def test_unusable_recipe_file_says_why(content: str, message: str):
    Path("run.yaml").write_text(content)
    assert message in problem("run.yaml")


def test_recipe_file_that_is_not_text_says_so():
    Path("run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "file run.yaml: 'utf-8' codec can't decode" in problem("run.yaml")


@pytest.mark.parametrize("reference", ["${nowhere}", "${oc.env:NOWHERE}", "${trainer.seed", "${optim.lr}"])
def test_interpolation_that_leads_nowhere_names_the_option(reference: str):
    message = problem(f"optim.lr={reference}")
    assert message.startswith(f"optim.lr: found {reference} (command line), and ")


def test_rules_between_options_are_told():
    assert "trainer.best_metric=val_reward needs trainer.num_val_generations" in problem(
        "trainer.best_metric=val_reward"
    )


def test_all_problems_are_told_at_once():
    Path("run.yaml").write_text("optim: {lr: 0}\n")
    arguments = ["model=qwen", "foo.bar=1", "data.train_files=[a", "trainer.seed=${no}", "data.packing=x"]
    told = problems("run.yaml", *arguments)
    assert [line.partition(" ")[0].rstrip(":") for line in told] == [
        "data.train_files=[a",
        "model=qwen",
        "foo.bar",
        "trainer.seed",
        "data.packing",
        "optim.lr",
    ]


# options without effect


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["rollout.top_p=0.9"], "rollout.top_p"),
        (["vllm.devices=[0]"], "vllm.devices"),
        (["rollout.name=vllm", "rollout.batch_size=8"], "rollout.batch_size"),
        (["optim.wsd_decay_ratio=0.2"], "optim.wsd_decay_ratio"),
        (["optim.lr_scheduler_type=constant", "optim.min_lr_ratio=0.1"], "optim.min_lr_ratio"),
        (["data.messages_key=chat", "data.prompt_key=q"], "data.prompt_key"),
        (["data.format=tokens", "data.system_prompt=Be brief."], "data.system_prompt"),
        (["data.format=tokens", "data.train_on=last"], "data.train_on"),
        (["data.format=tokens", "data.train_roles=[tool]"], "data.train_roles"),
        (["data.format=tokens", "data.train_reasoning=false"], "data.train_reasoning"),
        (["data.format=tokens", "data.expand_turns=true"], "data.expand_turns"),
        (["data.format=tokens", "data.enable_thinking=false"], "data.enable_thinking"),
        (["data.format=tokens", "data.chat_template_kwargs={a: 1}"], "data.chat_template_kwargs"),
        (["data.format=tokens", "data.control_strings=allow"], "data.control_strings"),
        (["data.format=tokens", "data.date=2026-01-31"], "data.date"),
        (["data.format=alpaca", "data.prompt_key=q"], "data.prompt_key"),
        (["data.format=question_answer", "data.messages_key=chat"], "data.messages_key"),
        (["data.train_files=rows.jsonl", "data.hub_config=main"], "data.hub_config"),
        (["data.train_files=s3://bucket/rows", "data.train_split=train"], "data.train_split"),
        (["data.train_files=org/set", "data.val_split=test"], "data.val_split"),
        (["trainer.total_training_steps=9", "trainer.total_epochs=1"], "trainer.total_epochs"),
        (["trainer.early_stopping_patience=3"], "trainer.early_stopping_patience"),
        (["trainer.num_val_generations=8"], "trainer.num_val_generations"),
        (["trainer.project_name=x"], "trainer.project_name"),
        (["trainer.rdzv_endpoint=node1:29500"], "trainer.rdzv_endpoint"),
        (["model.path=.", "model.revision=main"], "model.revision"),
        (["data.packing=false", "data.max_tokens_per_gpu=9"], "data.max_tokens_per_gpu"),
        (["model.gradient_checkpointing_every=2"], "model.gradient_checkpointing_every"),
        (["model.lora_dropout=0.1"], "model.lora_dropout"),
        (["model.torch_compile=true"], "model.torch_compile"),  # of a command that trains nothing
        (["model.lora_adapter_path=.", "model.lora_rank=8"], "model.lora_rank"),
        (["engine.fsdp_size=1"], "engine.fsdp_size"),
        (["engine.fsdp_size=8", "trainer.n_gpus_per_node=8"], "engine.fsdp_size"),
        (["tools.max_turns=2"], "tools.max_turns"),
        (["data.val_files=v.jsonl", "rollout.val_n=4"], "rollout.val_n"),
        (["data.val_files=v.jsonl", "rollout.val_temperature=1"], "rollout.val_temperature"),
    ],
)
def test_chosen_option_without_effect_is_told(arguments: list[str], key: str):
    assert ignored(*arguments) == {key}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["rollout.top_p=0.9", "rollout.temperature=1"],
        ["optim.lr_scheduler_type=wsd", "optim.wsd_decay_ratio=0.2"],
        ["data.train_files=org/set", "data.hub_config=main", "data.train_split=all"],
        ["trainer.total_training_steps=9"],
        ["rollout.name=vllm", "vllm.python=/opt/vllm/bin/python", "vllm.max_model_len=512"],
        ["model.lora_rank=8", "model.lora_alpha=32"],
        ["trainer.n_gpus_per_node=4", "engine.fsdp_size=2", "engine.reshard_after_forward=false"],
        # one process gathers too, where it computes in another number format than it keeps: the device decides
        ["trainer.n_gpus_per_node=1", "engine.reshard_after_forward=false"],
        ["data.val_files=v.jsonl", "trainer.early_stopping_patience=3", "trainer.test_freq=5"],
        ["trainer.logger=[console,wandb]", "trainer.project_name=x"],
        ["tools.functions=[calculator,./a.py:f]", "tools.max_turns=2", "tools.timeout_seconds=1"],
    ],
)
def test_option_with_effect_is_not_told(arguments: list[str]):
    assert ignored(*arguments) == set()


VALIDATED = ["data.val_files=v.jsonl", "trainer.num_val_generations=8"]


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("grpo", ["rollout.top_p=0.9", "rollout.top_k=5"], set()),
        ("grpo", ["rollout.top_p=0.9", "rollout.temperature=0"], {"rollout.top_p"}),
        ("sft", ["rollout.top_p=0.9", *VALIDATED], {"rollout.top_p"}),
        ("sft", ["rollout.top_p=0.9", "rollout.val_temperature=1", "rollout.val_n=2", *VALIDATED], set()),
        ("grpo", ["rollout.val_n=2", *VALIDATED], {"rollout.val_n"}),
        ("sft", ["rollout.val_n=2", "data.val_files=v.jsonl"], {"rollout.val_n"}),
        (
            "grpo",
            ["rollout.val_n=2", "rollout.val_temperature=1"],
            {"rollout.val_n", "rollout.val_temperature"},
        ),
        ("grpo", ["data.truncation=drop"], {"data.truncation"}),
        ("grpo", ["data.truncation=drop", "tools.functions=[calculator]"], set()),
        (
            "grpo",
            ["algorithm.clip_ratio_low=0.1", "algorithm.dual_clip=3"],
            {"algorithm.clip_ratio_low", "algorithm.dual_clip"},
        ),
        ("grpo", ["algorithm.clip_ratio_high=0.3", "algorithm.ppo_mini_batch_size=64"], {"algorithm.clip_ratio_high"}),
        ("grpo", ["algorithm.policy_loss=cispo", "algorithm.clip_ratio_high=5"], {"algorithm.clip_ratio_high"}),
        ("grpo", ["algorithm.clip_ratio_high=0.3", "algorithm.ppo_mini_batch_size=63"], set()),
        ("grpo", ["algorithm.policy_loss=gspo", "algorithm.clip_ratio_high=4e-4", "algorithm.ppo_epochs=2"], set()),
        ("grpo", ["model.lora_rank=4", "model.lora_dropout=0.1"], {"model.lora_dropout"}),
        ("sft", ["model.lora_rank=4", "model.lora_dropout=0.1"], set()),
    ],
    ids=lambda given: str(sorted(given)) if isinstance(given, set) else str(given),
)
def test_what_has_no_effect_depends_on_the_command(command: str, arguments: list[str], expected: set[str]):
    found = [note["key"] for note in compose(arguments, command).ignored]
    assert sorted(found) == sorted(expected)


def test_names_of_other_systems_are_translated_and_told():
    resolved = compose(["ulysses_sequence_parallel_size=2"])
    assert resolved.config.engine.ulysses_sequence_parallel_size == 2
    assert resolved.translated == [
        {"given": "ulysses_sequence_parallel_size", "key": "engine.ulysses_sequence_parallel_size", "value": 2}
    ]


def test_methods_compose():
    config = compose(["method=[lora,sp2,offload,checkpointing]"]).config
    assert config.model.lora_rank == 16 and config.model.lora_alpha == 32
    assert config.model.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert config.engine.ulysses_sequence_parallel_size == 2 and config.engine.optimizer_offload


def test_processes_asked_for_have_no_effect_under_torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ignored("trainer.n_gpus_per_node=2") == {"trainer.n_gpus_per_node"}
    assert ignored("trainer.n_gpus_per_node=4") == set()
    across = ["trainer.n_gpus_per_node=4", "trainer.nnodes=2", "trainer.rdzv_endpoint=a:1", "trainer.max_restarts=1"]
    assert ignored(*across) == {"trainer.nnodes", "trainer.rdzv_endpoint", "trainer.max_restarts"}
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert ignored(*across) == {"trainer.rdzv_endpoint", "trainer.max_restarts"}
    monkeypatch.setenv("ROLE_NAME", "posttrain")  # workers of its own launcher
    assert ignored(*across) == set()


def test_slurms_tasks_are_not_started_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    assert ignored("trainer.nnodes=2", "trainer.rdzv_endpoint=a:1", "trainer.max_restarts=1") == {
        "trainer.max_restarts"
    }
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert ignored("trainer.nnodes=2", "trainer.rdzv_endpoint=a:1", "trainer.max_restarts=1") == set()


@pytest.mark.parametrize("endpoint", ["node1", ":29500", "node1:", "node1:0", "node1:70000", "node1:port"])
def test_an_endpoint_is_a_host_and_a_port(endpoint: str):
    assert "HOST:PORT" in problem(f"trainer.rdzv_endpoint='{endpoint}'")


# what is shown


def test_yaml_gives_the_same_config_again():
    arguments = ["model=qwen2.5-0.5b", "data=gsm8k", "model.revision=12e4", "optim.lr=1e-05", "trainer.save_freq=2ep"]
    arguments += ["model.override_config={text: '12e4', big: 1e30, none: null}", "trainer.experiment_name=\\${odd"]
    resolved = compose(arguments)
    Path("config.yaml").write_text(resolved.as_yaml())
    again = compose(["config.yaml"])
    assert again.config == resolved.config
    assert again.ignored == [note for note in resolved.ignored if note["key"] != "trainer.total_epochs"]
    assert set(again.origins.values()) == {"file config.yaml"}


def test_json_holds_every_option_with_its_origin():
    told = json.loads(compose(["optim.lr=1e-5", "rollout.top_p=0.9"]).as_json())
    assert told["options"].keys() == options().keys()
    assert told["options"]["optim.lr"] == {"value": 1e-5, "origin": "command line"}
    assert told["options"]["optim.betas"] == {"value": [0.9, 0.95], "origin": "default"}
    assert told["translated"] == []
    assert [note["key"] for note in told["ignored"]] == ["rollout.top_p"]


def test_table_holds_every_option_with_its_origin():
    text = shown_text(compose(["optim.lr=1e-5", "rollout.top_p=0.9", f"model.path={'long' * 60}"]), width=80)
    assert all(option.rpartition(".")[2] in text for option in options())
    assert "long" * 60 in "".join(text.split()).replace("commandline", "")
    assert "rollout.top_p has no effect: " in text


def test_options_in_force_are_printed_a_line_each_as_they_are_typed_however_narrow():
    out = subprocess.run(
        [sys.executable, "-m", "posttrain", "sft", "optim.lr=3e-5", "--print_config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "  model.enable_gradient_checkpointing=false  (default)" in out and "  optim.lr=3e-05  (command line)" in out


def test_help_holds_every_option_with_type_default_and_sentence():
    text = shown_text(describe_options(Config()))
    for option, field in options().items():
        assert f"  {option} = " in text
        assert " ".join((field.description or "").split())[:60] in text
    assert "data.truncation = error  error | drop | left | right" in text
    assert "data.train_files = []  list of text" in text
    of_grpo = shown_text(describe_options(compose([], "grpo").config))
    assert "optim.lr = 1e-06" in of_grpo and "trainer.best_metric = val_accuracy" in of_grpo


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.path", "text | null"),
        ("data.num_workers", "int >= 0 | null"),
        ("optim.min_lr_ratio", "float >= 0, <= 1"),
        ("optim.betas", "list of 2, each float >= 0, <= 1"),
        ("trainer.test_freq", "int | text"),
    ],
)
def test_type_of_an_option_is_readable(option: str, expected: str):
    assert type_name(options()[option].annotation, tuple(options()[option].metadata)) == expected
