"""Templates that do to messages what real ones do, at their worst: NASTY[name] is (template, what must come out, shape).

What must come out is EXACT (ids and mask right), REFUSED (no right mask exists, or none that would teach what the turn
says), or EITHER. `shape` names the conversation of shapes.py on which that is so. EITHER never means wrong.
"""

from __future__ import annotations

from typing import NamedTuple

EXACT, REFUSED, EITHER = "exact", "refused", "either"


class Nasty(NamedTuple):
    template: str
    expected: str
    shape: str = "two turns"


HEAD = "<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(
    body: str = "{{ m.content }}", head: str = HEAD, end: str = END, prompt: str = PROMPT, before: str = ""
) -> str:
    """ChatML whose messages are written by `body`, in which `m` is the message."""
    return before + "{% for m in messages %}" + head + body + end + "{% endfor %}" + prompt


def answers(body: str) -> str:
    """ChatML in which only the assistant's text is written by `body`."""
    return chatml("{% if m.role == 'assistant' %}" + body + "{% else %}{{ m.content }}{% endif %}")


CALLS = "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
TOOL_ANSWER = "tool call and answer"
TOOL_TEXT = "tool call with text"

NASTY: dict[str, Nasty] = {
    # ---- text goes through an operation that keeps it
    "macro": Nasty(chatml("{{ text(m) }}", before="{% macro text(m) %}{{ m.content }}{% endmacro %}"), EXACT),
    "macro of a whole message": Nasty(
        "{% macro one(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endmacro %}"
        "{% for m in messages %}{{ one(m) }}{% endfor %}" + PROMPT, EXACT),
    "macro that swaps text and reasoning": Nasty(  # the answer comes before the thought, but all of it is the turn's
        chatml("{{ two(m.content, m.reasoning_content) }}",
               before="{% macro two(a, b) %}{{ a }}{% if b %}<think>{{ b }}</think>{% endif %}{% endmacro %}"),
        EXACT, "reasoning field"),
    "call block": Nasty(
        chatml("{% call wrap() %}{{ m.content }}{% endcall %}", before="{% macro wrap() %}{{ caller() }}{% endmacro %}"), EXACT),
    "set block": Nasty(chatml("{% set x %}{{ m.content }}{% endset %}{{ x }}"), EXACT),
    "tilde": Nasty("{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}" + PROMPT, EXACT),
    "plus": Nasty("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}" + PROMPT, EXACT),
    "percent": Nasty("{% for m in messages %}{{ '<|im_start|>%s\n%s<|im_end|>\n' % (m.role, m.content) }}{% endfor %}" + PROMPT, EITHER),
    "format filter": Nasty(chatml("{{ '%s' | format(m.content) }}"), EITHER),
    "format method": Nasty(chatml("{{ '{}'.format(m.content) }}"), EITHER),
    "join over a list": Nasty(chatml("{{ ['', m.content, ''] | join('') }}"), EXACT),
    "join method": Nasty(chatml("{{ ''.join([m.content]) }}"), EXACT),
    "split and join": Nasty(chatml("{{ m.content.split(' ') | join(' ') }}"), EXACT),
    "split on a tag": Nasty(chatml("{{ m.content.split('</think>')[-1].lstrip('\n') }}"), EXACT),
    "slice of everything": Nasty(chatml("{{ m.content[0:] }}"), EXACT),
    "two slices": Nasty(chatml("{{ m.content[:3] }}{{ m.content[3:] }}"), EXACT),
    "trim": Nasty(chatml("{{ m.content | trim }}"), EXACT, "spaces around"),
    "replace that changes nothing": Nasty(chatml("{{ m.content | replace('<x>', '') }}"), EXACT),
    "string filter": Nasty(chatml("{{ m.content | string }}"), EXACT),
    "safe": Nasty(chatml("{{ m.content | safe }}"), EXACT),
    "default": Nasty(chatml("{{ m.content | default('', true) }}"), EXACT),
    "conditional expression": Nasty(chatml("{{ m.content if m.content is string else m.content[0].text }}"), EXACT),
    "namespace": Nasty(chatml("{% set ns.text = m.content %}{{ ns.text }}", before="{% set ns = namespace(text='') %}"), EXACT),
    "namespace across turns": Nasty(  # a user's text waits in a namespace until the answer's header
        "{% set ns = namespace(q='') %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = m.content %}{% else %}"
        "<|im_start|>user\n{{ ns.q }}<|im_end|>\n<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>user\n{{ ns.q }}<|im_end|>\n<|im_start|>assistant\n{% endif %}", EXACT),
    "filter block that keeps": Nasty(chatml("{% filter trim %}{{ m.content }}{% endfilter %}"), EITHER),
    "indent": Nasty(chatml("{{ m.content | indent(4) }}"), EITHER, "lines"),
    "character by character": Nasty(chatml("{% for c in m.content %}{{ c }}{% endfor %}"), EXACT),
    "recursive loop": Nasty(
        "{% for m in messages recursive %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT, EXACT),
    "for else": Nasty("{% for m in messages %}" + HEAD + "{{ m.content }}" + END + "{% else %}nothing{% endfor %}" + PROMPT, EXACT),
    "numbers and loops around": Nasty(chatml(head="<|im_start|>{{ m.role }} {{ loop.index }}\n", prompt=PROMPT.replace(
        "assistant\n", "assistant {{ messages | length + 1 }}\n")), EXACT),
    "loop.previtem": Nasty(chatml(head="{% if loop.previtem is defined and loop.previtem.role == 'user' %}<|sep|>{% endif %}" + HEAD,
                                  prompt="{% if add_generation_prompt %}<|sep|><|im_start|>assistant\n{% endif %}"), EXACT),
    "loop.nextitem": Nasty(  # the prompt follows other white space than the answers do
        chatml(end="{% if loop.nextitem is defined %}<|im_end|>{{ '\n' }}{% else %}<|im_end|>{% endif %}"), EITHER),
    "date": Nasty(chatml(before="<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"), EXACT),
    "dict through tojson": Nasty(chatml("{{ {'text': m.content} | tojson }}"), EITHER),  # the model would answer in JSON
    # ---- text is changed on its way
    "upper": Nasty(answers("{{ m.content | upper }}"), EITHER),
    "lower": Nasty(answers("{{ m.content | lower }}"), EITHER),
    "title": Nasty(answers("{{ m.content | title }}"), EITHER),
    "filter block that changes": Nasty(answers("{% filter upper %}{{ m.content }}{% endfilter %}"), EITHER),
    "escape": Nasty(answers("{{ m.content | e }}"), EITHER, "markup"),
    "replace that changes": Nasty(answers("{{ m.content | replace('is', 'was') }}"), EITHER),
    "reversed": Nasty(answers("{{ m.content | reverse }}"), REFUSED),  # nobody said that
    "cut": Nasty(answers("{{ m.content[:4] }}"), REFUSED),  # the turn says more than is trained
    "truncate": Nasty(answers("{{ m.content | truncate(20) }}"), REFUSED, "long"),
    "middle dropped": Nasty(answers("{{ m.content[:2] }}{{ m.content[-2:] }}"), REFUSED),
    "length only": Nasty(answers("{{ m.content | length }}"), REFUSED),
    "words counted": Nasty(answers("{{ m.content | wordcount }} words"), REFUSED),
    # ---- whose text is it
    "answer quotes the user": Nasty(answers("{{ messages[0].content }}: {{ m.content }}"), REFUSED),
    "answer joined with the user's": Nasty(answers("{{ [messages[loop.index0 - 1].content, m.content] | join(' ') }}"), REFUSED),
    "answer printed twice": Nasty(answers("{{ m.content }}{{ m.content }}"), EITHER),
    "what is undefined": Nasty(answers("{{ m.nothing }}{{ m.content ~ m.nope }}{{ 'x' if false }}"), EXACT),
    "answer repeated in the next header": Nasty(
        chatml(head="<|im_start|>{{ m.role }}{% if loop.previtem is defined %} after {{ loop.previtem.content }}{% endif %}{{ '\n' }}",
               prompt="{% if add_generation_prompt %}<|im_start|>assistant after {{ messages[-1].content }}\n{% endif %}"), EITHER),
    "next question before the answer's end": Nasty(
        answers("{{ m.content }}{% if loop.nextitem is defined %} {{ loop.nextitem.content }}{% endif %}"), REFUSED),
    "all texts at the end": Nasty(
        "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all ~ m.content %}{% endfor %}"
        "<|im_start|>assistant\n{{ ns.all }}<|im_end|>\n" + PROMPT, REFUSED),
    "reversed order": Nasty(  # an answer stands before its question, and other turns come between it and what it answers
        "{% for m in messages | reverse %}" + HEAD + "{{ m.content }}" + END + "{% endfor %}" + PROMPT, REFUSED),
    "every second message": Nasty(  # only the questions are left
        "{% for m in messages[::2] %}" + HEAD + "{{ m.content }}" + END + "{% endfor %}" + PROMPT, REFUSED),
    "only the last two": Nasty(  # the first answer is not in the text
        "{% for m in messages[-2:] %}" + HEAD + "{{ m.content }}" + END + "{% endfor %}" + PROMPT, REFUSED),
    "merges assistants": Nasty(  # one header, one end, both texts: it may be one turn, or be refused
        "{% for m in messages %}{% if not (loop.previtem is defined and loop.previtem.role == m.role) %}" + HEAD + "{% endif %}"
        "{{ m.content }}{% if not (loop.nextitem is defined and loop.nextitem.role == m.role) %}" + END + "{% endif %}{% endfor %}" + PROMPT,
        EITHER, "two assistants in a row"),
    # ---- headers and ends
    "always a generation prompt": Nasty(chatml(prompt="<|im_start|>assistant\n"), EITHER, "one turn"),
    "another generation prompt": Nasty(chatml(prompt=PROMPT.replace("assistant", "bot")), REFUSED),
    "no generation prompt": Nasty(chatml(prompt=""), EITHER),  # right only if the header is left out
    "the prompt opens thinking": Nasty(chatml(prompt=PROMPT.replace("assistant\n", "assistant\n<think>\n")), EITHER),
    "counter in the header that the prompt lacks": Nasty(chatml(head="<|im_start|>{{ m.role }} {{ loop.index }}\n"), REFUSED),
    "no end token": Nasty(chatml(end="\n"), REFUSED),
    "the end is text": Nasty(chatml(end="###\n"), REFUSED),
    "the end is the next header": Nasty(chatml(head="<|{{ m.role }}|>", end="", prompt="{% if add_generation_prompt %}<|assistant|>{% endif %}")
                                        + "{# <|user|> <|assistant|> #}", REFUSED),
    "the end token opens headers too": Nasty(  # <|eot|> ends the turn, and the next header begins with one more
        chatml(head="<|eot|>{{ m.role }}\n", end="<|eot|>", prompt="{% if add_generation_prompt %}<|eot|>assistant\n{% endif %}"), EITHER),
    "two end tokens": Nasty(chatml(end="<|eot|><|im_end|>\n"), EITHER),  # both must be trained
    "an end token after the last turn only": Nasty(  # a model would not learn to stop in the turns before
        chatml(end="{% if loop.last %}<|im_end|>{% endif %}{{ '\n' }}"), REFUSED),
    "another end after the last turn": Nasty(chatml(end="{% if loop.last %}<|return|>{% else %}<|im_end|>{% endif %}{{ '\n' }}"), EITHER),
    "one more end at the very end": Nasty(chatml() + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}", EXACT),
    "the end belongs to users only": Nasty(chatml(end="{% if m.role == 'user' %}<|im_end|>{% endif %}{{ '\n' }}"), REFUSED),
    "spaces before the end": Nasty(chatml("{{ m.content }} "), EXACT),  # the model must write that space
    # ---- generation markers
    "right markers": Nasty(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
        "{% else %}" + HEAD + "{{ m.content }}" + END + "{% endif %}{% endfor %}" + PROMPT, EXACT),
    "markers around the header": Nasty(  # they are wrong: the mask may be right without them
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}" + HEAD + "{{ m.content }}" + END + "{% endif %}{% endfor %}" + PROMPT, EITHER),
    "markers without the end token": Nasty(
        "{% for m in messages %}" + HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}" + END + "{% endfor %}" + PROMPT, EITHER),
    "markers around the user": Nasty(
        "{% for m in messages %}" + HEAD + "{% if m.role == 'user' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
        "{% else %}{{ m.content }}" + END + "{% endif %}{% endfor %}" + PROMPT, EITHER),
    # ---- tools
    "calls": Nasty(chatml("{{ m.content or '' }}" + CALLS), EXACT, TOOL_ANSWER),
    "calls with indented arguments": Nasty(
        chatml("{{ m.content or '' }}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson(indent=2) }}</tool_call>{% endfor %}"),
        EITHER, TOOL_ANSWER),
    "calls as pairs": Nasty(
        chatml("{{ m.content or '' }}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments | items %}"
               "\n{{ k }}={{ v }}{% endfor %}</tool_call>{% endfor %}"), EITHER, TOOL_ANSWER),
    "sorted arguments": Nasty(
        chatml("{{ m.content or '' }}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments | dictsort %}"
               "\n{{ k }}={{ v | tojson }}{% endfor %}</tool_call>{% endfor %}"), EITHER, TOOL_ANSWER),
    "calls before the text": Nasty(chatml(CALLS + "{{ m.content or '' }}"), EITHER, TOOL_TEXT),
    "drops calls": Nasty(chatml("{{ m.content or '' }}"), REFUSED, TOOL_ANSWER),
    "drops the second call": Nasty(chatml("{{ m.content or '' }}" + CALLS.replace("m.tool_calls", "(m.tool_calls or [])[:1]")), REFUSED, "parallel calls"),
    "drops arguments": Nasty(
        chatml("{{ m.content or '' }}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}"), REFUSED, TOOL_ANSWER),
    "drops text beside calls": Nasty(chatml("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}"), REFUSED, TOOL_TEXT),
    "text after the result": Nasty(  # the turn's words stand in the tool's message
        chatml("{% if m.tool_calls %}" + CALLS + "{% elif m.role == 'tool' %}{{ m.content }} {{ loop.previtem.content }}{% else %}{{ m.content }}{% endif %}"),
        REFUSED, TOOL_TEXT),
    "result inside the turn": Nasty(  # calls, result and answer are one message of the model: three parts, of which one is not its own
        "{% for m in messages %}{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
        "{% elif loop.previtem is defined and loop.previtem.role == 'tool' %}{{ m.content }}<|im_end|>\n"
        "{% else %}" + HEAD + "{{ m.content or '' }}" + CALLS + "{% if not m.tool_calls %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}" + PROMPT,
        REFUSED, TOOL_ANSWER),
    "name echoed in the next header": Nasty(
        chatml("{{ m.content or '' }}" + CALLS,
               head="<|im_start|>{{ m.role }}{% if m.role == 'tool' %} {{ loop.previtem.tool_calls[0].function.name }}{% endif %}{{ '\n' }}"),
        EXACT, TOOL_ANSWER),
    # ---- reasoning
    "drops earlier reasoning": Nasty(  # as Qwen3 does: what is trained of the first turn has no thought
        chatml("{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"),
        EITHER, "several reasoning fields"),
    "an empty thought before the last answer": Nasty(
        chatml("{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"), EITHER),
}  # fmt: skip
