"""Answers with their rewards, for people: a few on the console, all of a step in the run folder."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from posttrain.data.formats import prompt_of
from posttrain.data.images.names import reference_of
from posttrain.errors import RunError
from posttrain.loops.experience import Experience
from posttrain.losses.advantage import groups
from posttrain.records import Completion
from posttrain.run.folder import RunFolder
from posttrain.run.progress import Display

SHOWN_CHARACTERS = 400


def show_answers(found: Experience, step: int, display: Display, folder: RunFolder) -> None:
    """Print the best and the worst answer to the prompt whose rewards differ most, and write all to samples/step-<N>.jsonl.

    Only the main process calls this.
    """
    if not len(found):
        return
    members = max(groups(found.prompts_N), key=lambda group: _spread(found.rewards_N[group]))
    display.say(f"step {step}: {_short(found.problems[members[0]].question)}")
    known = [i for i in members if not np.isnan(found.rewards_N[i])] or [members[0]]
    best, worst = max(known, key=lambda i: found.rewards_N[i]), min(known, key=lambda i: found.rewards_N[i])
    for i in dict.fromkeys((best, worst)):
        reward = "unknown" if np.isnan(found.rewards_N[i]) else f"{found.rewards_N[i]:.3g}"
        display.say(f"  reward {reward}: {_short(found.completions[i].text)}")
    place = folder.path / "samples"
    try:
        place.mkdir(exist_ok=True)
        lines = (json.dumps(record(found, i), ensure_ascii=False) + "\n" for i in range(len(found)))
        (place / f"step-{step}.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise RunError(f"Cannot write {place}: {error}. Checkpoints are untouched.") from None


def record(found: Experience, i: int) -> dict[str, Any]:
    """An answer as a line of samples/step-<N>.jsonl; `--completions` reads it."""
    completion, score, problem = found.completions[i], found.scores[i], found.problems[i]
    plain = not completion.earlier and np.array_equal(completion.prompt_ids_T, problem.prompt_ids_T)
    known = all(s.logprobs_T is not None for piece in completion.pieces for s in piece.segments if s.trained)
    written = [_written(piece, known) for piece in completion.pieces]
    asked = [{"prompt_ids": piece.prompt_ids_T.tolist()} for piece in completion.pieces]
    reward = float(found.rewards_N[i])
    return {
        "row": int(found.prompts_N[i]),
        "prompt": prompt_of(problem.conversation.messages),
        **({"images": [reference_of(image.source) for image in problem.images]} if problem.images else {}),
        "text": completion.text,
        "reward": reward if reward == reward else None,
        "verdict": str(score.verdict),
        "parts": score.parts,
        **({"problem": score.problem} if score.problem else {}),
        "ground_truth": problem.ground_truth,
        "cut": not completion.stopped,
        **(written[0] if plain else {"pieces": [a | w for a, w in zip(asked, written, strict=True)]}),
    }


def _written(piece: Completion, known: bool) -> dict[str, Any]:
    """The ids, `known` log-probabilities with 0 for what a tool wrote, and who wrote what, unless the model wrote all."""
    ids = [token for segment in piece.segments for token in segment.ids_T.tolist()]
    trained = [int(segment.trained) for segment in piece.segments for _ in segment.ids_T]
    logprobs: list[float] = []
    for segment in piece.segments if known else ():
        logprobs += [0.0] * len(segment.ids_T) if segment.logprobs_T is None else segment.logprobs_T.tolist()
    return {
        "ids": ids,
        **({"logprobs": logprobs} if known else {}),
        **({"trained": trained} if not all(trained) else {}),
    }


def _short(text: str) -> str:
    shown = " ⏎ ".join(text.splitlines())
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]} ... ({len(text):,} characters)"


def _spread(rewards: np.ndarray) -> float:
    known = rewards[~np.isnan(rewards)]
    return float(np.ptp(known)) if len(known) else -1.0
