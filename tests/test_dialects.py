"""How options of other systems are read, on a table of its own; what verl's tables say is in test_verl_*.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.config.arguments import Override, parse
from posttrain.config.compose import compose
from posttrain.config.describe import is_free, options
from posttrain.config.dialects.document import PAGES, page
from posttrain.config.dialects.tables import Row, Table, Version, read_table
from posttrain.config.dialects.translate import Setting, Translation, translate
from posttrain.errors import InputError

ROOT = Path(__file__).parents[1]


def rows_of_a_step(given) -> dict[str, Any]:
    if given("batch") == "all":
        raise InputError("batch=all: a step needs a number of rows.")
    return {"data.train_batch_size": given("batch") * (given("accumulate") or 1)}


ROWS = [
    Row("rate", ("optim.lr",)),
    Row("course", ("optim.lr_scheduler_type",), values={"cos": "cosine", "none": None}),
    Row("template.*", ("data.chat_template_kwargs.*",)),
    Row("batch", ("data.train_batch_size",), rule=rows_of_a_step),
    Row("accumulate", ("data.train_batch_size",), rule=rows_of_a_step),
    Row("shard", accepts=("fsdp", "fsdp2"), ignored="weights are sharded anyway", refused="choose fsdp"),
    Row("prefetch", ignored="blocks are fetched ahead anyway"),
    Row("tensor.*", refused="there is no tensor parallelism"),
    Row("*._target_", ignored="it names a class"),
    Row("optim.betas.first", ("optim.eps",)),
    Row("optim.lr_warmup_steps", ("optim.lr_warmup_steps",), values={"-1": None}),
]
OLD = Version("old", ("rate",), {"batch": 256, "optim.weight_decay": 0.3, "course": "cos"})
NEW = Version("new", ("course", "shard", "prefetch=2"), {"rate": 0.5})
TABLE = Table("other_sft", {row.key: row for row in ROWS}, (OLD, NEW))


def read(*arguments: str) -> Translation:
    settings = []
    for argument in arguments:
        given = parse(argument)
        assert isinstance(given, Override)
        settings.append(Setting(given.key, given.value, given.text, "command line", given.sign == "~"))
    return translate(settings, (TABLE,), frozenset(options()))


def values(*arguments: str) -> list[tuple[str, Any]]:
    return [(setting.key, setting.value) for setting in read(*arguments).settings]


def defaults(*arguments: str) -> dict[str, Any]:
    return {setting.key: setting.value for setting in read(*arguments).defaults}


def test_another_name_becomes_ours_at_its_place():
    assert values("optim.lr=1", "rate=2") == [("optim.lr", 1), ("optim.lr", 2)]
    assert values("rate=2", "optim.lr=1") == [("optim.lr", 2), ("optim.lr", 1)]
    assert read("+rate=2").translated == [{"given": "rate", "key": "optim.lr", "value": 2}]


def test_of_the_same_option_twice_the_last_is_read():
    assert values("rate=1", "rate=2") == [("optim.lr", 2)]
    assert values("rate=1", "~rate") == []


def test_values_have_other_names():
    assert values("course=cos") == [("optim.lr_scheduler_type", "cosine")]
    assert values("course=none") == []
    assert values("course=linear") == [("optim.lr_scheduler_type", "linear")]


def test_null_is_as_if_not_given():
    assert values("rate=null") == []


def test_an_option_of_ours_may_have_a_row_too():
    assert values("optim.lr_warmup_steps=-1") == []
    assert values("optim.lr_warmup_steps=3") == [("optim.lr_warmup_steps", 3)]
    assert read("optim.lr_warmup_steps=3").translated == []


def test_all_below_a_section_keeps_its_names():
    assert values("template.date=x", "+template.a.b=1") == [
        ("data.chat_template_kwargs.date", "x"),
        ("data.chat_template_kwargs.a.b", 1),
    ]


def test_a_rule_reads_all_its_options_at_the_place_of_the_last():
    assert values("batch=4", "optim.lr=1", "accumulate=8") == [("optim.lr", 1), ("data.train_batch_size", 32)]
    assert read("batch=4", "accumulate=8").translated == [
        {"given": "batch, accumulate", "key": "data.train_batch_size", "value": 32}
    ]
    assert read("batch=all").problems == ["batch=all: a step needs a number of rows."]


def test_what_a_rule_leaves_as_it_was_keeps_its_text_and_its_place():
    row = Row("data.prompt_key", ("data.prompt_key",), rule=lambda given: {"data.prompt_key": given("data.prompt_key")})
    settings = [
        Setting("data.prompt_key", 120000.0, "12e4", "file run.yaml"),
        Setting("optim.lr", 1, "1", "command line"),
    ]
    found = translate(settings, (Table("other_sft", {row.key: row}, ()),), frozenset(options()))
    assert found.settings == settings and found.translated == []


def test_null_for_an_option_of_ours_stands_over_a_recipe_by_rules_too():
    row = Row("optim.lr_warmup_steps", ("optim.lr_warmup_steps",), rule=lambda given: {})
    setting = Setting("optim.lr_warmup_steps", None, "null", "command line")
    assert translate([setting], (Table("other_sft", {row.key: row}, ()),), frozenset(options())).settings == [setting]


def test_a_default_that_a_rule_hands_on_is_no_translation():
    def both(given) -> dict[str, Any]:
        return {"data.train_batch_size": given("data.train_batch_size"), "data.max_length": given("longest")}

    rows = [Row(key, ("data.max_length",), rule=both) for key in ("longest", "data.train_batch_size")]
    table = Table(
        "other_sft", {row.key: row for row in rows}, (Version("only", ("longest",), {"data.train_batch_size": 256}),)
    )
    found = translate([Setting("longest", 8, "8", "command line")], (table,), frozenset(options()))
    assert [(setting.key, setting.value) for setting in found.defaults] == [("data.train_batch_size", 256)]
    assert found.translated == [{"given": "longest", "key": "data.max_length", "value": 8}]


def test_what_a_rule_makes_nothing_of_is_told():
    row = Row("pad", ("data.truncation",), rule=lambda given: {}, ignored="rows are never padded")
    found = translate(
        [Setting("pad", "left", "left", "command line")], (Table("other_sft", {"pad": row}, ()),), frozenset(options())
    )
    assert found.ignored == [{"key": "pad", "reason": "rows are never padded"}]


@pytest.mark.parametrize("argument", ["shard=fsdp", "shard=FSDP2", "shard=null", "prefetch=true", "tensor.size=null"])
def test_what_changes_nothing_is_told(argument: str):
    found = read(argument)
    assert found.settings == [] and found.problems == []
    assert [note["key"] for note in found.ignored] == [argument.partition("=")[0]]


@pytest.mark.parametrize("argument", ["shard=megatron", "tensor.size=2"])
def test_what_cannot_be_honoured_is_refused_by_name(argument: str):
    (problem,) = read(argument).problems
    assert problem.startswith(f"{argument} (command line): ")


def test_the_defaults_of_the_version_whose_options_were_given_hold():
    assert defaults("rate=1") == {
        "data.train_batch_size": 256,
        "optim.weight_decay": 0.3,
        "optim.lr_scheduler_type": "cosine",
    }
    assert defaults("course=cos", "shard=fsdp", "prefetch=true") == {"optim.lr": 0.5}
    assert defaults("prefetch=2") == {"optim.lr": 0.5}
    assert defaults("prefetch=true") == {}, "an option that all versions have tells nothing"
    assert defaults("optim.lr=1") == {}


def test_what_was_given_stands_over_a_default_and_completes_it():
    assert defaults("rate=1", "optim.weight_decay=0.1", "course=linear") == {"data.train_batch_size": 256}
    assert ("data.train_batch_size", 512) in values("rate=1", "accumulate=2")


def test_a_rule_that_reads_the_option_it_makes_stands_at_its_place():
    def doubled(given) -> dict[str, Any]:
        return {"data.train_batch_size": given("data.train_batch_size") * given("accumulate")}

    table = Table("other_sft", {"accumulate": Row("accumulate", ("data.train_batch_size",), rule=doubled)}, ())
    settings = [Setting(key, 8, "8", "command line") for key in ("accumulate", "data.train_batch_size")]
    found = translate(settings, (table,), frozenset(options()))
    assert found.settings[-1].value == 64
    assert found.translated[0]["given"] == "accumulate, data.train_batch_size"


def test_rules_see_recipes_where_they_count_from_them():
    """Under another system's defaults or over them; null for an option of ours says that a recipe does not count."""
    key = "data.train_batch_size"
    row = Row("accumulate", (key,), rule=lambda given: {key: (given.in_force(key) or 10) * given("accumulate")})
    known = {"accumulate": row, "old": Row("old", ignored="it is")}
    table = Table("other_sft", known, (Version("only", ("old",), {key: 256}),))

    def batch(*given: str, **layers: dict[str, int]) -> int:
        settings = [Setting(name, 2, "2", "command line") for name in ("accumulate", *given)]
        return translate(settings, (table,), frozenset(options()), **layers).settings[-1].value

    assert batch(lower={key: 3}) == batch(upper={key: 3}) == 6
    assert batch("old") == batch("old", lower={key: 3}) == 512
    assert batch("old", upper={key: 3}) == 6
    reset = [Setting(key, None, None, "here", reset=True), Setting("accumulate", 2, "2", "here")]
    assert translate(reset, (table,), frozenset(options()), upper={key: 3}).settings[-1].value == 20


