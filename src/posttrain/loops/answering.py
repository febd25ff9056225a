"""Conversations -> prompts -> completions -> verdicts: what validation, evaluation and sampling share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.data.chat import ChatTokenizer
from posttrain.data.formats import prompt_of
from posttrain.distributed.world import World
from posttrain.records import Completion, Conversation
from posttrain.rewards.gsm8k import build_reward, final_answer
from posttrain.rewards.verdict import Verdict
from posttrain.rollout.transformers import TransformersRollout


@dataclass(frozen=True)
class Answer:
    """One answered problem."""

    conversation: Conversation
    completion: Completion
    ground_truth: str | None
    verdict: Verdict

    def as_record(self) -> dict[str, object]:
        """A line of evaluation.jsonl."""
        return {
            "prompt": prompt_of(self.conversation.messages),
            "answer": self.completion.text,
            "ground_truth": self.ground_truth,
            "verdict": str(self.verdict),
            "num_tokens": self.completion.num_tokens,
            "cut": not self.completion.stopped,
        }


def answer_all(
    rollout: TransformersRollout,
    chat: ChatTokenizer,
    conversations: Sequence[Conversation],
    world: World,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """A completion for each conversation's last question, on every process; each process answers its share."""
    prompts = [chat.prompt_ids(conversation) for conversation in conversations]
    own = world.everyone(lambda: rollout.generate(prompts[world.rank :: world.size], advance))
    completions: list[Completion | None] = [None] * len(prompts)
    for rank, part in enumerate(world.gather(own)):
        completions[rank :: world.size] = part
    return [completion for completion in completions if completion is not None]


def judge_all(
    conversations: Sequence[Conversation], completions: Sequence[Completion], reward_name: str
) -> list[Answer]:
    """Each answer with its verdict. The truth is the row's, else the final answer of its own response."""
    judge = build_reward(reward_name)
    answers = []
    for conversation, completion in zip(conversations, completions, strict=True):
        truth = conversation.ground_truth
        if truth is None and conversation.messages[-1]["role"] == "assistant":
            truth = final_answer(conversation.messages[-1].get("content") or "")
        answers.append(Answer(conversation, completion, truth, judge(completion.text, truth)))
    return answers
