"""Every recipe resolves, fits the GPUs that it names, says why, and runs; a list of them is there at once."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

import forked
from posttrain.config import catalog
from posttrain.config.arguments import read_recipe
from posttrain.config.catalog import Page, find_page, job_gib, merged, pages, weights_gib
from posttrain.config.checks import check_grpo
from posttrain.config.compose import compose
from posttrain.config.describe import options
from posttrain.config.schema import Config
from posttrain.config.stages import read_stages
from posttrain.errors import InputError
from posttrain.models.load import find_model, load_tokenizer

HERE = Path(__file__).parent
SAYS = {
    "about", "model_type", "billion_weights", "prepare", "command", "gpus", "gpu_gb", "needs", "time", "result", "folder", "stages", "model",
    "data",
}  # fmt: skip
NAMES = {  # what needs no reason: it says what is used or where it lies
    "model.path", "data.train_files", "data.val_files", "data.hub_config", "data.messages_key", "data.prompt_key",
    "data.response_key", "data.tools_key", "trainer.default_local_dir",
}  # fmt: skip
JOBS = [page for page in pages() if page.group == "job"]
SEES = {"gemma3", "idefics3", "llava", "qwen2_5_vl", "qwen3_vl"}  # kinds of models that see images


def of(group: str) -> list[str]:
    return [page.name for page in pages() if page.group == group]


# what they say


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.title)
def test_every_recipe_says_what_it_is_for_and_why(page: Page):
    about = page.about
    assert set(about) <= SAYS and about["about"].endswith(".")
    assert set(page.lines) == set(_flat(yaml.safe_load(page.path.read_text())))
    silent = [key for key, line in page.lines.items() if not line.reason and key not in NAMES]
    assert not silent, f"{page.title} gives no reason for {silent}"
    for told in ("time", "result"):  # nobody ran these here: someone else's figures are said to be that
        assert "verl" in about.get(told, "verl") or "tutorial" in about[told] or page.name.startswith("tiny-")
    if page.group == "model":
        assert {"model_type"} < set(about) and {"model.path", "optim.lr"} <= set(page.lines)
    assert needs_are_numbers(page)


def needs_are_numbers(page: Page) -> bool:
    return ("gpus" in page.about) == ("gpu_gb" in page.about)


def _flat(tree: dict) -> list[str]:
    tree = {name: value for name, value in (tree or {}).items() if name not in ("recipe", "defaults")}
    return [f"{section}.{option}" for section, own in tree.items() for option in own]


def test_jobs_fit_the_gpus_that_they_name_with_room_for_activations():
    with_gpus = [page for page in JOBS if "gpus" in page.about and "stages" not in page.about]
    for page in with_gpus:
        assert job_gib(page) < 0.75 * page.about["gpu_gb"], page.title
        assert int(merged(page).get("trainer.n_gpus_per_node", [catalog.Line("1", "")])[0].text) == page.about["gpus"]
    assert len(with_gpus) > 10


def test_memory_is_four_float32_numbers_a_trained_weight():
    assert weights_gib(1.0) == pytest.approx(16e9 / 2**30)
    assert weights_gib(1.0, offloaded="optimizer") == weights_gib(1.0, halved=True) == weights_gib(1.0) / 2
    assert weights_gib(1.0, offloaded="optimizer param") == 0
    assert weights_gib(1.0, lora=True) == pytest.approx(2.02e9 / 2**30)


def test_recipes_are_known_by_their_names():
    assert find_page("sp2") == find_page("method/sp2") == find_page("method=sp2") == Page("method", "sp2")
    with pytest.raises(InputError, match=r"^qwen2.5-05b: .*Nearest: qwen2.5-0.5b.*`posttrain recipes` lists them"):
        find_page("qwen2.5-05b")
    names = of("model")
    assert names.index("qwen2.5-1.5b") < names.index("qwen2.5-7b") < names.index("qwen2.5-14b")
    assert names.index("smollm2-360m") < names.index("smollm2-1.7b")


# how they compose


def test_any_model_goes_with_any_data_and_any_method():
    values = {page: read_recipe(page.path, page.title).values for page in pages()}
    methods = [(), *((name,) for name in of("method")), ("lora", "sp2"), ("full", "long-context", "offload")]
    tried = 0
    for model in of("model"):
        for data in of("data"):
            for method in methods:
                chosen = [Page("model", model), Page("data", data), *(Page("method", name) for name in method)]
                tree: dict = {}
                for page in chosen:
                    for section, own in values[page].items():
                        tree.setdefault(section, {}).update(own)
                Config.model_validate(tree)
                tried += 1
    assert tried > 3000


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_what_composes_is_what_resolves(command):
    """One of each, round robin: each model with some data set and some method."""
    data, methods = (
        of("data"),
        [name for name in of("method") if find_page(f"method/{name}").command in ("sft", command)],
    )
    for place, model in enumerate(of("model")[::3]):
        chosen = data[place % len(data)], methods[place % len(methods)]
        resolved = compose([f"model={model}", f"data={chosen[0]}", f"method=[{chosen[1]}]"], command)
        if command == "grpo":
            check_grpo(resolved.config)
        assert resolved.config.model.path and resolved.config.data.train_files
        assert {"default", f"recipe model/{model}", f"recipe data/{chosen[0]}"} <= set(resolved.origins.values())


@pytest.mark.parametrize("page", JOBS, ids=lambda page: page.name)
def test_every_job_resolves(page: Page):
    if "stages" in page.about:
        for stage in read_stages(page.name, []):
            command, *arguments = stage.arguments
            if command != "evaluate":
                compose(arguments, command)
        return
    resolved = compose([f"job={page.name}"], page.command)
    if page.command == "grpo":
        check_grpo(resolved.config)
    assert [
        note
        for note in resolved.ignored
        if note["key"] not in ("data.max_length", "model.gradient_checkpointing_every")
    ] == []
    assert resolved.config.trainer.default_local_dir == f"checkpoints/{page.name}"


def test_a_job_is_a_file_that_chooses_and_anything_after_it_wins():
    def found(*arguments, command="sft"):
        resolved = compose([*arguments], command)
        return lambda key: (
            getattr(getattr(resolved.config, key.split(".")[0]), key.split(".")[1]),
            resolved.origins[key],
        )

    job = found("job=qwen2.5-0.5b-gsm8k")
    assert job("optim.lr") == (1e-5, "recipe job/qwen2.5-0.5b-gsm8k")
    assert job("data.max_length") == (1024, "recipe data/gsm8k")
    other = found("model=qwen2.5-1.5b", "job=qwen2.5-0.5b-gsm8k-lora", "optim.lr=3e-5", "+method=checkpointing")
    assert other("model.path") == ("Qwen/Qwen2.5-1.5B-Instruct", "recipe model/qwen2.5-1.5b")
    assert other("model.lora_rank")[0] == 16 and other("model.enable_gradient_checkpointing")[0] is True
    assert other("optim.lr") == (3e-5, "command line")
    replaced = found("job=qwen2.5-0.5b-gsm8k-lora", "method=[sp2]")
    assert replaced("model.lora_rank")[0] == 0 and replaced("engine.ulysses_sequence_parallel_size")[0] == 2


def test_a_file_may_build_on_a_job(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: {about: mine}\ndefaults:\n- job: qwen2.5-0.5b-gsm8k\noptim: {lr: 3e-6}\n")
    resolved = compose([str(file)], "sft")
    assert (resolved.config.optim.lr, resolved.config.trainer.total_epochs) == (3e-6, 10)


def test_jobs_of_other_commands_are_refused_by_name():
    for arguments, command, message in (
        (["job=qwen2-7b-gsm8k-grpo"], "sft", "run it by `posttrain grpo job=qwen2-7b-gsm8k-grpo`"),
        (["job=qwen2.5-0.5b-gsm8k"], "grpo", "run it by `posttrain sft job=qwen2.5-0.5b-gsm8k`"),
        (
            ["job=qwen2.5-0.5b-gsm8k-sft-grpo"],
            "sft",
            "`posttrain recipes run qwen2.5-0.5b-gsm8k-sft-grpo` runs in order",
        ),
        (["job=qwen2.5-gsm8k"], "sft", "there is no such recipe; nearest: qwen2.5-0.5b-gsm8k"),
        (["model=gpt"], "sft", "model=gpt: there is no such recipe; model has deepseek"),
    ):
        with pytest.raises(InputError, match=message.replace("`", ".")):
            compose(arguments, command)


def test_reinforcement_learning_keeps_its_rates_with_any_model_and_data():
    """The rates of models are for imitation: twenty times as high."""
    config = compose(["model=qwen2.5-0.5b", "data=gsm8k"], "grpo").config
    assert (config.optim.lr, config.data.train_batch_size) == (1e-6, 64)
    assert compose(["model=qwen2.5-0.5b", "data=gsm8k", "method=grpo-lora"], "grpo").config.optim.lr == 1e-5
    assert compose(["model=qwen2.5-0.5b", "optim.lr=3e-6"], "grpo").config.optim.lr == 3e-6


def test_the_tiny_model_needs_no_hub():
    folder = find_model("posttrain/tiny")
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Is 3 + 4 = 7 where é stands?"}], tokenize=False)
    assert tokenizer.decode(tokenizer(ids).input_ids) == ids
    assert json.loads(Path(folder, "config.json").read_text())["vocab_size"] == len(tokenizer)


# one's own, and stages


def test_a_copied_recipe_gives_the_same_options_with_the_same_reasons(tmp_path):
    for page in (find_page("qwen2.5-0.5b-gsm8k-lora"), find_page("qwen2-7b-gsm8k-grpo"), find_page("model/gemma-7b")):
        file = tmp_path / f"{page.name}.yaml"
        file.write_text(catalog.written_out(page))
        asked = f"{page.group}={page.name}"
        assert compose([str(file)], page.command).config == compose([asked], page.command).config
        for line, _ in merged(page).values():
            assert line.reason in file.read_text()


def test_stages_begin_with_the_model_of_the_training_before():
    name = "qwen2.5-0.5b-gsm8k-sft-grpo"
    given = ["trainer.n_gpus_per_node=2", "sft.optim.lr=3e-5", "evaluate.rollout.n=4"]
    sft, judged, grpo, judged_again = (stage.arguments for stage in read_stages(name, given, "home"))
    assert sft[0] == "sft" and compose(sft[1:], "sft").config.optim.lr == 3e-5
    assert judged[:2] == ["evaluate", "rollout.n=4"] and judged[-2:] == ["--model", "home/sft"]
    config = compose(grpo[1:], "grpo").config
    assert (config.model.path, config.trainer.default_local_dir, config.trainer.n_gpus_per_node) == (
        "home/sft",
        "home/grpo",
        2,
    )
    assert config.optim.lr == 5e-7 < compose(sft[1:], "sft").config.optim.lr
    assert judged_again[-1] == "home/grpo"
    assert read_stages("qwen2.5-0.5b-gsm8k", ["optim.lr=1"])[0].arguments == [
        "sft",
        "job=qwen2.5-0.5b-gsm8k",
        "optim.lr=1",
    ]
    with pytest.raises(InputError, match="has no such stage, only evaluate, grpo, sft"):
        read_stages(name, ["dpo.optim.lr=1"])
    with pytest.raises(InputError, match="is no job"):
        read_stages("qwen2.5-0.5b", [])


# the command


def test_the_list_is_there_at_once_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom posttrain import cli\nsys.argv = ['posttrain', 'recipes', '--json']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'hydra', 'omegaconf', 'rich', 'pydantic'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [(row["group"], row["name"]) for row in told] == [(page.group, page.name) for page in pages()]
    assert all(row["about"] and row["command"] for row in told)


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    """A folder in which recipes find their prepared rows, and a tiny model of each architecture without weights."""
    from posttrain.data.prepare import PREPARE
    from test_prepare import RETOOL

    forked.start_server()
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "retool").mkdir()
    (folder / "retool" / "train.jsonl").write_text((json.dumps(RETOOL) + "\n") * 6)
    sources = {"gsm8k_multiturn_sft": tiny / "problems", "multiturn": None, "retool": folder / "retool"}
    for name, source in sources.items():
        PREPARE[name](str(source) if source else None, str(folder / "data" / name))
    _write_architectures(folder / "models", len(load_tokenizer(str(tiny / "model"))))
    return folder


def _write_architectures(folder: Path, vocabulary: int) -> None:
    from transformers import AutoConfig

    shape = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    more = {"qwen3_moe": experts, "gemma2": {"sliding_window": 8}, "gemma3_text": {"sliding_window": 8}}
    for kind in _kinds(page for page in pages() if page.group == "model") - SEES:
        AutoConfig.for_model(kind, **shape, **more.get(kind, {})).save_pretrained(folder / kind)


def _tiny_arguments(page: Page, home: Path, tiny: Path) -> list[str]:
    """The job with a tiny model of the same architecture, rows that lie here, and two steps on CPU."""
    model = next(part for part in page.parts if part.group == "model").about["model_type"]
    data = next(part.name for part in page.parts if part.group == "data")
    given = {
        "trainer.total_training_steps": 2, "data.train_batch_size": 4, "trainer.device": "cpu", "trainer.save_freq": -1,
        "trainer.val_before_train": False, "data.cache_dir": home / "cache", "trainer.n_gpus_per_node": 1,
    }  # fmt: skip
    if model in SEES:
        given |= {"model.path": home / "models" / model, "reward.name": "exact_match"}
    elif page.about.get("gpus"):
        given |= {
            "model.path": home / "models" / model, "model.random_weights": True, "model.tokenizer_path": tiny / "model",
            "data.chat_template": HERE / "tool_template.jinja",
        }  # fmt: skip
    if data == "gsm8k":
        given |= {
            f"data.{kind}_files": tiny / "problems" / f"{split}.jsonl"
            for kind, split in (("train", "train"), ("val", "test"))
        }
    if page.command == "grpo":
        given |= {"rollout.n": 2, "rollout.max_new_tokens": 4, "trainer.num_val_generations": 2}
        given["algorithm.ppo_mini_batch_size"] = 4
    if "model.use_liger" in options():
        given["model.use_liger"] = False  # its kernels want a GPU
    return [page.command, f"job={page.name}", *(f"{key}={value}" for key, value in given.items())]


def _several(rank: int, size: int, home: Path, commands: list[list[str]]) -> None:
    """Several commands of posttrain in one process, which has then imported each architecture once."""
    from posttrain import cli

    os.chdir(home)
    for command in commands:
        sys.argv = ["posttrain", *command]
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, f"{command} ended with {end.code}"


def run_all(home: Path, commands: list[list[str]], size: int = 1) -> str:
    group = forked.start(_several, size, home, commands, said=home / "said")
    group.ends([0] * size)
    return group.output()


def test_every_job_of_one_process_runs(home, tiny):
    single = [page for page in JOBS if "stages" not in page.about and not _shares_rows(page) and not _sees(page)]
    run_all(home, [_tiny_arguments(page, home, tiny) for page in single])
    for page in single:
        state = json.loads((home / "checkpoints" / page.name / "run.json").read_text())
        assert (state["status"], state["step"]) == ("finished", 2), page.name


def test_every_job_whose_rows_are_shared_runs_on_two(home, tiny):
    double = [page for page in JOBS if "stages" not in page.about and _shares_rows(page)]
    for page in double:
        run_all(home, [_tiny_arguments(page, home, tiny)], size=2)
        state = json.loads((home / "checkpoints" / page.name / "run.json").read_text())
        assert (state["status"], state["world_size"]) == ("finished", 2), page.name


def _shares_rows(page: Page) -> bool:
    return "engine.ulysses_sequence_parallel_size" in merged(page)


def _kinds(models: Iterable[Page]) -> set[str]:
    return {page.about["model_type"] for page in models}


def _sees(page: Page) -> bool:
    return bool(_kinds(part for part in page.parts if part.group == "model") & SEES)


def test_architectures_that_no_job_has_learn_too(home, tiny):
    of_jobs = _kinds(part for page in JOBS for part in page.parts if part.group == "model")
    others = sorted(_kinds(page for page in pages() if page.group == "model") - of_jobs - SEES)
    assert others == ["gemma2", "gemma3_text", "qwen3_moe"]
    methods = dict(zip(others, ("full", "full", "lora"), strict=True))
    run_all(home, [[
        "sft", "data=gsm8k-multiturn", f"method=[{method}]", f"model.path={home / 'models' / kind}",
        "model.random_weights=true", f"model.tokenizer_path={tiny / 'model'}", "trainer.device=cpu",
        f"data.cache_dir={home / 'cache'}", f"trainer.default_local_dir={home / 'by-kind' / kind}",
        "trainer.total_training_steps=2", "trainer.save_freq=-1", "data.train_batch_size=4", "~data.val_files",
    ] for kind, method in methods.items()])  # fmt: skip
    assert len(list((home / "by-kind").glob("*/checkpoint-final/config.json"))) == len(others)
    assert len(list((home / "by-kind").glob("*/checkpoint-final/adapter"))) == 1


SEEN = ["full", "freeze-vision", "lora", "[freeze-vision,checkpointing]", "full"]


def test_models_that_see_images_learn_from_them(home, tiny, picture_rows):
    """One recipe of each kind, with its own settings of the processor, on drawn pictures."""
    models = {page.about["model_type"]: page.name for page in pages() if page.group == "model"}
    kinds = sorted(SEES)
    run_all(home, [[
        "sft", f"model={models[kind]}", "data=shapes", f"method={method}", f"model.path={home / 'models' / kind}",
        "trainer.device=cpu", f"data.cache_dir={home / 'cache'}", f"trainer.default_local_dir={home / 'seeing' / kind}",
        "trainer.total_training_steps=2", "trainer.save_freq=-1", "data.train_batch_size=4", "~data.val_files",
    ] for kind, method in zip(kinds, SEEN, strict=True)])  # fmt: skip
    for kind in kinds:
        state = json.loads((home / "seeing" / kind / "run.json").read_text())
        assert (state["status"], state["step"]) == ("finished", 2), kind
        final = home / "seeing" / kind / "checkpoint-final"
        assert any((final / name).exists() for name in ("processor_config.json", "preprocessor_config.json")), kind


def test_every_job_with_images_runs(home, tiny, picture_rows):
    seeing = [page for page in JOBS if "stages" not in page.about and _sees(page)]
    run_all(home, [_tiny_arguments(page, home, tiny) for page in seeing])
    for page in seeing:
        state = json.loads((home / "checkpoints" / page.name / "run.json").read_text())
        assert (state["status"], state["step"]) == ("finished", 2), page.name


@pytest.fixture(scope="module")
def picture_rows(home) -> None:
    """What recipes of images name: drawn pictures, problems with figures, rows of one's own, and a tiny model of each kind."""
    from PIL import Image

    from posttrain.data.prepare import PREPARE
    from posttrain.data.prepare.shapes import prepare_shapes
    from tiny_vision import write_tiny_vision_model

    prepare_shapes(None, str(home / "data" / "shapes"), rows=8)
    own, figures = home / "data" / "images", home / "figures"
    for folder in (own, figures):
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(folder / "1.png")
    talk = [{"role": "user", "content": "<image>Which colour?"}, {"role": "assistant", "content": "red"}]
    problem = {"problem": "<image>How long is AB?", "answer": "3", "images": ["1.png"]}
    for split in ("train", "test"):
        (own / f"{split}.jsonl").write_text((json.dumps({"messages": talk, "images": ["1.png"]}) + "\n") * 4)
        (figures / f"{split}.jsonl").write_text((json.dumps(problem) + "\n") * 4)
    PREPARE["geo3k"](str(figures), str(home / "data" / "geo3k"))
    for kind in SEES:
        write_tiny_vision_model(home / "models" / kind, kind)


