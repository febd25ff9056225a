"""Real and nasty templates on every shape of conversation: a mask is exact, or the row is refused. Never wrong."""

import pytest

from judge_templates import EXACT, REFUSED, TEMPLATE_REFUSES, judge_case, judge_template
from nasty_templates import EITHER, NASTY
from posttrain.data.chat import ChatTokenizer
from shapes import SHAPES
from templated import tokenizer_for


@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_template_is_masked_exactly_or_refused(name):
    template, expected, shape = NASTY[name]
    tokenizer = tokenizer_for(template)
    case = judge_case(name, shape, SHAPES[shape], tokenizer, ChatTokenizer(tokenizer_for(template)))
    assert case.verdict in ((EXACT, REFUSED) if expected == EITHER else (expected,)), case


def test_no_mask_of_a_published_template_is_wrong(shared_data):
    paths = sorted((shared_data / "templates").glob("*.jinja"))
    cases = [case for path in paths for case in judge_template(path, list(SHAPES), None, probes=True)]
    assert [case for case in cases if case.verdict not in (EXACT, REFUSED, TEMPLATE_REFUSES)] == []
    rendered = [case for case in cases if case.verdict != TEMPLATE_REFUSES]
    assert len(paths) >= 13 and len(rendered) > 600
