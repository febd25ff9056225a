"""Where the tokens that a model must produce begin and end, in the text around a turn's own characters.

A turn begins where the generation prompt ends: the messages before it are rendered with one, and what follows the last
character of theirs must stand before the turn too. It ends with the last control token that the conversation as it goes on
and the conversation cut behind the turn have in common.

Both cost a rendering, so answers are kept. An answer is used again for a turn whose surrounding text is the same and whose
earlier messages are of the same kinds (shapes, and answers to all that the template ever asked of such a message) in the same
order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from os.path import commonprefix
from typing import Any

from posttrain.data.formats import RowError
from posttrain.data.provenance.marked import LOST
from posttrain.data.provenance.messages import REASONING_TAGS, MarkedConversation, Questions
from posttrain.data.provenance.template import MarkedTemplate, Rendered

UNPROVEN = "template cannot be masked"
REFUSED = "refused by the template"
# What a generation prompt may write that the same turn lacks once it is history.
_OPENED_REASONING = re.compile(
    "|".join(rf"(?:{re.escape(begin)}\s*(?:{re.escape(end)}\s*)?$)" for begin, end in REASONING_TAGS)
)
_REASONING_CLOSERS = {(end, begin) for begin, end in REASONING_TAGS}
_PROBE = "posttrain"
_USER = {"role": "user", "content": _PROBE}
_IN_ORDER, _LAST = 16, 4  # messages: of longer conversations a template is taken to see no more than these
_MOST_SHAPES = 5_000
_KEPT = 50_000  # answers; a set of rows needs a few dozen


class Borders:
    """What a template writes before and after turns, found by rendering and kept."""

    def __init__(self, template: MarkedTemplate, control_strings: list[str]):
        self.template = template
        self.questions = Questions()
        self._controls = re.compile("|".join(map(re.escape, sorted(control_strings, key=len, reverse=True))) or "(?!)")
        self._kept: dict[Any, Any] = {}
        self._followed = True

    def render(self, conversation: MarkedConversation, count: int | None = None, prompt: bool = False) -> Rendered:
        """The first `count` messages as text. Raises RowError where the template refuses them."""
        count = len(conversation.messages) if count is None else count
        known = conversation.rendered.get((count, prompt))
        if known is None:
            try:
                if not count:
                    raise ValueError("there is no message")
                rendered = self.template.render(**conversation.arguments(count, prompt))
            except Exception as error:  # what a template raises is its own choice
                raise RowError(REFUSED, f"the chat template says: {error}") from None
            self.questions.learn(conversation)
            if self.questions.num_shapes > _MOST_SHAPES:  # every message of a shape of its own, by a number in it
                self.questions, self._kept = Questions(), {}
            known = conversation.rendered[count, prompt] = (rendered, conversation.trace.followed)
        self._followed &= known[1]
        return known[0]

    def begin(self, conversation: MarkedConversation, turn: int, gap: str, before: int) -> tuple[int, str]:
        """How much of `gap`, the text between the content before the turn and the turn's own, is the generation prompt.

        `before` is the message whose content ends where the gap begins. The second value is what the prompt writes beyond
        the gap: the beginning of reasoning that the history lacks, if anything.
        """
        found = self._cached(
            ("begin", gap, turn - before), conversation, turn, lambda: self._begin(conversation, turn, gap, before)
        )
        if isinstance(found, str):
            raise RowError(UNPROVEN, f"message {turn} {found}")
        return found

    def end(
        self, conversation: MarkedConversation, turn: int, after: str, inside: str, own: int, begin: int = 0
    ) -> int:
        """How much of `after`, the text between the turn's own characters and the next content, belongs to the turn.

        `inside` is what the template writes inside of the turn up to there, `own` the message whose content is the last before
        `after`. An empty turn begins at `begin` in it.
        """
        is_last = turn == len(conversation.messages) - 1
        key = ("end", after, begin, own - turn, is_last or conversation.plain[turn + 1]["role"])

        def find() -> int | str:
            return self._end(conversation, turn, after, own, begin)

        found = self._cached(key, conversation, turn + 1, find)
        if isinstance(found, str):
            raise RowError(UNPROVEN, f"message {turn}: {found}")
        *_, match = self._controls.finditer(after, 0, found)
        last = match.group()
        opener = self._opener_of(last)
        if opener and (
            opener in inside or opener in after[begin : match.start()] or (last, opener) in _REASONING_CLOSERS
        ):
            raise RowError(UNPROVEN, f"no token ends message {turn}: {last!r} only closes {opener!r}")
        if closer := self._closer_of(last):
            raise RowError(UNPROVEN, f"no token ends message {turn}: {last!r} opens what {closer!r} closes")
        return found

    def _begin(self, conversation: MarkedConversation, turn: int, gap: str, before: int) -> tuple[int, str] | str:
        """What follows the earlier content in the prompt for the turn, found at the gap's beginning; else what the flag for a
        generation prompt adds to a rendering, found once in the gap."""
        added = self._added_by_the_flag(conversation, turn)
        prompt, owner = "", None
        if turn:
            asked = self.render(conversation, turn, prompt=True)
            prompt, owner = asked.tail
            if LOST in asked.codes[len(asked.text) - len(prompt) :]:
                return "is asked for by an operation that hides where text came from"
        if turn and owner == before:
            if not added.strip() and gap != prompt and self._header_is_missing(conversation, turn, prompt):
                return f"begins with {_short(gap)}, which the template writes although no generation prompt asks for it"
            for header, opened in _headers(prompt):
                if header and gap.startswith(header):
                    return len(header), opened
                if _without_space(gap) == _without_space(header):
                    return _without_odd_end(gap, header), opened  # the prompt, written with other white space
            if prompt.startswith(gap) and gap[len(prompt) - len(added) :].strip():
                return len(gap), prompt[len(gap) :]
        for header, opened in _headers(added):
            if header.strip() and gap.count(header) == 1:
                return gap.index(header) + len(header), opened
        return f"begins with {_short(gap)}, and the generation prompt is {_short(prompt or added)}; they do not agree"

    def _header_is_missing(self, conversation: MarkedConversation, turn: int, prompt: str) -> bool:
        """Whether the prompt, which no flag changes, lacks a header that the template writes before an answer: it does if it
        writes more before plain text, and the prompt is but what stands before a user's message too."""
        role = conversation.plain[turn]["role"]
        text = self._followed_by(conversation, turn, {"role": role, "content": _PROBE})
        if text is None or _without_space(text) == _without_space(prompt):
            return False
        user = self._followed_by(conversation, turn, _USER)
        return user is None or _without_space(user).startswith(_without_space(prompt))

    def _followed_by(self, conversation: MarkedConversation, count: int, message: dict[str, Any]) -> str | None:
        """What the template writes between the first `count` messages and one that follows; None where it refuses that."""
        longer = conversation.with_messages([*conversation.plain[:count], message])
        try:
            return _gap_before(self.render(longer), count)
        except RowError:
            return None

    def _added_by_the_flag(self, conversation: MarkedConversation, turn: int) -> str:
        """What add_generation_prompt adds behind the messages before the turn, or behind a user's where there are none."""
        earlier = conversation
        if not turn:
            earlier = conversation.with_messages([_USER])
        without, asked = (self.render(earlier, turn or 1, prompt=prompt).tail[0] for prompt in (False, True))
        same = len(_common_prefix(without, asked))
        cut = [control.start() for control in self._controls.finditer(asked) if control.start() < same < control.end()]
        return asked[min([same, *cut]) :]

    def _end(self, conversation: MarkedConversation, turn: int, after: str, own: int, begin: int) -> int | str:
        cut, owner = self.render(conversation, turn + 1).tail
        if owner != own:
            return "cut behind it, the conversation ends with other content"
        is_last = turn == len(conversation.messages) - 1
        go_on = self._continued(conversation, own) if is_last else after
        if go_on is None:
            controls = self._controls.findall(cut)
            return (
                self._shared_end(cut, cut)
                if len(controls) == 1
                else "what ends it cannot be told from what ends the text"
            )
        if turn and self._asks_for_more(conversation, turn, go_on[begin:], cut[begin:]):
            return "the template asks for another answer behind it even where none is wanted"
        found = self._shared_end(go_on, cut)
        if isinstance(found, str) and self._ends_as_others(conversation, turn, go_on):
            controls = list(self._controls.finditer(cut if is_last else go_on))
            if not is_last or len(controls) == 1:
                return controls[0].end()
        return found

    def _asks_for_more(self, conversation: MarkedConversation, turn: int, go_on: str, cut: str) -> bool:
        """Whether a conversation that is cut behind the turn ends with a header: with a control string of the prompt's that
        what goes on lacks."""
        prompt, _ = self.render(conversation, turn, prompt=True).tail
        shared = len(_common_prefix(go_on, cut))
        beyond = {control.group() for control in self._controls.finditer(cut) if control.end() > shared}
        header = set(self._controls.findall(prompt)) - set(self._controls.findall(go_on))
        return not beyond.isdisjoint(header)

    def _ends_as_others(self, conversation: MarkedConversation, turn: int, go_on: str) -> bool:
        """Whether the turn, followed by more, ends with the very token that ends the message before the turn: a last turn may
        then have a token of its own."""
        first = self._controls.search(go_on)
        if not turn or first is None:
            return False
        added = self._added_by_the_flag(conversation, turn)
        prompt, _ = self.render(conversation, turn, prompt=True).tail
        ending = prompt[: len(prompt) - len(added)]
        return bool(added) and self._controls.findall(ending) == [first.group()]

    def _shared_end(self, go_on: str, cut: str) -> int | str:
        shared = len(_common_prefix(go_on, cut))
        whole = [match for match in self._controls.finditer(go_on) if match.end() <= shared]
        if not whole:
            return f"no control token of this tokenizer ends it: what follows is {_short(cut)}"
        end = whole[-1].end()
        more = self._controls.sub("", cut[end:]).strip()
        if more:
            return f"what ends it is not clear: where the conversation stops, {_short(cut)} follows"
        return end

    def _continued(self, conversation: MarkedConversation, own: int) -> str | None:
        """What follows the conversation's last content once it goes on; None where the template never lets it."""
        last = conversation.plain[-1]
        calls = last.get("tool_calls") if isinstance(last.get("tool_calls"), list) else None
        answers = [
            {"role": "tool", "content": _PROBE, **_answering(call)} for call in calls or [] if isinstance(call, dict)
        ]
        for messages in [answers, [_USER]] if answers else [[_USER]]:
            longer = conversation.with_messages([*conversation.plain, *messages])
            try:
                rendered = self.render(longer)
            except RowError:
                continue
            gap = _gap_before(rendered, len(conversation.plain), own)
            if gap is not None:
                return gap
        return None

    def _opener_of(self, control: str) -> str | None:
        """The control string that this one closes, by its name: </a> and <a>, x_end and x_begin."""
        for end, begins in (("/", ("",)), ("end", ("begin", "start")), ("END", ("BEGIN", "START"))):
            for begin in begins:
                opener = control.replace(end, begin, 1)
                if opener != control and self._controls.fullmatch(opener):
                    return opener
        return None

    def _closer_of(self, control: str) -> str | None:
        """The control string that closes this one, written as a tag: <a> and </a>, <|a> and <a|>."""
        name = control.strip("<|>[]")
        closers = (f"</{name}>", f"<{name}|>", f"[/{name}]")
        return next((c for c in closers if c != control and control[1:2] != "/" and self._controls.fullmatch(c)), None)

    def _cached(self, about: Any, conversation: MarkedConversation, count: int, find: Callable[[], Any]) -> Any:
        key = (about, self._situation(conversation, count))
        if key in self._kept:
            return self._kept[key]
        self._followed = True
        found = find()
        if self._followed and len(self._kept) < _KEPT:
            self._kept[(about, self._situation(conversation, count))] = found  # what was asked may be news
        return found

    def _situation(self, conversation: MarkedConversation, count: int) -> Any:
        """The kinds of the first `count` messages, in order; of more than a few the first, the last, and which others there
        are by their latest place, and whether they are even or odd. And tools and variables."""
        kinds: list[Any] = [self.questions.kind(conversation, number) for number in range(count)]
        if count > _IN_ORDER:
            kinds = [count % 2, *kinds[:2], *kinds[-_LAST:], *dict.fromkeys(reversed(kinds))]
        return (tuple(kinds), conversation.surroundings)


