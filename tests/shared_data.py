"""Real data sets kept beside the project; tests that need one skip where it is missing."""

import os
from pathlib import Path

import pytest

ROOT = Path(
    os.environ.get("DISTLLM_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
).resolve()


def shared(*names: str) -> Path:
    """Return a file of the shared data, or skip the test that asked for it."""
    path = ROOT.joinpath(*names)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path