def test_sft_then_grpo_runs_end_to_end(home, tiny):
    tiny_steps = ["trainer.total_training_steps=2", "data.train_batch_size=4", "trainer.device=cpu", "trainer.num_val_generations=2",
                  "rollout.max_new_tokens=4", "trainer.val_before_train=false", f"data.cache_dir={home / 'cache'}"]  # fmt: skip
    first = [f"sft.model.path={tiny / 'model'}", "grpo.rollout.n=2", "evaluate.trainer.device=cpu"]
    stages = read_stages("qwen2.5-0.5b-gsm8k-sft-grpo", [*tiny_steps, *first], "end-to-end")
    said = run_all(home, [stage.arguments for stage in stages])
    assert said.count("accuracy ") == 2
    config = yaml.safe_load((home / "end-to-end" / "grpo" / "config.yaml").read_text())
    assert config["model"]["path"] == "end-to-end/sft"
    assert (home / "end-to-end" / "grpo" / "checkpoint-final" / "config.json").exists()


@pytest.mark.slow
def test_a_job_of_several_commands_goes_on_where_it_was_stopped(home, tiny):
    def run(*more: str, code: int = 0) -> str:
        arguments = [
            "recipes", "run", "qwen2.5-0.5b-gsm8k-sft-grpo", "--folder", "stopped", "trainer.total_training_steps=2",
            "data.train_batch_size=4", "trainer.device=cpu", "trainer.num_val_generations=2", "rollout.max_new_tokens=4",
            "trainer.val_before_train=false", f"data.cache_dir={home / 'cache'}", f"sft.model.path={tiny / 'model'}",
            "grpo.rollout.n=2", "evaluate.trainer.device=cpu", *more,
        ]  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "posttrain", *arguments], cwd=home, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout

    assert "$ posttrain evaluate" not in run("sft.data.max_length=10", code=2)  # rows are longer: it stops there
    before = (run("grpo.rollout.n=1", code=2), (home / "stopped" / "sft" / "metrics.jsonl").read_text())
    assert before[0].count("accuracy ") == 1
    assert run().count("accuracy ") == 2
    assert (home / "stopped" / "sft" / "metrics.jsonl").read_text() == before[1], "SFT was trained again"


