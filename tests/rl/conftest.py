"""One start of two processes, shared by all tests that look at what they did."""

from pathlib import Path

import pytest

from distllm.testing.gloo import run_on


@pytest.fixture(scope="session")
def on_two_ranks():
    """Return what `rl_on_ranks.everything` found on each of two processes."""
    here = Path(__file__).parent
    return run_on(2, "rl_on_ranks:everything", path=[here, here.parent])
