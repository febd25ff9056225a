"""Real and nasty templates on every shape of conversation: a mask is exact, or the row is refused. Never wrong."""

from pathlib import Path

import pytest

from judge_templates import EXACT, REFUSED, TEMPLATE_REFUSES, judge_case, judge_template, table
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


PLAIN = (
    "one turn", "system", "two turns", "system and three turns", "the same answer twice", "quotes the user", "unicode",
    "spaces around", "emoji at the borders", "a role's name", "markup", "answers with chatml", "long",
)  # fmt: skip


@pytest.fixture(scope="module")
def cases(shared_data):
    paths = sorted((shared_data / "templates").glob("*.jinja"))
    return [case for path in paths for case in judge_template(path, list(SHAPES), None, probes=True)]


def test_no_mask_of_a_published_template_is_wrong(cases):
    assert [case for case in cases if case.verdict not in (EXACT, REFUSED, TEMPLATE_REFUSES)] == []
    assert len([case for case in cases if case.verdict != TEMPLATE_REFUSES]) > 600


def test_plain_chats_are_exact_for_every_published_template_that_takes_them(cases):
    plain = [case for case in cases if case.shape in PLAIN]
    assert [case for case in plain if case.verdict == REFUSED] == []
    assert len({case.template for case in plain if case.verdict == EXACT}) == 12  # Hermes' needs tools


def test_the_page_about_templates_is_true(cases):
    if not ChatTokenizer(tokenizer_for("{{ eos_token }}"))._drops_nulls:
        pytest.skip("this version of transformers hands nulls to templates, so that other cases render")
    page = Path(__file__).parents[1] / "docs" / "templates.md"
    assert page.read_text() == table(cases)
