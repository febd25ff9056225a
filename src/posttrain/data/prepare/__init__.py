"""Published data sets, and drawn ones -> parquet files for SFT, evaluation and reinforcement learning, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from posttrain.data.prepare.conversations import CHAT, MULTITURN
from posttrain.data.prepare.data_set import prepare
from posttrain.data.prepare.hellaswag import HELLASWAG
from posttrain.data.prepare.images import GEO3K
from posttrain.data.prepare.questions import GSM8K, GSM8K_MULTITURN_SFT, MATH
from posttrain.data.prepare.retool import RETOOL
from posttrain.data.prepare.shapes import prepare_shapes

prepare_gsm8k = partial(prepare, GSM8K)

# by the name that `posttrain data prepare` takes: (local_dataset_path, local_save_dir, hdfs_dir) -> summary;
# shapes takes difficulty, rows and seed too
PREPARE: dict[str, Callable[..., dict[str, Any]]] = {
    "gsm8k": prepare_gsm8k,
    "gsm8k_multiturn_sft": partial(prepare, GSM8K_MULTITURN_SFT),
    "multiturn": partial(prepare, MULTITURN),
    "retool": partial(prepare, RETOOL),
    "hellaswag": partial(prepare, HELLASWAG),
    "math": partial(prepare, MATH),
    "geo3k": partial(prepare, GEO3K),
    "shapes": prepare_shapes,
    "chat": partial(prepare, CHAT),
}
