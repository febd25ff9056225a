"""A judge of masks that shares no code with what makes them: it renders a conversation again and again, with one word changed.

`complaints(tokenizer, conversation, outcome)` says what is wrong with the samples (or finds nothing; a RowError is never
wrong). Where text comes from is found by differential probes: each text, argument and tool name is replaced by a
word that stands nowhere else, and what changes in transformers' own rendering is what that text owns. Slow, and so
used in tests only.

A complaint begins with its kind: `ids`, `mask`, `lost` (what is trained lacks something that the turn says), `garbage`
(the template writes what nobody said) or `unsure` (the judge could not tell).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.records import Conversation
from probes import Leaf, Range, aligned, inserted, leaves, probe_for, put, stands_in

ROLE = re.compile(r"\s*(assistant|user|system|tool|model|human|bot|ipython|developer|observation)\b", re.IGNORECASE)
OPENS = re.compile(r"(?!</).*(?:start|begin|bos|role|user|assistant)|<s>$|\[INST\]", re.IGNORECASE)
CLOSES_A_PART = re.compile(r"tool|call|think|func|arg|param|action|response|channel|thought", re.IGNORECASE)


def complaints(tokenizer: Any, conversation: Conversation, outcome: Any, probes: bool = True) -> list[str]:
    """What is wrong with `outcome`: an Encoded, the list of a row's samples, or a RowError (about which nothing is)."""
    if isinstance(outcome, Exception):
        return [] if type(outcome).__name__ == "RowError" else [f"mask: raised {type(outcome).__name__}: {outcome}"]
    found: list[str] = []
    trained: list[int] = []
    for encoded in outcome if isinstance(outcome, list) else [outcome]:
        judge = _judge_of(tokenizer, conversation, encoded)
        if judge is None:
            found.append("ids: the text is not what apply_chat_template writes")
            continue
        found += judge.of_ids()
        if not found:
            found += judge.of_mask(probes)
        trained += [turn.message for turn in encoded.turns if turn.weight > 0]
    for i, message in enumerate(conversation.messages):
        wanted = message["role"] == "assistant" and (conversation.weights is None or conversation.weights[i] != 0)
        if trained.count(i) != wanted:
            found.append(
                f"mask: message {i} ({message['role']}) is trained {trained.count(i)} times, not {int(wanted)}"
            )
    return found


def _judge_of(tokenizer: Any, conversation: Conversation, encoded: Any) -> _Judge | None:
    """For the longest beginning of the conversation that renders as `encoded.text`.

    Arguments given as JSON text may have been read as JSON: most templates write them as text in quotes otherwise.
    """
    for messages in (conversation.messages, _with_arguments_read(conversation.messages)):
        for end in range(len(messages), 0, -1):
            judge = _Judge(tokenizer, conversation, messages[:end], encoded)
            if judge.text == encoded.text:
                return judge
    return None


