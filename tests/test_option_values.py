"""Values as other systems' scripts write them: quotes left in, one for a list, templates, null."""

import pytest

from posttrain.config.compose import Resolved, compose
from posttrain.errors import InputError

TEMPLATES = [
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "{{ bos }}{% if x == 1 %}${{ price }} ${y} \"a\" 'b'\t{% endif %}\n",
    "{# said first #}<|im_start|>{{ messages[0].content }}",
    "<|im_start|>{% set a = [1,2] %}{{ a }}",
    "[INST] {{ messages[0]['content'] }} [/INST]",
    "~/{{ messages }}$HOME",
]


def value(resolved: Resolved, key: str):
    section, option = key.split(".")
    return getattr(getattr(resolved.config, section), option)


@pytest.mark.parametrize("argument, expected", [
    ("vllm.devices=3", [3]), ("vllm.devices=\"[0,1]\"", [0, 1]), ("vllm.devices='[0]'", [0]),
    ("optim.betas=\"[0.9,0.95]\"", (0.9, 0.95)), ("optim.betas='[0.9, 0.999]'", (0.9, 0.999)),
    ("data.train_files=\"['a.parquet','b.parquet']\"", ["a.parquet", "b.parquet"]),
    ("data.train_files=['a.parquet','b.parquet']", ["a.parquet", "b.parquet"]),
    ("data.train_files=a.parquet", ["a.parquet"]), ("data.val_files=\"[a.parquet]\"", ["a.parquet"]),
    ("data.train_roles=tool", ["tool"]), ("data.train_roles=\"['tool', 'assistant']\"", ["tool", "assistant"]),
    ("trainer.logger=\"['console','wandb']\"", ["console", "wandb"]), ("trainer.logger=wandb", ["wandb"]),
    ("model.target_modules=\"[q_proj,v_proj]\"", ["q_proj", "v_proj"]), ("model.target_modules=all-linear", ["all-linear"]),
    ("tools.functions=calculator", ["calculator"]), ("tools.functions=\"['calculator']\"", ["calculator"]),
    ("+reward.name=\"['format','length']\"", ["format", "length"]), ("++reward.name=math", ["math"]),
    ("reward.name=[math]", ["math"]), ("data.system_prompt='[be brief]'", "[be brief]"),
    ("trainer.project_name='[a]'", "[a]"),
])  # fmt: skip
def test_a_list_may_be_written_as(argument: str, expected):
    resolved = compose([argument])
    assert value(resolved, argument.partition("=")[0].lstrip("+")) == expected


def test_weights_of_rewards_may_be_one_or_have_their_quotes_left_in():
    assert compose(["reward.weights=2"]).config.reward.weights == [2.0]
    both = ["reward.name=[math,format]", 'reward.weights="[1,0.5]"']
    assert compose(both).config.reward.weights == [1.0, 0.5]


@pytest.mark.parametrize("wrong", ["vllm.devices=\"['a']\"", 'optim.betas="[0.9]"', "optim.betas=0.9"])
def test_a_list_of_the_wrong_things_is_still_refused(wrong: str):
    with pytest.raises(InputError, match=wrong.partition("=")[0]):
        compose([wrong])


def test_the_same_key_twice_means_the_last():
    given = ["optim.lr=1", "data.train_files=a", "optim.lr=2e-5", "++optim.lr=3e-5", "data.train_files=[b,c]"]
    config = compose(given).config
    assert (config.optim.lr, config.data.train_files) == (3e-5, ["b", "c"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("sign", ["", "+"])
def test_a_template_as_a_value_stays_as_it_is(template: str, sign: str, tmp_path):
    resolved = compose([f"{sign}data.chat_template={template}"])
    assert resolved.config.data.chat_template == template
    (tmp_path / "config.yaml").write_text(resolved.as_yaml())
    assert compose([str(tmp_path / "config.yaml")]).config.data.chat_template == template


def test_a_template_in_quotes_is_the_one_inside():
    assert compose(["data.chat_template='{{ a }} ${b}'"]).config.data.chat_template == "{{ a }} ${b}"


def test_a_template_that_is_a_file_stays_a_path(monkeypatch):
    monkeypatch.setenv("HERE", "/somewhere")
    assert compose(["data.chat_template=$HERE/t.jinja"]).config.data.chat_template == "/somewhere/t.jinja"


def test_null_leaves_what_is_never_null_at_its_default_and_says_so():
    resolved = compose(["method=sp2", "engine.ulysses_sequence_parallel_size=null", "data.max_length=null",
                        "model.target_modules=null", "data.val_files=null", "trainer.max_ckpt_to_keep=null",
                        "trainer.seed=null", "trainer.seed=7", "model.override_config.a=null"])  # fmt: skip
    assert value(resolved, "engine.ulysses_sequence_parallel_size") == 1 and value(resolved, "trainer.seed") == 7
    assert value(resolved, "data.max_length") == 4096 and value(resolved, "model.target_modules") == ["all-linear"]
    assert value(resolved, "data.val_files") == [] and value(resolved, "model.override_config") == {"a": None}
    assert value(resolved, "trainer.max_ckpt_to_keep") is None  # which may be null, and then keeps all
    told = {note["key"]: note["reason"] for note in resolved.ignored if "null" in note["reason"]}
    assert told.keys() == {"engine.ulysses_sequence_parallel_size", "data.max_length", "model.target_modules"}
    assert told["data.max_length"] == "null leaves it at its default, 4096"
    assert resolved.origins["data.max_length"] == "default"


@pytest.mark.parametrize("command, arguments, expected", [
    ("sft", ["data.val_max_samples=3"], {"data.val_max_samples"}),
    ("sft", ["data.val_max_samples=3", "data.val_files=v.parquet"], set()),
    (None, ["data.val_max_samples=3", "data.val_files=v.parquet"], {"data.val_max_samples"}),
    ("sft", ["trainer.resume_from_path=x", "trainer.resume_mode=disable"], {"trainer.resume_from_path"}),
    ("sft", ["trainer.resume_from_path=x"], set()),
])  # fmt: skip
def test_what_has_no_effect_is_told(command: str, arguments: list[str], expected: set[str]):
    found = {note["key"] for note in compose(arguments, command).ignored}
    assert found & {"data.val_max_samples", "trainer.resume_from_path"} == expected
