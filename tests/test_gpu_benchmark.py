"""The GPU benchmark says so where there is no GPU, and its rows name presets that exist."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from distllm.config.files import options_in

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_nothing_is_measured(gpu, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 3
    lines = capsys.readouterr().out.splitlines()
    assert "nothing was measured" in lines[0]
    assert json.loads(lines[-1])["measured"] is False


def test_rows_are_presets(gpu):
    known = options_in("arch")
    assert {case.get("arch", row) for row, case in gpu.MODELS.items()} <= set(known)
    assert set(gpu.LEFT_OUT) <= set(known)
