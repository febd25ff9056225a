"""The proof that an engine computes what transformers does, before it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.data.batches import pack
from posttrain.data.images.processor import ImageText
from posttrain.distributed.sharding import at_rest
from posttrain.engine.engine import Engine
from posttrain.errors import InputError, RunError
from posttrain.models.kernels import fused_parts
from posttrain.models.load import load_model
from posttrain.models.policy import Policy
from posttrain.models.vision import Images
from posttrain.records import MicroBatch, Sample

PROBE_LENGTHS = (7, 5)
PROBE_IMAGES = (((60, 84),), ((140, 56), (56, 56)))  # width and height of each image of two further documents
# largest difference in float32; mean difference in bfloat16, whose kernels round differently
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def probe(vocabulary: int, images: ImageText | None = None) -> MicroBatch:
    """Two short documents packed into one row, every token of which counts; with `images` two more that hold some."""
    ids = np.arange(3, 3 + 11 * sum(PROBE_LENGTHS), 11, dtype=np.int32) % vocabulary
    parts = np.split(ids, np.cumsum(PROBE_LENGTHS)[:-1])
    if images is None:
        return pack([Sample(row, part, np.ones(len(part), dtype=np.float32)) for row, part in enumerate(parts)])
    written = {(w, h): images.ids(w, h) for sizes in PROBE_IMAGES for w, h in sizes}
    plain = np.setdiff1d(np.arange(vocabulary, dtype=np.int32), np.concatenate(list(written.values())))
    parts = [plain[part % len(plain)] for part in parts]
    arrays: list[dict[str, np.ndarray]] = [{} for _ in parts]
    for sizes in PROBE_IMAGES:
        pictures, pieces = [], [parts[0][:3]]
        for number, (width, height) in enumerate(sizes):
            pictures.append(_noise(width, height, number))
            pieces += [written[width, height], parts[0][3 : 5 + number]]
        parts.append(np.concatenate(pieces))
        arrays.append(images.arrays(pictures))
    packed = pack([Sample(row, part, np.ones(len(part), dtype=np.float32)) for row, part in enumerate(parts)])
    return replace(packed, images=lambda: tuple(arrays))


def _noise(width: int, height: int, seed: int) -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@torch.no_grad()
def check_engine(engine: Engine, dtype: torch.dtype, images: ImageText | None = None) -> None:
    """Compare our log-probabilities of packed documents, some with images if those are given, with transformers' own. Every
    process must call this.

    Raises InputError where they differ: a model whose layers carry state across documents, or which changes its logits in
    a way unknown here, would train on something else than it computes in use.
    """
    policy, device = engine.policy, engine.world.device.torch_device
    row = probe(len(policy.head().weight_VD), images)
    ids_T, labels_T = (torch.from_numpy(np.maximum(array, 0)).to(device) for array in (row.ids_T, row.labels_T))
    seen = Images(policy.vision.taken(row.images()), device) if policy.vision and row.images else None
    policy.eval()
    with torch.compiler.set_stance("force_eager"):  # lengths that no training row will have again
        (ours_T,) = engine.forward([row])
        theirs_T = policy.reference_logprobs(ids_T, labels_T, list(row.lengths_N), seen).cpu().numpy()
    at_rest(policy)
    gaps = np.abs(ours_T - theirs_T)[row.weights_T > 0]
    gap = float(gaps.max() if dtype == torch.float32 else gaps.mean())
    if not gap < TOLERANCE[dtype]:
        raise InputError(
            f"{type(policy.lm).__name__}: log-probabilities differ from the model's own by {gap:.2g}. "
            + _advice(policy)
        )


def _advice(policy: Policy) -> str:
    if fused_parts(policy.lm):
        return "Set model.use_liger=false: its kernels may not be those of this model. If it still differs, set data.packing=false."
    if policy.packing:
        return "Set data.packing=false."
    return "Its documents run one by one already, so that posttrain cannot train this model; please report it."


@torch.no_grad()
def check_export(engine: Engine, folder: Path, exact: bool, trust: bool = False) -> None:
    """Load what was written as its users will and compare its log-probabilities with the engine's. Every process must call this.

    `exact`: both compute in float32. `trust`: code that came with the model may run. Raises RunError where they differ, as when adapters were not merged.
    """
    row = probe(len(engine.policy.head().weight_VD))
    (ours_T,) = engine.forward([row])

    def compare() -> None:
        model = load_model(str(folder), dtype=torch.float32 if exact else torch.bfloat16, trust=trust).eval()
        ids_T, labels_T1 = torch.from_numpy(row.ids_T), torch.from_numpy(np.maximum(row.labels_T, 0))[:, None]
        logits = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in ids_T.split(PROBE_LENGTHS)]
        tempered = torch.cat(logits).float() / engine.policy.temperature
        theirs_T = tempered.log_softmax(-1).gather(1, labels_T1)[:, 0].numpy()
        gaps = np.abs(ours_T - theirs_T)[row.weights_T > 0]
        gap = float(gaps.max() if exact else gaps.mean())
        if not gap < TOLERANCE[torch.float32 if exact else torch.bfloat16]:
            raise RunError(
                f"{folder} was read back and its log-probabilities differ from the trained model's by {gap:.2g}, so it is not "
                "what was trained. Checkpoints are untouched; please report this."
            )

    engine.world.on_main(compare)