def test_what_a_rule_hands_on_from_a_recipe_stays_the_recipes():
    key = "data.train_batch_size"
    row = Row("mini", (key,), rule=lambda given: {key: given.in_force(key), "optim.lr": given("mini")})
    found = translate(
        [Setting("mini", 2, "2", "command line")], (Table("o", {"mini": row}, ()),), frozenset(options()), {key: 64}
    )
    assert [setting.key for setting in found.settings] == ["optim.lr"] and found.defaults == []


@pytest.mark.parametrize(
    ("command", "arguments", "key", "value"),
    [
        ("grpo", ["data=math", "reward.path=x.py", "custom_reward_function.name=f"], "reward.name", ["f"]),
        ("grpo", ["method=quickstart-grpo", "algorithm.adv_estimator=rloo", "actor_rollout_ref.rollout.n=4"], "rollout.n", 4),
        ("grpo", ["trainer.eval_freq=1"], "trainer.save_freq", 20),
        ("sft", ["method=offload", "model.fsdp_config.cpu_offload=False"], "engine.param_offload", False),
        ("sft", ["method=lora", "model.peft_config.enable=true"], "model.lora_rank", 16),
        ("sft", ["method=lora", "model.peft_config.enable=true", "model.peft_config.r=4"], "model.lora_rank", 4),
        ("sft", ["model=qwen2.5-0.5b", "optim.lr_min=1e-6"], "optim.min_lr_ratio", 0.05),
    ],
)  # fmt: skip
def test_what_was_given_stands_over_a_recipe_by_rules_too(command: str, arguments: list[str], key: str, value: Any):
    section, option = key.split(".")
    assert getattr(getattr(compose(arguments, command).config, section), option) == value


