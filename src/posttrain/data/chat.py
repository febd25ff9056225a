"""Conversation -> token ids, and for each its weight as a target and where it came from.

A conversation is rendered once, whole, by the model's own template. What is trained is decided by where each character came
from (`posttrain.data.provenance`); what cannot be shown is refused with the reason, never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from posttrain.config.schema import DataOptions
from posttrain.data.controls import ControlStrings
from posttrain.data.encoded import NO_MESSAGE, Encoded, EncodedImage, Part, Turn
from posttrain.data.formats import RowError, prompt_of
from posttrain.data.images.expansion import Expanded, MarkExpander, look_at, look_at_all, refuse_images
from posttrain.data.images.processor import ImageText
from posttrain.data.provenance.borders import REFUSED, UNPROVEN, Borders
from posttrain.data.provenance.forms import asks_for_parts, forms_of, in_parts
from posttrain.data.provenance.marked import code_parts
from posttrain.data.provenance.messages import MarkedConversation
from posttrain.data.provenance.template import MarkedTemplate, Rendered
from posttrain.data.provenance.turns import Span, find_span
from posttrain.errors import InputError
from posttrain.records import Conversation, Tokens

ASSISTANT = "assistant"
_KEPT_SHAPES = 10_000
_MOST_WEIGHT = 1e6


@dataclass(frozen=True)
class Rules:
    """Which turns are trained, and how conversations are rendered; the options of `data` that change ids or masks.

    A weight that a message carries itself comes before `train_on` and `roles`. `today` is the day that templates may print.
    """

    train_on: str = "all"  # or "last"
    roles: tuple[str, ...] = (ASSISTANT,)
    reasoning: bool = True
    expand_turns: bool = False
    control_strings: str = "text"  # or "allow"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    today: date = field(default_factory=date.today)

    @classmethod
    def of(cls, data: DataOptions) -> Rules:
        """The rules that the options ask for."""
        thinking = {} if data.enable_thinking is None else {"enable_thinking": data.enable_thinking}
        return cls(
            data.train_on,
            tuple(data.train_roles),
            data.train_reasoning,
            data.expand_turns,
            data.control_strings,
            {**data.chat_template_kwargs, **thinking},
            date.fromisoformat(data.date) if data.date else date.today(),
        )


@dataclass(frozen=True)
class _Draft:
    """A rendered conversation before it is tokenized. `spans` are of turns with a weight, and of others where they are known."""

    expanded: Expanded
    messages: list[dict[str, Any]]
    spans: list[tuple[Span, float, str]]
    notes: list[str]


class ChatTokenizer:
    """A tokenizer and its chat template, as one reader of conversations.

    `tokenizer` is a fast tokenizer of transformers, `images` what a model that sees makes of images. Raises InputError where
    the tokenizer has no template, one that does not compile, is not a fast one, or has no token that could end a turn.
    """

    def __init__(self, tokenizer: Any, rules: Rules | None = None, images: ImageText | None = None):
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.is_fast:
            raise InputError(f"{name}: only fast tokenizers (tokenizer.json) tell where a token lies in the text.")
        if not tokenizer.chat_template:
            raise InputError(f"{name} has no chat template. Give one: data.chat_template=FILE.jinja")
        if not tokenizer.added_tokens_decoder:
            raise InputError(f"{name} has no control token, so that nothing can end an assistant's turn.")
        self.tokenizer, self.rules, self.images = tokenizer, rules or Rules(), images
        self._backend = _plain_backend(tokenizer.backend_tokenizer)
        self._controls = ControlStrings(self._backend, tokenizer.added_tokens_decoder, str(tokenizer.chat_template))
        self._borders: dict[str, Borders] = {}
        self._compared: set[tuple[Any, ...]] = set()
        self._prints_date = "strftime_now" in str(tokenizer.chat_template)
        looking = "{{ 'content' in messages[0] }}"
        empty = [{"role": "user", "content": None}]
        self._drops_nulls = tokenizer.apply_chat_template(empty, chat_template=looking, tokenize=False) == "False"
        self._marks = None if images is None else MarkExpander(images, tokenizer)
        self._parts_only = images is not None and asks_for_parts(partial(tokenizer.apply_chat_template, tokenize=False))
        self._kwargs = self.rules.template_kwargs
        self._borders_for(None if isinstance(tokenizer.chat_template, str) else [])

    def end_ids(self, ids_T: np.ndarray, weights_T: np.ndarray) -> list[int]:
        """The control tokens that end trained stretches of a sample."""
        trained_T = weights_T > 0
        ends_T = ids_T[trained_T & ~np.append(trained_T[1:], False)]
        return ends_T[self._controls.is_control(ends_T)].tolist()

    @property
    def rules_key(self) -> str:
        """Changes with every rule that changes ids or weights; with the date only where the template prints one."""
        return repr(self.rules if self._prints_date else replace(self.rules, today=date.min))

    def encode(self, conversation: Conversation | Tokens) -> Encoded:
        """The first sample of the conversation. Raises RowError."""
        samples = self.encode_many([conversation])[0]
        if isinstance(samples, RowError):
            raise samples
        return samples[0]

    def encode_many(
        self, conversations: Sequence[Conversation | Tokens], origins: bool = True
    ) -> list[list[Encoded] | RowError]:
        """The samples of each, tokenized on all cores; a bad row gives its RowError in its place. Without `origins` their
        `messages_T` and `parts_T` are left empty, which is faster."""
        drafts: list[list[_Draft] | Encoded | RowError] = []
        for conversation in look_at_all(conversations) if self._marks else conversations:
            try:
                if isinstance(conversation, RowError):
                    drafts.append(conversation)
                elif isinstance(conversation, Tokens):
                    drafts.append(self._ready_made(conversation, origins))
                else:
                    drafts.append(list(self._drafts(conversation)))
            except RowError as error:
                drafts.append(error)
            except Exception as error:  # a row holds anything, and a template does anything with it: no row ends a run
                drafts.append(RowError("cannot be rendered", f"{type(error).__name__}: {error}"))
        texts = [draft.expanded.rendered.text for item in drafts if isinstance(item, list) for draft in item]
        tokens = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        results: list[list[Encoded] | RowError] = []
        for item in drafts:
            if isinstance(item, RowError):
                results.append(item)
            elif isinstance(item, list):
                results.append(self._masked_all([(draft, next(tokens)) for draft in item], origins))
            else:
                results.append([item])
        return results

    def prompt_ids(self, conversation: Conversation) -> np.ndarray:
        """Ids (int32) of the messages before the last assistant's turn, with the header that asks for an answer."""
        return self.prompt(replace(conversation, messages=prompt_of(conversation.messages))).ids_T

    def prompt(self, conversation: Conversation) -> Encoded:
        """All of the messages, with the header that asks for an answer; nothing of it is trained. Raises RowError."""
        seen = look_at(conversation) if self._marks else conversation
        rendered, _, notes = self._render(replace(seen, weights=None), prompt=True)
        expanded = self._expanded(rendered, seen)
        rendered = expanded.rendered
        tokens = self._backend.encode(rendered.text, add_special_tokens=False)
        ids_T, offsets_TC, _ = self._ids_and_offsets(rendered, seen.messages, tokens)
        images = self._images_among(expanded, ids_T, offsets_TC)
        none_T = np.zeros(0, np.int32)
        weights_T = np.zeros(len(ids_T), np.float32)
        return Encoded(
            rendered.text, ids_T, weights_T, offsets_TC, none_T, none_T.astype(np.uint8), (), tuple(notes), images
        )

    def beginning(self, text: str, max_tokens: int) -> str:
        """As much of the text as makes so many tokens, control strings encoded as text."""
        return self._controls.beginning(text, max_tokens)

    def _drafts(self, conversation: Conversation) -> Iterator[_Draft]:
        if not conversation.messages:
            raise RowError("no messages", "the conversation is empty")
        chosen = self._chosen(conversation)
        if not any(weight for weight, _ in chosen.values()):
            raise _nothing_chosen(conversation, self.rules)
        if not self.rules.expand_turns:
            yield self._draft(conversation, chosen)
            return
        for turn, (weight, why) in chosen.items():
            if weight:
                others = {t: (0.0, "it has a sample of its own") for t in chosen if t < turn}
                until = replace(conversation, messages=conversation.messages[: turn + 1], weights=None)
                yield self._draft(until, {**others, turn: (weight, why)})

    def _draft(self, conversation: Conversation, chosen: dict[int, tuple[float, str]]) -> _Draft:
        rendered, marked, notes = self._render(conversation)
        borders = self._borders_for(conversation.tools)
        spans: list[tuple[Span, float, str]] = []
        for turn, (weight, why) in chosen.items():
            try:
                is_assistants = conversation.messages[turn]["role"] == ASSISTANT
                span = find_span(borders, marked, rendered, turn, header=is_assistants)
            except RowError:
                if weight:
                    raise
                continue  # nothing of it is trained, so that nothing need be proven
            if spans and span.start < spans[-1][0].end:
                raise RowError(UNPROVEN, f"messages {spans[-1][0].message} and {turn} overlap in the rendered text")
            spans.append((span, weight, why))
            notes += span.notes if weight else ()
        expanded = self._expanded(rendered, conversation)
        spans = [(expanded.moved(span, trained=weight > 0), weight, why) for span, weight, why in spans]
        return _Draft(expanded, conversation.messages, spans, notes)

    def _expanded(self, rendered: Rendered, conversation: Conversation) -> Expanded:
        return Expanded(rendered) if self._marks is None else self._marks.expand(rendered, conversation)

    def _images_among(self, expanded: Expanded, ids_T: np.ndarray, offsets_TC: np.ndarray) -> tuple[EncodedImage, ...]:
        images = expanded.images(offsets_TC)
        if self._marks is not None:
            self._marks.check_placeholders(ids_T, images)
        return images

    def _chosen(self, conversation: Conversation) -> dict[int, tuple[float, str]]:
        """The turns that could be trained: each one's weight, and by whose choice."""
        rules, weights = self.rules, conversation.weights or (None,) * len(conversation.messages)
        last = max((i for i, m in enumerate(conversation.messages) if m["role"] in rules.roles), default=-1)
        chosen = {}
        for turn, (message, weight) in enumerate(zip(conversation.messages, weights, strict=True)):
            if weight and not 1 / _MOST_WEIGHT <= weight <= _MOST_WEIGHT:
                raise RowError(
                    "weight out of range", f"message {turn} has the weight {weight:g}, expected 0, or 1e-6 to 1e6"
                )
            if weight is not None and (weight or message["role"] in rules.roles):
                chosen[turn] = (float(weight), "the row gives its weight")
            elif message["role"] in rules.roles:
                is_chosen = rules.train_on == "all" or turn == last
                chosen[turn] = (float(is_chosen), f"data.train_on={rules.train_on}")
        return chosen

    def _render(
        self, conversation: Conversation, prompt: bool = False
    ) -> tuple[Rendered, MarkedConversation, list[str]]:
        """The text of `apply_chat_template` with its origins, the messages in the form that the template takes, and notes.

        Where the template refuses messages as they stand, a null text is given as an empty one and arguments of tool calls
        in their other form (JSON text or object); arguments that would be encoded twice are given as objects.
        """
        if self._marks is None:
            refuse_images(conversation)
        borders = self._borders_for(conversation.tools)
        variables = {**self.tokenizer.special_tokens_map, **self._kwargs}
        first_error = None
        for form, note in forms_of(conversation.messages):
            messages = in_parts(form) if self._parts_only else form
            marked = MarkedConversation(
                messages,
                conversation.tools,
                variables,
                conversation.template_kwargs,
                self._drops_nulls,
                self._parts_only,
            )
            try:
                rendered = borders.render(marked, prompt=prompt)
                if marked.trace.encoded_again:
                    raise RowError(
                        REFUSED, "the chat template encodes the arguments of tool calls as JSON a second time"
                    )
                self._check_equal(rendered, conversation, marked, messages, prompt)
            except RowError as error:
                if error.kind != REFUSED:
                    raise
                first_error = first_error or error
                continue
            _check_unicode(rendered.text)
            return rendered, marked, [*conversation.notes, *([note] if note else [])]
        assert first_error
        raise first_error

    def _check_equal(
        self,
        rendered: Rendered,
        conversation: Conversation,
        marked: MarkedConversation,
        messages: list[dict[str, Any]],
        prompt: bool,
    ) -> None:
        """Raise RowError unless the text is what `apply_chat_template` writes. That is asked once for each sequence of message
        shapes; from then on its template is, with the messages as it is given them."""
        shapes = (prompt, conversation.tools is None, tuple(conversation.template_kwargs), *marked.shapes)
        template = self._borders_for(conversation.tools).template
        given = {"documents": None, **marked.variables, "messages": marked.plain, "tools": conversation.tools}
        try:
            if shapes in self._compared or (self._prints_date and self.rules.today != date.today()):
                expected = template.render_plain(**given, add_generation_prompt=prompt)
            else:
                kwargs = {**self._kwargs, **conversation.template_kwargs}
                expected = self.tokenizer.apply_chat_template(
                    messages, tools=conversation.tools, tokenize=False, add_generation_prompt=prompt, **kwargs
                )
        except Exception as error:  # what it raises is the template's choice
            raise RowError(REFUSED, f"the chat template says: {error}") from None
        if rendered.text != expected:
            raise RowError(UNPROVEN, "following where its text comes from changes what the template writes")
        if len(self._compared) < _KEPT_SHAPES:
            self._compared.add(shapes)

    def _borders_for(self, tools: Any) -> Borders:
        from jinja2 import TemplateError

        source = self.tokenizer.get_chat_template(None, tools)
        if source not in self._borders:
            try:
                template = MarkedTemplate(source, self.rules.today)
            except TemplateError as error:
                said = str(error).rstrip(".")
                raise InputError(
                    f"The chat template does not compile: {said}. Mend it, or give another: data.chat_template=FILE.jinja"
                ) from None
            self._borders[source] = Borders(template, self._controls.strings)
        return self._borders[source]

    def _masked_all(self, drafts: list[tuple[_Draft, Any]], origins: bool) -> list[Encoded] | RowError:
        try:
            return [self._masked(draft, tokens, origins) for draft, tokens in drafts]
        except RowError as error:
            return error

    def _masked(self, draft: _Draft, tokens: Any, origins: bool) -> Encoded:
        rendered, notes = draft.expanded.rendered, list(draft.notes)
        ids_T, offsets_TC, typed = self._ids_and_offsets(rendered, draft.messages, tokens)
        for (m, text), times in Counter(typed).items():
            where = f"message {m}" if m >= 0 else "the tools"
            notes.append(f"{where}: {text!r} is encoded as text" + (f" {times} times" if times > 1 else ""))
        images = self._images_among(draft.expanded, ids_T, offsets_TC)
        starts_T = offsets_TC[:, 0]
        weights_T = np.zeros(len(ids_T), dtype=np.float32)
        codes_T = (
            rendered.code_array[np.minimum(starts_T, max(len(rendered.text) - 1, 0))]
            if origins
            else rendered.code_array[:0]
        )
        messages_T, parts_T = code_parts(codes_T)
        turns = []
        for span, weight, why in draft.spans:
            begin, end = self._tokens_of(rendered.text, span, offsets_TC, ids_T, strict=weight > 0)
            if origins:
                messages_T[begin:end] = span.message
                parts_T[end - 1] = Part.END
            weights_T[begin:end] = weight
            if not self.rules.reasoning and weight:
                if span.reasoning_end is None:
                    found = f"message {span.message}: its reasoning stands behind text, and cannot be left out"
                    raise RowError(UNPROVEN, found)
                weights_T[begin : int(np.searchsorted(starts_T, span.reasoning_end, "left"))] = 0
            turns.append(Turn(span.message, begin, end, weight, why))
        return Encoded(
            rendered.text, ids_T, weights_T, offsets_TC, messages_T, parts_T, tuple(turns), tuple(notes), images
        )

    def _tokens_of(
        self, text: str, span: Span, offsets_TC: np.ndarray, ids_T: np.ndarray, strict: bool
    ) -> tuple[int, int]:
        """The span's tokens: [begin, end). A token that the header shares with what the template writes next is the header's.

        Raises RowError, if `strict`, where a token lies across a border of the turn's own text or no single token ends it.
        """
        begin = int(np.searchsorted(offsets_TC[:, 1], span.start, "right"))
        end = int(np.searchsorted(offsets_TC[:, 0], span.end, "left"))
        if begin < end and offsets_TC[begin, 0] < span.start and offsets_TC[begin, 1] <= span.own_start:
            begin += 1
        if strict:
            first, last = (offsets_TC[begin, 0], offsets_TC[end - 1, 1]) if begin < end else (span.start, -1)
            if (
                last > span.end
                and not text[span.end : last].strip()
                and self._controls.is_control(ids_T[end - 1 : end])[0]
            ):
                last = span.end  # a control token that takes in the white space behind it
            if first < span.start or last > span.end:
                piece = text[slice(*offsets_TC[begin if first < span.start else end - 1])]
                raise RowError(UNPROVEN, f"the token {piece!r} lies across the border of message {span.message}")
            if last < span.end or not self._controls.is_control(ids_T[end - 1 : end])[0]:
                raise RowError(UNPROVEN, f"what ends message {span.message} is not one token of this tokenizer")
        return begin, end

    def _ids_and_offsets(
        self, rendered: Rendered, messages: list[dict[str, Any]], tokens: Any
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
        """Ids (int32) and offsets; control strings that others than the assistant typed become text, and are listed."""
        ids_T = np.asarray(tokens.ids, dtype=np.int32)
        offsets = chain.from_iterable(tokens.offsets)
        offsets_TC = np.fromiter(offsets, dtype=np.int32, count=2 * len(ids_T)).reshape(-1, 2)
        typed: list[tuple[int, str]] = []
        if self.rules.control_strings != "allow":
            theirs = [message["role"] != ASSISTANT for message in messages]
            ids_T, offsets_TC, typed = self._controls.as_text(rendered, theirs, ids_T, offsets_TC)
        if self._marks is not None:
            ids_T, offsets_TC = self._marks.with_begin(rendered.text, ids_T, offsets_TC)
        return ids_T, offsets_TC, typed

    def _ready_made(self, tokens: Tokens, origins: bool) -> Encoded:
        """A row that came as tokens, each of which is a piece of text of its own."""
        if len(tokens.ids_T) and tokens.ids_T.max() >= len(self.tokenizer):
            found = f"token id {tokens.ids_T.max()}, and this tokenizer has {len(self.tokenizer):,}"
            raise RowError("token id out of range", f"{found}; was the row made for another model?")
        if not np.isfinite(tokens.weights_T).all():
            raise RowError("weight out of range", "a weight is not a finite number of single precision")
        if self._marks is not None:
            self._marks.check_placeholders(tokens.ids_T, ())
        if not origins:
            none_T = np.zeros(0, np.int32)
            return Encoded("", tokens.ids_T, tokens.weights_T, none_T.reshape(0, 2), none_T, none_T.astype(np.uint8))
        pieces = [self.tokenizer.decode([i]) for i in tokens.ids_T.tolist()]
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int32)
        offsets_TC = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1).astype(np.int32)
        none_T, parts_T = np.full(len(pieces), NO_MESSAGE, np.int32), np.full(len(pieces), Part.UNKNOWN, np.uint8)
        return Encoded("".join(pieces), tokens.ids_T, tokens.weights_T, offsets_TC, none_T, parts_T)


def _nothing_chosen(conversation: Conversation, rules: Rules) -> RowError:
    roles = dict.fromkeys(message["role"] for message in conversation.messages)
    if not roles.keys() & set(rules.roles):
        last = conversation.messages[-1]["role"]
        return RowError(
            "no turn to train on",
            f"the last message is from '{last}' and none is from '{' or '.join(rules.roles)}'; SFT needs a final "
            f"'{rules.roles[0]}' message to train on",
        )
    return RowError("no turn to train on", "every turn has the weight 0")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "not Unicode", f"the text holds half a character pair: {text[error.start : error.end]!a}"
        ) from None


def _plain_backend(backend: Any) -> Any:
    """The tokenizer without truncation and padding, and without a post-processor that trims white space from offsets (Llama
    3's does)."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    if '"trim_offsets":true' in backend.to_str().replace(" ", ""):
        copy.post_processor = None
    return copy
