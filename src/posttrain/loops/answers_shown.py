"""Answers with their rewards, for people: a few on the console, all of a step in the run folder."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from posttrain.data.formats import prompt_of
from posttrain.errors import RunError
from posttrain.loops.experience import Experience
from posttrain.losses.advantage import groups
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
    display.say(f"step {step}: {_short(_question(found, members[0]))}")
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
    completion, score = found.completions[i], found.scores[i]
    ids: list[int] = []
    logprobs: list[float] = []
    trained: list[int] = []
    for segment in completion.segments:
        ids += segment.ids_T.tolist()
        trained += [int(segment.trained)] * len(segment.ids_T)
        logprobs += [0.0] * len(segment.ids_T) if segment.logprobs_T is None else segment.logprobs_T.tolist()
    known = all(segment.logprobs_T is not None for segment in completion.segments if segment.trained)
    reward = float(found.rewards_N[i])
    return {
        "row": int(found.prompts_N[i]),
        "prompt": prompt_of(found.problems[i].conversation.messages),
        "text": completion.text,
        "reward": reward if reward == reward else None,
        "verdict": str(score.verdict),
        "parts": score.parts,
        **({"problem": score.problem} if score.problem else {}),
        "ground_truth": found.problems[i].ground_truth,
        "cut": not completion.stopped,
        "ids": ids,
        **({"logprobs": logprobs} if known else {}),
        **({"trained": trained} if not all(trained) else {}),
    }


def _question(found: Experience, i: int) -> str:
    content = prompt_of(found.problems[i].conversation.messages)[-1].get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _short(text: str) -> str:
    shown = " ⏎ ".join(text.splitlines())
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]} ... ({len(text):,} characters)"


def _spread(rewards: np.ndarray) -> float:
    known = rewards[~np.isnan(rewards)]
    return float(np.ptp(known)) if len(known) else -1.0