def test_a_warm_up_in_steps_or_as_a_share_replaces_a_recipes_other_one():
    share = compose(["method=quickstart", "optim.lr_warmup_steps_ratio=0.1"], "sft").config.optim
    assert (share.lr_warmup_steps, share.lr_warmup_steps_ratio) == (None, 0.1)
    recipe = compose(["method=quickstart", "model.partial_pretrain=x"], "sft").config.optim
    assert (recipe.lr_warmup_steps, recipe.lr_warmup_steps_ratio) == (30, None)


def test_accumulated_steps_multiply_the_batch_size_in_force():
    """That of a recipe, of the command, or of the command line, in any order."""
    for command, arguments, rows in (
        ("sft", ["data=gsm8k", "gradient_accumulation_steps=4"], 256),
        ("sft", ["gradient_accumulation_steps=4"], 128),
        ("grpo", ["gradient_accumulation_steps=2"], 128),
        ("grpo", ["gradient_accumulation_steps=4", "data.train_batch_size=8"], 32),
        ("grpo", ["data.train_batch_size=8", "gradient_accumulation_steps=4"], 32),
    ):
        assert compose(arguments, command).config.data.train_batch_size == rows, arguments


def test_a_setting_may_name_options_of_the_other_system():
    assert dict(values("rate=3e-5", "trainer.experiment_name=r${rate}"))["trainer.experiment_name"] == "r3e-05"
    assert dict(values("rate=1", "trainer.experiment_name=b${batch}"))["trainer.experiment_name"] == "b256"
    assert values("shard=fsdp2", "rate=${oc.select:none,${batch}}", "batch=7")[0] == ("optim.lr", 7)
    assert read("batch=4", "prefetch=${tensor.size}", "shard=${shard}").problems == [
        "shard=${shard} (command line): choose fsdp."
    ]
    assert dict(values("optim.lr=1", "rate=${optim.lr}"))["optim.lr"] == "${optim.lr}", "ours are known later"


