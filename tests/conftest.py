"""What several test files need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA_BESIDE_THE_REPOSITORY = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real, published data; what it holds is written in its README.md."""
    folder = Path(os.environ.get("POSTTRAIN_TEST_DATA") or DATA_BESIDE_THE_REPOSITORY)
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder: {folder} is absent, and POSTTRAIN_TEST_DATA names no other")
    return folder