def _headers(prompt: str) -> list[tuple[str, str]]:
    """The prompt, and the prompt without the beginning of reasoning that it writes; each with what is left off."""
    opened = _OPENED_REASONING.search(prompt)
    return [(prompt, "")] + ([(prompt[: opened.start()], opened.group())] if opened else [])


def _gap_before(rendered: Rendered, message: int, after: int | None = None) -> str | None:
    """The text between the message's first character and the content before it, which must be `after`'s if that is given."""
    runs = rendered.runs
    at = next((i for i, run in enumerate(runs) if run[2] >= message), None)
    if at is None or (after is not None and (at == 0 or runs[at - 1][2] != after)):
        return None
    return rendered.text[runs[at - 1][1] if at else 0 : runs[at][0]]


def _without_odd_end(gap: str, prompt: str) -> int:
    """How much of the gap is the prompt, where the two differ in white space only: to where they end alike."""
    body = len(gap.rstrip())
    return body + len(_common_prefix(gap[body:], prompt[len(prompt.rstrip()) :]))


def _without_space(text: str) -> str:
    return "".join(text.split())


def _common_prefix(a: str, b: str) -> str:
    return commonprefix([a, b])  # noqa: RUF071 (of characters, not of paths)


def _answering(call: dict[str, Any]) -> dict[str, Any]:
    name = (call.get("function") or {}).get("name") if isinstance(call.get("function"), dict) else None
    return {key: value for key, value in (("tool_call_id", call.get("id")), ("name", name)) if value is not None}


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")
