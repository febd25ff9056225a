"""As test_docs.py, for the pages about jobs, and for those who come from another system."""

import pytest

from test_docs import ROOT, home, page_ids, run_page

__all__ = ["home"]


@pytest.mark.parametrize("page", page_ids(jobs=True))
def test_every_command_of_a_page_does_what_is_written(page, home, tmp_path):
    run_page(ROOT / page, home, tmp_path)
