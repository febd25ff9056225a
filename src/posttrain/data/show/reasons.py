"""Why a token is trained, or not: one sentence for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.data.encoded import NO_MESSAGE, Encoded, Part, Turn
from posttrain.data.show.blocks import headers_of, owners

_WITHIN = {
    Part.TEMPLATE: "what the template writes within {message}",
    Part.NAME: "a name in {message}",
    Part.TEXT: "text of {message}",
    Part.REASONING: "thinking of {message}",
    Part.TOOL_CALL: "a tool call of {message}",
    Part.TOOLS: "the description of a tool in {message}",
    Part.END: "the token that ends {message}",
    Part.UNKNOWN: "a part of {message}",
}
_LEFT_OUT = {
    Part.TEMPLATE: "written by the template around a part of {message} that is left out",
    Part.REASONING: "thinking of {message}, which is left out",
}
_OUTSIDE = {
    Part.TEMPLATE: "written by the template",
    Part.NAME: "a name in the header of {message}",
    Part.TOOLS: "the description of a tool",
    Part.UNKNOWN: "written by the template in a way that does not tell where it comes from",
}


def reasons_of(encoded: Encoded, roles_M: Sequence[str]) -> list[str]:
    """A sentence for each token; equal ones are one object."""
    why = _Why(roles_M)
    turns_T: list[Turn | None] = [None] * len(encoded)
    headers_T: list[int] = [NO_MESSAGE] * len(encoded)
    for one, before in zip(encoded.turns, headers_of(encoded), strict=True):
        turns_T[one.begin : one.end] = [one] * (one.end - one.begin)
        headers_T[before.start : before.stop] = [one.message] * len(before)
    known: dict[tuple, str] = {}
    found = zip(
        turns_T, headers_T, owners(encoded).tolist(), encoded.parts_T.tolist(), encoded.weights_T.tolist(), strict=True
    )
    reasons = []
    for key in found:
        if key not in known:
            turn, header, message, part, weight = key
            known[key] = why.reason(turn, header, message, Part(part), weight)
        reasons.append(known[key])
    for number, image in enumerate(encoded.images):
        reasons[image.begin : image.end] = [f"not trained: image {number}"] * (image.end - image.begin)
    return reasons


@dataclass(frozen=True)
class _Why:
    roles_M: Sequence[str]

    def reason(self, turn: Turn | None, header: int, message: int, part: Part, weight: float) -> str:
        if weight > 0:
            within = _WITHIN[part].format(message=self._name(message)) if turn else "the row's own weights say so"
            return f"trained: {within}{'' if weight == 1 else f', with weight {weight:.4g}'}"
        return f"not trained: {self._why_not(turn, header, message, part)}"

    def _why_not(self, turn: Turn | None, header: int, message: int, part: Part) -> str:
        name = self._name(message)
        if turn and turn.weight == 0:
            return f"{_WITHIN[part].format(message=name)}, a turn that is left out ({turn.why})"
        if turn:
            return _LEFT_OUT.get(part, "a part of {message} that is left out").format(message=name)
        if header != NO_MESSAGE and part in (Part.TEMPLATE, Part.NAME, Part.UNKNOWN):
            return f"the header of {self._name(header)}, which the generation prompt writes"
        if message == NO_MESSAGE and not self.roles_M:
            return "the row's own weights say so"
        if message == NO_MESSAGE or part in _OUTSIDE:
            return _OUTSIDE.get(part, "written by the template").format(message=name)
        return _WITHIN[part].format(message=name)

    def _name(self, message: int) -> str:
        return f"message {message} ({self.roles_M[message]})" if message != NO_MESSAGE else "no message"
