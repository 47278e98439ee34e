"""The package as users get it: a wheel, installed elsewhere, started from an empty directory."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distllm.testing.gloo import patient

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip(
    "setuptools", minversion="77", reason="needed to build a wheel without a network"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build from a copy, so that the checkout gets no build directories."""
    copy, out = tmp_path_factory.mktemp("copy of checkout"), tmp_path_factory.mktemp("dist")
    for name in ("distllm", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    command = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
        str(copy),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=patient(200))
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Install it, alone, into a directory of its own."""
    site = tmp_path_factory.mktemp("site packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    command = [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=patient(200))
    return site


def run(installed: Path, folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=patient(200),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_every_data_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "distllm").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    wanted |= {f"distllm/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert wanted - held == set()
    top = {name.split("/")[0] for name in held}
    assert all(name == "distllm" or name.endswith(".dist-info") for name in top)


def test_it_runs_from_an_empty_directory(installed, tmp_path):
    where = (
        "import distllm, distllm.config.files as f; print(distllm.__file__); print(f.conf_dir())"
    )
    for line in run(installed, tmp_path, "-c", where).splitlines():
        assert line.startswith(str(installed))
    assert (installed / "bin/distllm").is_file()
    assert "llama_tiny" in run(installed, tmp_path, "-m", "distllm", "list", "arch")
    assert "3,997,696" in run(installed, tmp_path, "-m", "distllm", "plan")
    assert list(tmp_path.iterdir()) == []


def test_it_trains_from_an_empty_directory(installed, tmp_path):
    run(installed, tmp_path, "-m", "distllm", "train", "stage=sft", "data=skills", "data.num_train=64",
        "data.num_heldout=8", "train.num_eval_samples=8", "arch.d_model=16", "arch.n_layers=1",
        "arch.d_ff=16", "arch.vocab_size=512", "train.max_steps=2", "train.global_batch_size=4",
        "train.micro_batch_size=4", "train.seq_len=128", "generation.max_new_tokens=4", "run.dir=first")  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["first"]
    assert (tmp_path / "first/model/model.safetensors").is_file()
