"""The real GSM8K rows with the real Qwen2.5 tokenizer and template, and a small Qwen2 model."""

import json
import shutil

import pytest

from conftest import records


@pytest.fixture(scope="module")
def qwen(shared_data, tmp_path_factory):
    """A model folder with Qwen2.5's tokenizer and template, and a config of two small layers; no weights."""
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("qwen")
    shutil.copytree(shared_data / "tokenizers" / "Qwen2.5", folder, dirs_exist_ok=True)
    shutil.copy(shared_data / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja", folder / "chat_template.jinja")
    Qwen2Config(vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, tie_word_embeddings=True).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def gsm8k(shared_data, tmp_path_factory):
    from posttrain.data.prepare import prepare_gsm8k

    folder = tmp_path_factory.mktemp("gsm8k")
    prepare_gsm8k(str(shared_data / "gsm8k"), str(folder))
    return folder


@pytest.mark.slow
def test_decoded_trained_tokens_of_every_row_are_the_answer_and_its_end_token(qwen, gsm8k, tmp_path):
    from functools import partial

    import pyarrow.parquet

    from posttrain.data.formats import Columns
    from posttrain.data.sources import find_sources
    from posttrain.data.tokenized import load_tokenized
    from posttrain.loops.training_data import make_chat

    chat = partial(make_chat, str(qwen), None, None, False)
    file = gsm8k / "train.parquet"
    data = load_tokenized(find_sources([str(file)], "data.train_files"), Columns(), chat, str(tmp_path))
    answers = pyarrow.parquet.read_table(file).column("response").to_pylist()
    assert len(data) == len(answers) == 7473
    tokenizer = chat().tokenizer
    trained = [sample.ids_T[sample.weights_T > 0] for sample in (data[i] for i in range(len(data)))]
    assert tokenizer.batch_decode(trained) == [answer + "<|im_end|>" for answer in answers]


def test_training_on_real_rows_lowers_the_loss(qwen, gsm8k, posttrain):
    done = posttrain.sft("run", data__train_files=gsm8k / "train.parquet", model__path=qwen, model__random_weights="true",
                         data__train_batch_size=8, trainer__total_training_steps=12, optim__lr=0.01)  # fmt: skip
    losses = [r["loss"] for r in records(posttrain.folder / "run")]
    assert losses[0] == pytest.approx(11.93, abs=0.1)  # log 151,936: every word alike
    assert losses[-1] < losses[0] - 2
    assert "7,473 of 7,473 rows" in done.stdout


def test_data_show_prints_what_is_trained(qwen, gsm8k, posttrain):
    arguments = ("data", "show", "--files", gsm8k / "test.parquet", "--tokenizer", qwen, "--rows", "2")
    rows = [json.loads(line) for line in posttrain(*arguments, "--json").stdout.splitlines()]
    assert [row["row"] for row in rows] == [0, 1]
    for row in rows:
        assert len(row["ids"]) == len(row["pieces"]) == len(row["trained"]) == len(row["roles"])
    trained = "".join(p for p, t in zip(rows[0]["pieces"], rows[0]["trained"], strict=True) if t)
    assert trained.startswith("Janet sells 16 - 3 - 4 = <<16-3-4=9>>9") and trained.endswith("#### 18<|im_end|>")
    coloured = posttrain(*arguments, FORCE_COLOR="1").stdout
    assert "\x1b[1;32m####" in coloured and "\x1b[4;90m<|im_start|>" in coloured  # trained, and not
