"""Conversations -> prompts -> completions -> verdicts: what validation, evaluation and sampling share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from posttrain.config.schema import ToolOptions
from posttrain.data.chat import ChatTokenizer
from posttrain.data.encoded import EncodedImage
from posttrain.data.formats import Columns, RowError, conversation_of, prompt_of
from posttrain.data.images.names import question_of, reference_of
from posttrain.data.provenance.messages import texts_of
from posttrain.data.sources import Row
from posttrain.data.tokenized import Report
from posttrain.distributed.world import World
from posttrain.errors import InputError
from posttrain.records import Completion, Conversation
from posttrain.rewards.gsm8k import final_answer
from posttrain.rewards.score import Answered, Score, Scorer, Verdict
from posttrain.rollout.rollout import Request, Rollout, Sampling
from posttrain.rollout.tools import Tools
from posttrain.rollout.turns import converse

Item = TypeVar("Item")
Result = TypeVar("Result")
LOOKED_AT = 1000  # problems that a run tries for a ground truth before a model is loaded


@dataclass(frozen=True)
class Problem:
    """A conversation to answer, and the token ids (int32) that ask for it."""

    conversation: Conversation
    prompt_ids_T: np.ndarray
    place: str = ""  # file and row
    images: tuple[EncodedImage, ...] = ()  # where they stand among the ids

    def request(self, key: tuple[int, ...], max_new_tokens: int) -> Request:
        """One answer to it. All requests name the same images, so that each is read once."""
        sources = tuple(image.source for image in self.images)
        return Request(self.prompt_ids_T, key, max_new_tokens, images=sources)

    def cut(self, begin: int, end: int) -> Problem | None:
        """With these tokens of the prompt alone; None where an image is not wholly among them."""
        if any(image.begin < begin or image.end > end for image in self.images):
            return None
        images = tuple(replace(i, begin=i.begin - begin, end=i.end - begin) for i in self.images)
        return replace(self, prompt_ids_T=self.prompt_ids_T[begin:end], images=images)

    @property
    def question(self) -> str:
        """What it asks last, to show to a person."""
        return question_of(prompt_of(self.conversation.messages), self.images)

    @property
    def ground_truth(self) -> str | None:
        """The row's, else the final answer of its own response."""
        last = self.conversation.messages[-1]
        if self.conversation.ground_truth is not None or last["role"] != "assistant":
            return self.conversation.ground_truth
        return final_answer("".join(texts_of(last.get("content"))))


