"""Answers in several turns: the model calls tools, is told what they say, and goes on.

What the model saw and wrote is kept as ids. The tool's answer and the next header are what the template writes behind the
model's own text, once the conversation is rendered as it stands now. Where the template writes the conversation so far in
another way than the model did (it drops reasoning, or spaces a call differently), the model must be asked with that rendering,
as it will be asked when it is used: what came before is then a completion of its own, one of `Completion.earlier`.
"""

# T tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from posttrain.data.encoded import Encoded
from posttrain.data.formats import RowError, prompt_of
from posttrain.data.provenance.messages import REASONING_TAGS, reasoning_end
from posttrain.records import Completion, Conversation, Segment
from posttrain.rollout.calls import Call, Written, answer_message, call_message
from posttrain.rollout.rollout import Request, Rollout, Sampling
from posttrain.rollout.tools import Outcome, Tools

_CONTEXT_TOKENS = 16  # before what is decoded: some tokenizers write a first token without its space


@dataclass
class _Trajectory:
    """One answer as it grows. `asked` is the rendering that the model was asked with last, where that is known."""

    request: Request
    conversation: Conversation
    prompt_ids_T: np.ndarray
    asked: Encoded | None = None
    segments: list[Segment] = field(default_factory=list)
    earlier: list[Completion] = field(default_factory=list)
    text: str = ""
    stopped: bool = True
    num_turns: int = 0
    num_drawn: int = 0

    @property
    def ids_T(self) -> np.ndarray:
        """All that the model has seen and written since the template last rewrote it."""
        return np.concatenate([self.prompt_ids_T, *(segment.ids_T for segment in self.segments)])

    @property
    def num_left(self) -> int:
        return self.request.max_new_tokens - self.num_drawn

    @property
    def completion(self) -> Completion:
        return Completion(self.prompt_ids_T, self.segments, self.text, self.stopped, tuple(self.earlier))

    def take(self, completion: Completion) -> None:
        """Go on with what the model wrote."""
        self.segments += completion.segments
        self.text, self.stopped = completion.text, completion.stopped
        self.num_turns += 1
        self.num_drawn += completion.num_trained