def test_show_copy_and_run_say_what_they_do(tmp_path):
    def posttrain(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "posttrain", *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    shown = json.loads(posttrain("recipes", "show", "qwen2.5-0.5b-gsm8k-lora", "--json"))
    assert shown["options"]["model.lora_rank"] | {"reason": ""} == {
        "value": 16,
        "origin": "recipe method/lora",
        "reason": "",
    }
    assert "most tasks" in shown["options"]["model.lora_rank"]["reason"]
    assert "posttrain sft my.yaml" in posttrain("recipes", "copy", "qwen2.5-0.5b-gsm8k-lora", "my.yaml")
    assert "is there already" in posttrain("recipes", "copy", "lora", "my.yaml", code=2)
    said = posttrain("recipes", "run", "qwen2.5-0.5b-gsm8k-sft-grpo", "sft.optim.nonsense=1", code=2)
    assert (
        "$ posttrain sft model=qwen2.5-0.5b" in said
        and "there is no such option" in said
        and "posttrain grpo" not in said
    )


# the pages


@pytest.mark.parametrize("name", ["recipes", "choosing"])
def test_names_in_the_docs_are_recipes(name):
    text = (HERE.parent / "docs" / f"{name}.md").read_text()
    chosen = re.findall(r"(?<![.\w])(model|data|method|job)=\[?([a-z0-9.,-]*[a-z0-9])", text)
    assert chosen
    for group, names in chosen:
        for one in names.split(","):
            find_page(f"{group}/{one}")


def test_the_page_has_the_table_of_recipes():
    text = (HERE.parent / "docs" / "recipes.md").read_text()
    begin, end = "<!-- recipes -->\n", "<!-- end -->"
    assert text.partition(begin)[2].partition(end)[0] == catalog.as_markdown(), (
        "the table in docs/recipes.md is old: put in what `python -m posttrain.config.catalog` prints"
    )