@dataclass(frozen=True)
class Answer:
    """One answered problem."""

    conversation: Conversation
    completion: Completion
    ground_truth: str | None
    score: Score
    images: tuple[EncodedImage, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return self.score.verdict

    @property
    def question(self) -> str:
        """What was asked last, to show to a person."""
        return question_of(prompt_of(self.conversation.messages), self.images)

    def as_record(self) -> dict[str, object]:
        """A line of evaluation.jsonl."""
        record: dict[str, object] = {
            "prompt": prompt_of(self.conversation.messages),
            "answer": self.completion.text,
            "ground_truth": self.ground_truth,
            "verdict": str(self.verdict),
            "reward": self.score.reward,
            "num_tokens": self.completion.num_trained,
            "cut": not self.completion.stopped,
        }
        if self.images:
            record["images"] = [reference_of(image.source) for image in self.images]
        if len(self.score.parts) > 1:
            record["rewards"] = self.score.parts
        if self.score.problem is not None:
            record["problem"] = self.score.problem
        return record


def read_problems(
    rows: Iterable[Row],
    columns: Columns,
    chat: ChatTokenizer,
    limit: int | None,
    advance: Callable[[int], None] = lambda done: None,
    tools: Tools | None = None,
) -> tuple[list[Problem], Report]:
    """The first problems that can be asked, with these tools, and what became of the rows up to the last of them."""
    problems: list[Problem] = []
    report = Report()
    for row in rows:
        if limit is not None and len(problems) == limit:
            break
        report.rows_read += 1
        advance(1)
        try:
            conversation = conversation_of(row.values, columns, row.folder)
            conversation = tools.offered_in(conversation) if tools else conversation
            prompt = chat.prompt(replace(conversation, messages=prompt_of(conversation.messages)))
            if prompt.images:  # as they were found: with their sizes, and with what was fetched
                conversation = replace(conversation, images=tuple(image.source for image in prompt.images))
            problems.append(Problem(conversation, prompt.ids_T, row.place, prompt.images))
        except RowError as error:
            report.drop(error.kind, f"{row.place}: {error}")
    return problems, report


def check_prompts_whole(options: ToolOptions, truncation: str) -> None:
    """Raise InputError where prompts that offer tools would be cut: what a model calls is told to the whole conversation."""
    if options.functions and truncation not in ("error", "drop"):
        raise InputError(
            f"data.truncation={truncation} cuts prompts, and with tools.functions a prompt is rendered anew, whole, for each turn. "
            "Choose data.truncation=drop or error."
        )


def check_engine_sees(rollout: str, chat: ChatTokenizer) -> None:
    """Raise InputError where the model sees images, and the engine that is to answer is given text alone."""
    if rollout == "vllm" and chat.images is not None:
        raise InputError(
            f"rollout.name=vllm: {chat.tokenizer.name_or_path} sees images, and vLLM is given models of text alone. Choose "
            "rollout.name=transformers, which answers prompts with and without images."
        )


@contextmanager
def open_tools(options: ToolOptions, chat: ChatTokenizer, world: World) -> Iterator[Tools | None]:
    """The tools of a run; None where the options name none. Every process must call this."""
    tools = world.everyone(lambda: Tools(options, chat) if options.functions else None)
    try:
        yield tools
    finally:
        if tools:
            tools.close()


@dataclass(frozen=True)
class Answerer:
    """A rollout engine, and the tools that its answers may call, within `max_length` tokens of prompt and answers."""

    rollout: Rollout
    tools: Tools | None = None
    max_length: int | None = None

    def answer(
        self,
        problems: Sequence[Problem],
        requests: Sequence[Request],
        sampling: Sampling,
        advance: Callable[[int], None],
    ) -> list[Completion]:
        """A completion for each request, which asks the problem in the same place."""
        if self.tools is None:
            return self.rollout.generate(requests, sampling, advance)
        conversations = [problem.conversation for problem in problems]
        return converse(self.rollout, requests, conversations, sampling, self.tools, self.max_length, advance)


def answer_all(
    answerer: Answerer,
    problems: Sequence[Problem],
    requests: Sequence[Request],
    sampling: Sampling,
    world: World,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """A completion for each request, on every process; each process answers its share."""
    pairs = list(zip(problems, requests, strict=True))

    def answer(share: Sequence[tuple[Problem, Request]]) -> list[Completion]:
        return answerer.answer([problem for problem, _ in share], [request for _, request in share], sampling, advance)

    return _dealt(pairs, answer, world)


def requests_for(problems: Sequence[Problem], answers: int, max_new_tokens: int, *key: int) -> list[Request]:
    """So many answers to each problem, next to each other; their noise is a function of `key`, problem and number."""
    return [
        problem.request((*key, number, answer), max_new_tokens)
        for number, problem in enumerate(problems)
        for answer in range(answers)
    ]


def answered(problem: Problem, completion: Completion) -> Answered:
    """What a reward is asked."""
    row = problem.conversation
    return Answered(
        completion.text,
        problem.ground_truth,
        row.data_source,
        row.extra_info,
        completion.num_trained,
        completion.stopped,
    )


def judge_all(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    scorer: Scorer,
    world: World,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Each answer with its score, on every process; each process judges its share."""
    asked = [answered(*pair) for pair in zip(problems, completions, strict=True)]
    scores = _dealt(asked, lambda share: scorer.score(share, advance), world)
    return [
        Answer(problem.conversation, completion, problem.ground_truth, score, problem.images)
        for problem, completion, score in zip(problems, completions, scores, strict=True)
    ]


def _dealt(items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]], world: World) -> list[Result]:
    """What `work` makes of each item, on every process, in their order; each process works on its share."""
    own = world.everyone(lambda: work(items[world.rank :: world.size]))
    results: dict[int, Result] = {}
    for rank, part in enumerate(world.gather(own)):
        results |= zip(range(rank, len(items), world.size), part, strict=True)
    return [results[number] for number in range(len(items))]


def check_judged(problems: Sequence[Problem], files: str, scorer: Scorer, rewards: Sequence[str]) -> str | None:
    """A line on the problems that cannot be judged, whatever the answer, if there are any. Raises InputError where none can be."""
    if not scorer.needs_truth:
        return None
    silence = Completion(np.zeros(0, np.int32))
    scores = scorer.score([answered(problem, silence) for problem in problems])
    unknown = [(p, score) for p, score in zip(problems, scores, strict=True) if score.verdict is Verdict.UNKNOWN]
    if not unknown:
        return None
    problem, score = unknown[0]
    if len(unknown) == len(problems):
        raise InputError(
            f"None of the {len(problems)} rows of {files} can be judged by reward.name={', '.join(rewards)}; the first, "
            f"{problem.place}: {score.problem}. Expected reward_model.ground_truth, or a number after a final #### of the answer. "
            "`posttrain generate` writes answers to look at; a function of your own (reward.path) or reward.name=format judges "
            "without."
        )
    return f"{len(unknown)} of the first {len(problems)} rows of {files} cannot be judged, such as {problem.place}: {score.problem}"