def test_a_mapping_under_an_option_of_ours_may_hold_the_other_systems():
    assert values("optim.betas={first: 0.5}") == [("optim.eps", 0.5)]
    given = compose(["algorithm.filter_groups={enable: true, metric: acc}"], "grpo").config.algorithm
    assert (given.filter_groups, given.filter_metric) == (True, "right")


def test_a_name_may_mean_the_same_in_any_section():
    assert read("a.b._target_=x", "tensor._target_=y").ignored == [
        {"key": key, "reason": "it names a class"} for key in ("a.b._target_", "tensor._target_")
    ]


def test_model_is_chosen_by_verls_word_and_by_ours():
    assert compose(["model=hf_model", "model.path=x"], "sft").config.model.path == "x"
    with pytest.raises(InputError, match="no such recipe; nearest"):
        compose(["model=qwen"], "sft")


def test_an_option_of_another_command_is_told_apart_from_an_unknown_one():
    with pytest.raises(InputError, match="option of `posttrain grpo`"):
        compose(["custom_reward_function.path=x.py"], "sft")
    with pytest.raises(InputError, match=r"there is no such option\. Nearest: actor_rollout_ref\.actor\.strategy"):
        compose(["actor_rollout_ref.actor.strateggy=fsdp"], "grpo")


def test_lists_may_be_left_in_quotes():
    assert values("batch='4'") == [("data.train_batch_size", "4")]
    assert read("shard='[fsdp]'").problems != []


def test_an_unknown_option_names_the_nearest_of_the_other_system():
    with pytest.raises(InputError, match=r"custom_reward_function\.path"):
        compose(["custom_reward_function.pth=x.py"], "grpo")


@pytest.mark.parametrize("name", PAGES)
def test_pages_show_the_tables_as_they_are(name: str):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page(name), (
        "render them again, as docs/dialects.md says"
    )


@pytest.mark.parametrize("name", ["verl_sft", "verl_grpo", "tutorials"])
def test_tables_lead_to_options_that_exist(name: str):
    table = read_table(name)
    below = tuple(f"{option}." for option in options() if is_free(option))
    made = [(row.key, ours) for row in table.rows.values() for ours in row.becomes]
    assert [one for one in made if one[1] not in options() and not one[1].startswith(below)] == []
    assert [row.key for row in table.rows.values() if not (row.becomes or row.ignored or row.refused)] == []
    for version in table.versions:
        assert [key for key in version.defaults if not (table.row(key) or key in options())] == []
        assert [key for key in version.known_by if not _leads_somewhere(table, key)] == []


def _leads_somewhere(table: Table, known: str) -> bool:
    """Whether there is a row about the key, or with `.*` at its end about anything below."""
    known = known.partition("=")[0]
    section = known.removesuffix("*")
    return table.row(known) is not None or any(section != known and key.startswith(section) for key in table.rows)
