"""Every benchmark runs, at a size that measures nothing, and ends with its line of JSON."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distllm.testing.gloo import patient

FOLDER = Path(__file__).parents[2] / "benchmarks"
NEEDS = {"grpo_cpu": "trl", "sft_cpu": "trl", "ppo_cpu": "trl"}
SCRIPTS = sorted(
    p.stem for p in FOLDER.glob("*_[cg]pu.py") if 'add_argument("--quick"' in p.read_text("utf-8")
)


def test_the_scripts_are_found():
    assert {"grpo_cpu", "pretrain_cpu"} <= set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_quick_run_ends_with_its_headline(name):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=patient(600), check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    line = json.loads(run.stdout.splitlines()[-1])
    assert {"name", "ratio", "unit", "hardware", "versions"} <= line.keys()
    assert line["name"] == name
    if line["ratio"] is not None:
        assert line["ratio"] > 0 and line["runs"] >= 1