def converse(
    rollout: Rollout,
    requests: Sequence[Request],
    conversations: Sequence[Conversation],
    sampling: Sampling,
    tools: Tools,
    max_length: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """One completion a request, in their order, of as many turns as its calls ask for; `text` is the last turn's.

    `requests` ask `tools.offered_in(conversation)`, by ChatTokenizer.prompt_ids. Their `max_new_tokens` holds for what the
    model writes in all turns, `max_length` for a prompt with all that follows. An answer that a limit cuts off is not
    `stopped`. Tools' answers are segments that are not trained, without log-probabilities.
    `advance` hears of answers that are done, and of each call with 0.
    """
    trajectories = [
        _Trajectory(request, _asked(tools.offered_in(conversation)), request.prompt_ids_T)
        for request, conversation in zip(requests, conversations, strict=True)
    ]
    going = [each for each in trajectories if _has_room(each, tools, max_length)]
    advance(len(trajectories) - len(going))
    while going:
        completions = rollout.generate([_next_request(each, max_length) for each in going], sampling)
        for each, completion in zip(going, completions, strict=True):
            each.take(completion)
        on = [each for each in going if _goes_on(each, tools, max_length, advance)]
        advance(len(going) - len(on))
        going = on
    tools.counts.trajectories += len(trajectories)
    tools.counts.turns += sum(each.num_turns for each in trajectories)
    return [each.completion for each in trajectories]


def _asked(conversation: Conversation) -> Conversation:
    return replace(conversation, messages=prompt_of(conversation.messages), weights=None)


def _has_room(trajectory: _Trajectory, tools: Tools, max_length: int | None) -> bool:
    """Whether a prompt leaves room for an answer; one that leaves none has an empty answer, which is cut."""
    if max_length is None or len(trajectory.prompt_ids_T) < max_length:
        return True
    _cut(trajectory, tools)
    return False


def _cut(trajectory: _Trajectory, tools: Tools) -> None:
    tools.counts.cut += 1
    trajectory.stopped = False


def _next_request(trajectory: _Trajectory, max_length: int | None) -> Request:
    ids_T = trajectory.ids_T
    room = trajectory.num_left if max_length is None else min(trajectory.num_left, max_length - len(ids_T))
    position = trajectory.request.first_position + trajectory.num_drawn
    return Request(ids_T, trajectory.request.key, room, position, trajectory.request.images)


def _goes_on(trajectory: _Trajectory, tools: Tools, max_length: int | None, advance: Callable[[int], None]) -> bool:
    """Whether the last turn calls tools and another may follow. If so they have run, and what they say is added."""
    if not trajectory.stopped:
        return False
    own, end = _own_text(trajectory, tools)
    written = tools.form.read(own, tools.parameters_of)
    if not written.calls and not written.problem:
        return False
    if trajectory.num_turns >= tools.options.max_turns or trajectory.num_left < 1:
        _cut(trajectory, tools)
        return False
    messages, answers = _answered(trajectory, written, own, tools, advance)
    return _ask_again(trajectory, own + end, messages, answers, tools, max_length)


def _own_text(trajectory: _Trajectory, tools: Tools) -> tuple[str, str]:
    """What the model wrote last, and the token that ends it, as texts."""
    ids, last = trajectory.ids_T.tolist(), len(trajectory.segments[-1].ids_T)
    context = ids[-last - _CONTEXT_TOKENS : -last]

    def decode(ids: list[int]) -> str:
        return tools.chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before, all_but_end, whole = (decode(part) for part in (context, context + ids[-last:-1], context + ids[-last:]))
    return all_but_end[len(before) :], whole[len(all_but_end) :]


def _answered(
    trajectory: _Trajectory, written: Written, own: str, tools: Tools, advance: Callable[[int], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The assistant's message in the forms that a template may keep as it was written, best first, and the tools' messages."""
    name = f"c{trajectory.num_turns:03d}" + "{:05d}"  # nine characters, which some templates ask for
    if written.problem:
        tools.counts.calls += 1
        tools.counts.refused += 1
        unread = Call("", {}, name.format(0))
        return [{"role": "assistant", "content": own}], [answer_message(unread, f"Error: {written.problem}")]
    calls = [replace(call, id=call.id or name.format(number)) for number, call in enumerate(written.calls)]
    answers = [answer_message(call, _run(call, tools, advance)) for call in calls]
    return list(_forms(written.text, calls)), answers


def _forms(text: str, calls: Sequence[Call]) -> Iterator[dict[str, Any]]:
    yield call_message(text, calls)
    end = reasoning_end(text)
    if end:
        reasoning = text[:end]
        for begin, close in REASONING_TAGS:
            reasoning = reasoning.strip().removeprefix(begin).removesuffix(close)
        yield {**call_message(text[end:].strip(), calls), "reasoning_content": reasoning.strip()}


def _run(call: Call, tools: Tools, advance: Callable[[int], None]) -> str:
    outcome, text = tools.call(call.name, call.arguments)
    advance(0)
    kept = tools.chat.beginning(text, tools.options.max_answer_tokens)
    counts = tools.counts
    counts.calls += 1
    counts.failed += outcome == Outcome.FAILED
    counts.timed_out += outcome == Outcome.TIMED_OUT
    counts.refused += outcome == Outcome.REFUSED
    counts.cut_answers += len(kept) < len(text)
    return kept


def _ask_again(
    trajectory: _Trajectory,
    wrote: str,
    messages: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
    tools: Tools,
    max_length: int | None,
) -> bool:
    """Add the tools' answers to the trajectory, or begin it anew from their rendering; False where neither can be."""
    so_far = (trajectory.asked or _first_asked(trajectory, tools)).text + wrote
    found = None
    for message in messages:
        history = [*trajectory.conversation.messages, message, *answers]
        conversation = replace(trajectory.conversation, messages=history)
        try:
            asked = tools.chat.prompt(conversation)
        except RowError:
            continue
        added_T = _added(asked, so_far, int(trajectory.segments[-1].ids_T[-1]))
        if found is None or added_T is not None:
            found = conversation, asked, added_T
        if added_T is not None:
            break
    if found is None:
        tools.counts.not_rendered += 1
        return False
    conversation, asked, added_T = found
    length = len(asked.ids_T) if added_T is None else len(trajectory.ids_T) + len(added_T)
    if max_length is not None and length >= max_length:
        _cut(trajectory, tools)
        return False
    trajectory.conversation, trajectory.asked = conversation, asked
    if added_T is not None:
        trajectory.segments.append(Segment(added_T, trained=False))
    else:
        tools.counts.rewritten += 1
        trajectory.earlier.append(replace(trajectory.completion, earlier=()))
        trajectory.prompt_ids_T, trajectory.segments = asked.ids_T, []
    return True


def _first_asked(trajectory: _Trajectory, tools: Tools) -> Encoded:
    asked = tools.chat.prompt(trajectory.conversation)
    if not np.array_equal(asked.ids_T, trajectory.prompt_ids_T):
        raise ValueError("the request asks something else than its conversation with the tools offered in it")
    return asked


def _added(asked: Encoded, so_far: str, end_id: int) -> np.ndarray | None:
    """The ids behind the text so far; None where the template writes that in another way, or a token lies across its end."""
    if not asked.text.startswith(so_far):
        return None
    first = int(np.searchsorted(asked.offsets_TC[:, 0], len(so_far), "left"))
    across = first and asked.offsets_TC[first - 1, 1] > len(so_far)
    if across and asked.ids_T[first - 1] != end_id:  # an end token may take in the white space behind it
        return None
    return asked.ids_T[first:]