def _with_arguments_read(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def read(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if not isinstance(function["arguments"], str):
            return call
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}

    return [{**m, "tool_calls": [read(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages]


class _Judge:
    def __init__(self, tokenizer: Any, conversation: Conversation, messages: list[dict[str, Any]], encoded: Any):
        self.tokenizer, self.conversation, self.messages, self.encoded = tokenizer, conversation, messages, encoded
        self.normalize = lambda text: text
        self.text = self.render(messages) or ""
        self.added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}

    def render(self, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = False) -> str | None:
        """As transformers does; None where the template refuses."""
        try:
            return self.normalize(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools or self.conversation.tools, tokenize=False, add_generation_prompt=prompt,
                    **self.conversation.template_kwargs,
                )
            )  # fmt: skip
        except Exception:
            return None

    def of_ids(self) -> list[str]:
        encoded = self.encoded
        if len({len(a) for a in (encoded.ids_T, encoded.weights_T, encoded.trained_T, encoded.offsets_TC)}) != 1:
            return ["ids: the arrays differ in length"]
        said = json.dumps(self.messages, ensure_ascii=False)
        if not any(content in said for content in self.added.values()):  # typed control strings may be cut into pieces
            expected = self.tokenizer(self.text, add_special_tokens=False)["input_ids"]
            if encoded.ids_T.tolist() != expected:
                return ["ids: not those of apply_chat_template"]
        self.borders_T = _borders(self.tokenizer, encoded, self.added)  # of tokens, in bytes
        pieces = b"".join(self.pieces_T)
        if pieces != self.text.encode():
            normalizer = self.tokenizer.backend_tokenizer.normalizer
            if normalizer is None or normalizer.normalize_str(self.text).encode() != pieces:
                return ["ids: they do not decode to the text"]
            self.normalize = normalizer.normalize_str
            self.text = self.normalize(self.text)
        return []

    @property
    def pieces_T(self) -> list[bytes]:
        return _pieces(self.tokenizer, self.encoded.ids_T.tolist(), self.added)

    def of_mask(self, probes: bool) -> list[str]:
        encoded, found = self.encoded, []
        said_T = np.zeros(len(encoded), dtype=bool)
        for turn in encoded.turns:
            said_T[turn.begin : turn.end] |= turn.weight > 0
            others = set(encoded.messages_T[turn.begin : turn.end].tolist()) - {-1, turn.message}
            if others:
                found.append(f"mask: tokens of turn {turn.message} are said to belong to {sorted(others)}")
            if self.messages[turn.message]["role"] != "assistant" and turn.weight > 0:
                found.append(f"mask: message {turn.message} is from {self.messages[turn.message]['role']}")
        if (said_T != encoded.trained_T).any():
            found.append("mask: trained tokens are not those of the turns")
        turns = [
            turn for turn in encoded.turns if turn.weight > 0 and self.messages[turn.message]["role"] == "assistant"
        ]
        if found or not turns:
            return found
        chars = _char_of_byte(self.text)
        spans = []
        for turn in turns:
            begin, end = chars[self.borders_T[turn.begin]], chars[self.borders_T[turn.end]]
            if begin < 0 or end < 0 or turn.end <= turn.begin:
                return [f"mask: the border of turn {turn.message} lies inside a character"]
            ends = int(encoded.ids_T[turn.end - 1]) in self.added
            spans.append(_Span([turn.message], begin, end, ends))
        spans = _merged(spans)
        found += [f"mask: turn {s.messages} ends without a control token" for s in spans if not s.ends]
        if not probes:
            return found + self._without_probes(spans)
        owners = self._owners()
        for span in spans:
            found += self._of_span(span, spans, owners)
        return found

    def _without_probes(self, spans: list[_Span]) -> list[str]:
        found = []
        for leaf in leaves(self.messages, None):
            for span in spans:
                inside = stands_in(leaf.text, self.text[span.begin : span.end])
                if leaf.message in span.messages and not inside and leaf.kind != "reasoning":
                    found.append(f"lost: turn {leaf.message} lacks its {leaf.kind} {leaf.text[:30]!r}")
        return found

    # ---- where text comes from

    def _owners(self) -> dict[Leaf, list[Range] | None]:
        found = leaves(self.messages, self.conversation.tools)
        return {leaf: self._owned(leaf, i, self.messages, self.text) for i, leaf in enumerate(found)}

    def _owned(self, leaf: Leaf, number: int, messages: list[dict[str, Any]], text: str) -> list[Range] | None:
        """Where in `text`, the rendering of `messages`, the leaf stands. None: it changes the text in ways that tell not."""
        probe = probe_for(leaf, number, text)
        changed = self._render_with(leaf, probe, messages)
        if changed is not None:
            where = aligned(text, changed, probe)
            if where is not None:
                return where
        if leaf.end < 0:
            return None
        # replaced it says nothing (the template looks into it): so put words before and behind it
        before, behind = (
            self._render_with(leaf, new, messages) for new in (f"{probe} {leaf.text}", f"{leaf.text} {probe}")
        )
        if before is None or behind is None:
            return None
        starts, stops = inserted(text, before, f"{probe} "), inserted(text, behind, f" {probe}")
        if starts is None or stops is None or len(starts) != len(stops):
            return None
        return list(zip(starts, stops, strict=True))

    def _render_with(self, leaf: Leaf, new: str, messages: list[dict[str, Any]]) -> str | None:
        if leaf.message < 0:
            return self.render(messages, put(self.conversation.tools, leaf, new))
        return self.render(put(messages, leaf, new))

    # ---- one turn

    def _of_span(self, span: _Span, spans: list[_Span], owners: dict[Leaf, list[Range] | None]) -> list[str]:
        found, own = [], []
        name = f"turn {span.messages[0] if len(span.messages) == 1 else span.messages}"
        for leaf, ranges in owners.items():
            what = f"{leaf.kind} {leaf.text[:30]!r} of message {leaf.message}"
            if leaf.message not in span.messages:
                if any(b < span.end and e > span.begin for b, e in ranges or []):
                    found.append(f"mask: {name} trains {what}")
                continue
            if ranges is None:
                if not stands_in(leaf.text, self.text[span.begin : span.end]):
                    found.append(f"lost: {name} lacks its {what}, which the template rewrites")
                continue
            inside = [(b, e) for b, e in ranges if b >= span.begin and e <= span.end]
            cut = [(b, e) for b, e in ranges if b < span.end and e > span.begin and (b, e) not in inside]
            own += [(b, e, leaf) for b, e in inside]
            if cut:
                found.append(f"mask: {name} trains a part of its {what}")
            elif not inside and (ranges or leaf.kind != "reasoning"):
                found.append(
                    f"mask: {name} lacks its {what}, which stands elsewhere"
                    if ranges
                    else f"lost: {name} lacks its {what}"
                )
        if found:
            return found
        own.sort(key=lambda item: item[:2])
        first, last = (own[0][0], max(item[1] for item in own)) if own else (None, None)
        earlier = [
            e for leaf, ranges in owners.items() if -1 < leaf.message < span.messages[0] for _, e in ranges or []
        ]
        found += self._of_start(span, name, first, max((e for e in earlier if e <= span.begin), default=0))
        found += self._of_end(span, name, last, max(own, key=lambda item: item[1])[2] if own else None)
        found += self._of_template_text(span, name, [item[:2] for item in own], first, last)
        return found

    def _of_start(self, span: _Span, name: str, first: int | None, floor: int) -> list[str]:
        """It begins where the generation prompt ends; `floor` is where the words of earlier messages end."""
        allowed = self._starts(span.messages[0], first, span.end, floor)
        if allowed is None:
            return []
        tokens = self._token_borders()
        right = {min((b for b in tokens if b >= start), default=len(self.text)) for start in allowed}
        if span.begin in right | allowed:
            return []
        wrong = self.text[min(span.begin, *right) : max(span.begin, *right)]
        said = self.messages[span.messages[0]].get("content")
        blank = said[: len(said) - len(said.lstrip())] if isinstance(said, str) else ""
        if blank and first is not None and self.text[span.begin : first] == blank:
            return []  # all the white space that the answer says itself, of which the prompt writes some too
        early = "early" if span.begin < min(right) else "late"
        return [f"mask: {name} begins too {early}, by {wrong[:40]!r}"]

    def _starts(self, turn: int, first: int | None, end: int, floor: int = 0) -> set[int] | None:
        before = self.messages[:turn]
        asked, plain = self.render(before, prompt=True), self.render(before)
        if asked is None:
            return None
        limit = end if first is None else first
        if self.text.startswith(asked) and len(asked) <= limit:
            if asked == plain and first is not None and self.text[len(asked) : first].strip():
                return set(range(len(asked), first + 1))  # no generation prompt, but a header, which is not trained
            return {len(asked)}
        prompt = asked[len(_common(asked, plain or "")) :] if plain is not None and asked.startswith(plain) else None
        if prompt is None:
            prompt = asked[self._last_added(asked) :]
        prompt = prompt.lstrip()
        if not prompt:  # what stands between the last words before and this turn
            between = self.text[floor:limit]
            shared = next((k for k in range(len(between), 0, -1) if asked.endswith(between[:k])), 0)
            return {floor + shared} if shared else None
        # the prompt stands elsewhere, or only in part: history may lack the <think> that it opens
        best: tuple[int, int] | None = None
        opening = next((t for t in self.added.values() if prompt.startswith(t)), prompt[: min(4, len(prompt))])
        at = self.text.find(opening, floor)
        while 0 <= at <= limit:
            shared = len(_common(prompt, self.text[at:limit]))
            if shared >= len(opening) and (best is None or shared >= best[0] or at + shared == limit):
                best = (shared, at)
            at = self.text.find(opening, at + 1)
        if best is None:
            return None
        start = sum(best)
        starts = {next((b for b, e in self._added_ranges() if b < start < e), min(start, limit))}
        if "<think>" in prompt[: best[0]]:  # it opens a thought that is not this turn's, which may then be all trained
            starts.add(best[1] + prompt.index("<think>"))
        return starts

    def _last_added(self, text: str) -> int:
        return max((text.rfind(token) for token in self.added.values()), default=0)

    def _of_end(self, span: _Span, name: str, last: int | None, leaf: Leaf | None) -> list[str]:
        """It ends with the control token that follows whatever comes next, or, if there is none, with the first."""
        if last is None:
            last = min(span.end, max(self._starts(span.messages[-1], None, span.end) or {span.begin}))
        later = [(b, e) for b, e in self._added_ranges() if b >= last]
        if not later:
            return [f"mask: {name} has no control token behind it"]
        fixed = self._fixed_tail(span.messages[-1], last, leaf)
        shared = later if fixed is None else [(b, e) for b, e in later if e <= last + fixed]
        if fixed is None or not shared:
            allowed = {later[0][1]} if fixed is not None else {e for _, e in later}
        else:
            names = [self.text[b:e] for b, e in shared]
            opening = self._opening()
            while len(names) > 1 and (names[-1] == opening or OPENS.match(names[-1])):
                names.pop()
            # a token written twice ends a turn the first time
            allowed = {e for n, (_, e) in enumerate(shared[: len(names)]) if set(names[n:]) == {names[-1]}}
        if span.end not in allowed:
            right = min(allowed, key=lambda e: abs(e - span.end))
            much = self.text[min(right, span.end) : max(right, span.end)]
            return [f"mask: {name} ends too {'late' if span.end > right else 'early'}, by {much[:40]!r}"]
        ending = next(self.text[b:e] for b, e in later if e == span.end)
        if CLOSES_A_PART.search(ending) and ending != "<|call|>":
            return [f"unsure: {name} ends with {ending}, which ends a part, not a turn"]
        return []

    def _fixed_tail(self, turn: int, last: int, leaf: Leaf | None) -> int | None:
        """How many characters after the turn's last word do not depend on what comes next. None: cannot be told."""
        until = self.messages[: turn + 1]
        if turn + 1 < len(self.messages):
            alone = self.render(until)
            return self._shared_tail(until, alone, leaf, last)
        nexts: list[dict[str, Any]] = [{"role": "user", "content": "Qzwv jxkq."}]
        if self.messages[turn].get("tool_calls"):
            call = self.messages[turn]["tool_calls"][0]
            name = call["function"]["name"]
            nexts.insert(0, {"role": "tool", "content": "Qzwv.", "tool_call_id": call.get("id"), "name": name})
        for message in nexts:
            longer = [*until, message]
            text = self.render(longer)
            shared = self._shared_tail(longer, text, leaf, last)
            if shared is not None:
                return shared
        return None

    def _shared_tail(
        self, messages: list[dict[str, Any]], text: str | None, leaf: Leaf | None, last: int
    ) -> int | None:
        """How far what `text`, the rendering of `messages`, writes after the turn's last word is what stands here."""
        if text is None:
            return None
        if leaf is None:
            shared = len(_common(text, self.text))
            written = [e for _, e in self._added_ranges() if last < e <= shared]
            return shared - last if written else None  # else what is written depends on what comes next
        ranges = self._owned(leaf, 999, messages, text)
        return len(_common(text[max(e for _, e in ranges) :], self.text[last:])) if ranges else None

    def _opening(self) -> str | None:
        """The control token with which the generation prompt begins."""
        asked, plain = self.render(self.messages, prompt=True), self.render(self.messages)
        if asked is None or plain is None or not asked.startswith(plain):
            return None
        prompt = asked[len(plain) :].lstrip()
        return next((token for token in sorted(self.added.values(), key=len)[::-1] if prompt.startswith(token)), None)

    def _of_template_text(
        self, span: _Span, name: str, own: list[Range], first: int | None, last: int | None
    ) -> list[str]:
        """Before the first and after the last word of its own a turn has no header; nor the None of a missing text."""
        found = []
        first, last = (span.end, span.end) if first is None or last is None else (first, last)
        for b, e in self._added_ranges():
            header = ROLE.match(self.text, e)
            at_front = span.begin <= b and not self.text[span.begin : b].strip()
            outside = (at_front and b < first) or last <= b < span.end
            if header and outside and header.end() <= span.end and not any(x < header.end() and y > e for x, y in own):
                found.append(f"mask: {name} trains a header, {self.text[b : header.end()]!r}")
        if any(self.messages[i].get("content") is None for i in span.messages):
            bare = "".join(self.text[a:b] for a, b in _gaps(span, own))
            if re.search(r"\bNone\b|\bnull\b", bare):
                found.append(f"garbage: {name} writes None for an absent text")
        return found

    def _added_ranges(self) -> list[Range]:
        chars = _char_of_byte(self.text)
        return [
            (chars[self.borders_T[t]], chars[self.borders_T[t + 1]])
            for t, i in enumerate(self.encoded.ids_T.tolist())
            if i in self.added
        ]

    def _token_borders(self) -> list[int]:
        chars = _char_of_byte(self.text)
        return [chars[b] for b in self.borders_T if chars[b] >= 0]


@dataclass
class _Span:
    messages: list[int]
    begin: int
    end: int
    ends: bool  # with a control token


def _merged(spans: list[_Span]) -> list[_Span]:
    """Answers in a row that a template writes as one are one."""
    merged: list[_Span] = []
    for span in sorted(spans, key=lambda s: s.begin):
        last = merged[-1] if merged else None
        if last and not last.ends and last.end == span.begin and last.messages[-1] + 1 == span.messages[0]:
            merged[-1] = _Span(last.messages + span.messages, last.begin, span.end, span.ends)
        else:
            merged.append(span)
    return merged


def _common(a: str, b: str) -> str:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return a[:low]


def _gaps(span: _Span, own: list[Range]) -> list[Range]:
    at, gaps = span.begin, []
    for begin, end in own:
        gaps.append((at, max(at, begin)))
        at = max(at, end)
    return [*gaps, (at, span.end)]


def _bytes_of_chars() -> dict[str, int]:
    """Byte-level tokenizers' letters: printable bytes stand for themselves, the others for letters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = _bytes_of_chars()


def _pieces(tokenizer: Any, ids: list[int], added: dict[int, str]) -> list[bytes]:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [
        added[i].encode() if i in added else bytes(BYTES[c] for c in token)
        for i, token in zip(ids, tokens, strict=True)
    ]


def _borders(tokenizer: Any, encoded: Any, added: dict[int, str]) -> list[int]:
    lengths = [len(piece) for piece in _pieces(tokenizer, encoded.ids_T.tolist(), added)]
    return [0, *np.cumsum(lengths, dtype=int).tolist()]


def _char_of_byte(text: str) -> list[int]:
    """The character that begins at each byte, -1 inside of one, and at the end their number."""
    chars: list[int] = []
    for number, char in enumerate(text):
        chars += [number] + [-1] * (len(char.encode()) - 1)
    return [*chars, len(text)]
