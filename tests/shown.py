"""A conversation as Encoded, put together by hand: each stretch of text with its message, part and weight."""

import numpy as np

from posttrain.data.encoded import NO_MESSAGE, Encoded, Part, Turn


def encoded_from(tokenizer, stretches, why="data.train_on=last", notes=()):
    """`stretches` are (text, message or None, part, weight or None outside of turns); a turn's have a weight, and end with END."""
    text = "".join(stretch[0] for stretch in stretches)
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    owner = np.repeat(np.arange(len(stretches)), [len(stretch[0]) for stretch in stretches])
    owner_T = [int(owner[start]) for start, _ in tokens.offsets]
    messages_T = [NO_MESSAGE if stretches[o][1] is None else stretches[o][1] for o in owner_T]
    parts_T = [stretches[o][2] for o in owner_T]
    in_turn_T = [stretches[o][3] is not None for o in owner_T]
    weights_T = [stretches[o][3] or 0.0 for o in owner_T]
    turns, begin = [], None
    for t, inside in enumerate(in_turn_T):
        begin = t if inside and begin is None else begin
        if inside and parts_T[t] == Part.END:
            weight = max(weights_T[begin : t + 1])
            turns.append(Turn(messages_T[t], begin, t + 1, weight, why if weight == 0 else "all assistant turns"))
            begin = None
    return Encoded(
        text, np.array(tokens.ids, dtype=np.int32), np.array(weights_T, dtype=np.float32),
        np.array(tokens.offsets, dtype=np.int32).reshape(-1, 2), np.array(messages_T, dtype=np.int32),
        np.array([int(p) for p in parts_T], dtype=np.uint8), tuple(turns), tuple(notes),
    )  # fmt: skip


ROLES = ("system", "user", "assistant", "tool", "assistant", "user", "assistant")
NOTES = ("1 control string in message 5 (user) was encoded as text: <|im_end|>",)


def whole_story(weight=1.0, question="Und morgen? 🤖👍🏽"):
    """Tools, thinking, a tool call, a turn left out, a control string that a user wrote, spaces at ends of lines."""
    T, N, X, R, C, S, E = (
        Part.TEMPLATE, Part.NAME, Part.TEXT, Part.REASONING, Part.TOOL_CALL, Part.TOOLS, Part.END)  # fmt: skip

    def header(message, role):
        return [("<|im_start|>", None, T, None), (role, message, N, None), ("\n", None, T, None)]

    def closed():
        return [("<|im_end|>", None, T, None), ("\n", None, T, None)]

    return [
        *header(0, "system"), ("Answer in one sentence.", 0, X, None), ("\n\n# Tools\n\n<tools>", None, T, None),
        ('\n{"type": "function", "function": {"name": "get_weather", "description": "Weather in a city",'
         ' "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}', None, S, None),
        ("\n</tools>", None, T, None), *closed(),
        *header(1, "user"), ("Wie ist das Wetter in Zürich?  \nUnd in <script>alert(1)</script>?", 1, X, None), *closed(),
        *header(2, "assistant"), ("<think>\n", None, T, weight),
        ("The user asks for the weather in Zürich.\nI should call the tool.", 2, R, weight),
        ("\n</think>\n\n", None, T, weight),
        ('<tool_call>\n{"name": "', None, T, weight), ("get_weather", 2, C, weight), ('", "arguments": ', None, T, weight),
        ('{"city": "Zürich"}', 2, C, weight), ("}\n</tool_call>", None, T, weight), ("<|im_end|>", 2, E, weight),
        ("\n", None, T, None),
        *header(3, "tool"), ('{"celsius": 21}', 3, X, None), *closed(),
        *header(4, "assistant"), ("It is 21 °C in Zürich. ☀️", 4, X, 0.0), ("<|im_end|>", 4, E, 0.0), ("\n", None, T, None),
        *header(5, "user"), (question, 5, X, None), *closed(),
        *header(6, "assistant"), ("Tomorrow: 19\u00a0°C 🌧️ and\ttrailing spaces  ", 6, X, weight), ("<|im_end|>", 6, E, weight),
        ("\n", None, T, None),
    ]  # fmt: skip
