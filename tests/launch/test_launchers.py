"""The scripts for the deepspeed and accelerate launchers, run for real on the CPU: the same curve as one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distllm.testing.gloo import free_port, patient
from distllm.testing.stages import TINY, run_tiny, write_text

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TRAINING = [
    "stage=pretrain",
    "data=file",
    "train.micro_batch_size=2",
    "train.max_steps=4",
    "train.log_every_steps=1",
    "hardware.device=cpu",
]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Return the settings, and the losses of one process."""
    folder = tmp_path_factory.mktemp("launchers")
    settings = [*TRAINING, f"data.path='{write_text(folder / 'text.txt')}'"]
    run_tiny(folder / "single", settings)
    return settings, losses(folder / "single")


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [m["train/loss"] for m in lines if "train/loss" in m]


def launch(command, settings, folder, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [*command, *TINY, *settings, f"run.dir={folder}"],
        env={
            **clean,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(folder.parent / "no default file here"),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patient(800),
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_on_two_processes(single, tmp_path, stage):
    pytest.importorskip("deepspeed")
    settings, expected = single
    engine = ["engine=deepspeed", f"engine.zero_stage={stage}"]
    done = launch(
        ["launch/deepspeed.sh"],
        [*settings, *engine],
        tmp_path / "run",
        NPROC_PER_NODE="2",
        MASTER_PORT=str(free_port()),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert len(list((tmp_path / "run" / "logs").iterdir())) == 2


def test_accelerate_on_one_process(single, tmp_path):
    settings, expected = single
    done = launch(["launch/accelerate.sh"], [*settings, "engine=accelerate"], tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-6)


def test_accelerate_asked_for_two_processes_on_a_cpu(single, tmp_path):
    """`accelerate launch` itself starts one and says nothing; its file is found through its command line."""
    file = ROOT / "tests" / "engines" / "accelerate_cpu.yaml"
    command = ["accelerate", "launch", "--config_file", str(file), "-m", "distllm", "train"]
    done = launch(command, [*single[0], "engine=accelerate"], tmp_path / "run")
    assert done.returncode != 0
    message = f"{file} says num_processes: 2, and there are 1 processes (WORLD_SIZE)"
    assert message in done.stderr + done.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_accelerate_under_torchrun_on_two_processes(single, tmp_path):
    settings, expected = single
    file = ROOT / "tests" / "engines" / "accelerate_cpu.yaml"
    done = launch(
        ["launch/torchrun.sh"],
        [*settings, "engine=accelerate", f"engine.config='{file}'"],
        tmp_path / "run",
        NPROC_PER_NODE="2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
