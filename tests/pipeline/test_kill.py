"""kill -9 at any moment costs time and nothing else: same weights, same metrics as an undisturbed run."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from distllm.testing.gloo import patient
from distllm.testing.stages import TINY, timeless_metrics, weights_hash

SMOKE = [
    "pipeline=smoke",
    "arch.d_model=32",
    "arch.n_layers=2",
    "arch.d_ff=64",
    "hardware.threads=1",
    "train.precision=fp32",
]
TRAINED = ["pretrain", "sft", "reward", "ppo", "grpo"]


def start(verb, settings, folder, **environment):
    """Start the program in a process group of its own."""
    command = [sys.executable, "-m", "distllm", verb, *settings, f"run.dir={folder}"]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout_s=280):
    """Wait for a process that must succeed."""
    output, _ = process.communicate(timeout=patient(timeout_s))
    assert process.returncode == 0, output[-3000:]


def kill_when(process, condition, timeout_s=120):
    """Kill the whole group as soon as `condition` holds; fail if the process ends before."""
    deadline = time.monotonic() + patient(timeout_s)
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def has_step(folder, step):
    """True once metrics.jsonl of `folder` has a line of a training step at least `step`."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return False
    lines = path.read_text().splitlines()
    for line in lines:
        try:
            if json.loads(line)["step"] >= step:
                return True
        except ValueError:
            pass  # a line being written
    return False


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["mid_write", "before_rename", "after_rename"])
def test_a_kill_inside_a_checkpoint_write_changes_nothing(tmp_path, parent, phase):
    settings = [
        *TINY,
        "stage=sft",
        "data=skills",
        "data.tasks=[copy_words]",
        "data.num_train=32",
        "data.num_heldout=8",
        "generation.max_new_tokens=4",
        f"model={parent}",
        "train.max_steps=6",
        "train.save_every_steps=2",
        "train.log_every_steps=1",
        "arch.dropout=0.1",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start("train", settings, whole))
    killed = start("train", settings, parts, DISTLLM_TEST_FAULT=f"checkpoint:{phase}")
    killed.communicate(timeout=patient(120))
    assert killed.returncode == -signal.SIGKILL
    finish(start("train", settings, parts))
    assert weights_hash(whole) == weights_hash(parts)
    assert timeless_metrics(whole) == timeless_metrics(parts)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(
    ("settings", "step"),
    [
        pytest.param(SMOKE, 4, id="smoke"),
        pytest.param(["pipeline=demo", "hardware.threads=1"], 15, id="demo"),
    ],
)
def test_a_pipeline_killed_in_every_stage_ends_like_an_undisturbed_one(tmp_path, settings, step):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start("pipeline", settings, whole), timeout_s=3600)

    def killed_when(condition):
        process = start("pipeline", settings, parts)
        kill_when(process, condition, timeout_s=1800)
        assert not (parts / "pipeline.json").exists()

    killed_when(lambda: list(parts.glob("*/checkpoints/.*.tmp")))  # inside a write
    for stage in TRAINED:
        killed_when(lambda stage=stage: has_step(parts / stage, step))
        if stage != "grpo":  # and between this stage and the next
            killed_when(lambda stage=stage: (parts / stage / "result.json").exists())
    process = start("pipeline", settings, parts)  # and after the last
    kill_when(process, lambda: (parts / "grpo" / "result.json").exists(), timeout_s=1800)
    finish(start("pipeline", settings, parts), timeout_s=3600)
    for stage in TRAINED:
        assert weights_hash(whole / stage) == weights_hash(parts / stage), stage
        assert timeless_metrics(whole / stage) == timeless_metrics(parts / stage), stage
    tables = [(r / "pipeline.json").read_text() for r in (whole, parts)]
    tables = [json.loads(re.sub(r"\b\d+ s\b", "TIME", text))["table"] for text in tables]
    assert tables[0] == tables[1]
