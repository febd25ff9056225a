"""When rules are asked, and what becomes of what they say: each once, on the console and in advice.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from posttrain.run.advice import answers, losses, rate, rows
from posttrain.run.advice.advice import Advice, EarlierRun, Rule, Seen
from posttrain.run.advice.history import History
from posttrain.run.folder import RunFolder, find_run

AT_START: list[Rule] = [rate.unusual_rate, rate.rate_after_imitation, rate.long_warmup, rate.few_updates, rows.dropped_rows,
                        rows.few_trained_tokens]  # fmt: skip
# with each validation: what one would stop a run for
ON_THE_WAY: list[Rule] = [losses.overfitting, losses.known_rows, losses.no_gradient, losses.rate_too_high, answers.other_model,
                          answers.worse_than_before, answers.no_signal, answers.truncated, answers.other_probabilities,
                          answers.unknown_rewards, answers.far_from_reference]  # fmt: skip
AT_END: list[Rule] = [*ON_THE_WAY, losses.rate_too_low, losses.batch_too_small, losses.random_start]


class Adviser:
    """Of one run, on its main process alone; the others have none. What it said before a restart it does not say again."""

    def __init__(self, folder: RunFolder, say: Callable[[str], None], seen: Seen):
        self.folder, self.say, self.seen = folder, say, seen
        self.said = [json.loads(line)["rule"] for line in _lines(folder.advice)]

    def begin(self) -> None:
        """What is known before the first step."""
        self._tell(AT_START, "before training")

    def look(self) -> None:
        """What a validation shows."""
        self._tell(ON_THE_WAY, f"at step {self.seen.history.last_step}")

    def conclude(self) -> None:
        """What the whole run shows, as a short list."""
        before = list(self.said)
        found = self._new(AT_END)
        if found:
            self.say("What this run shows:")
        for advice in found:
            self._keep(advice)
            self.say(str(advice))
        if before:
            self.say(
                f"{'Also' if found else 'What this run shows:'} {', '.join(before)}, said before: {self.folder.advice}"
            )

    def tell(self, advice: Advice | None, when: str) -> None:
        """Say it, unless it was said."""
        if advice is not None and advice.rule not in self.said:
            self._keep(advice)
            self.say(f"advice {when}: {advice}")

    def _tell(self, rules: Sequence[Rule], when: str) -> None:
        for advice in self._new(rules):
            self.tell(advice, when)

    def _new(self, rules: Sequence[Rule]) -> list[Advice]:
        found = [advice for rule in rules if (advice := rule(self.seen)) is not None]
        return [advice for advice in found if advice.rule not in self.said]

    def _keep(self, advice: Advice) -> None:
        self.said.append(advice.rule)
        record = {"step": self.seen.history.last_step, "rule": advice.rule, "found": advice.found, "remedies": advice.remedies,
                  "page": advice.page}  # fmt: skip
        text = "".join(f"{line}\n" for line in [*_lines(self.folder.advice), json.dumps(record, ensure_ascii=False)])
        self.folder.write(self.folder.advice.name, text)


def earlier_run(model_path: str) -> EarlierRun | None:
    """The run whose folder the model lies in, from its config.yaml and metrics.jsonl."""
    folder = find_run(model_path)
    if folder is None:
        return None
    options = yaml.safe_load((folder / "config.yaml").read_text()) or {}
    optim, model = options.get("optim", {}), options.get("model", {})
    if "lr" not in optim:
        return None
    history = History().read(folder / "metrics.jsonl")
    shares = [history.of(f"val/{name}") for name in ("val_accuracy", "val_accuracy_low", "val_accuracy_high")]
    return EarlierRun(
        str(folder),
        float(optim["lr"]),
        bool(model.get("lora_rank") or model.get("lora_adapter_path")),
        not history.of("rollout/reward_mean"),
        tuple((options.get("data") or {}).get("val_files") or ()),
        (shares[0][-1], shares[1][-1], shares[2][-1]) if all(shares) else None,
        float((options.get("rollout") or {}).get("val_temperature") or 0.0),
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
