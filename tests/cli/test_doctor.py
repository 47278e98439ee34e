"""`distllm doctor`: sound machines pass, and what is wrong is named with its cure."""

import json

import pytest
import torch

from distllm import registry
from distllm.cli import checkup, doctor
from distllm.cli.main import main
from distllm.engines.probe import try_collective


def examine(capsys, *arguments):
    """Return exit code and findings."""
    code = main(["doctor", "format=json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_a_sound_machine_passes(capsys, monkeypatch):
    monkeypatch.setattr(checkup, "IMPORTED", {"rich": "rich"})  # the others take seconds each
    code, found = examine(capsys)
    assert code == 0 and found["healthy"] and found["problems"] == []
    assert found["collectives"]["gloo, 2 processes"].endswith("included")
    engines = {f"engine={name}" for name in registry.names("engine")}
    assert engines <= set(found["runs"])
    assert found["runs"]["engine=ddp"].startswith("yes")
    assert found["machine"]["gloo"] == "built in"


def test_every_finding_is_shown(capsys):
    found = doctor.examine(is_trying=False)
    assert main(["doctor", "try=false"]) == 0
    shown = capsys.readouterr().out
    for table in (found["versions"], found["runs"]):
        for label in table:
            assert label in shown
    for line in found["advice"]:
        assert line in shown
    assert "gloo, 2 processes" not in shown  # it was told not to try


def test_processes_that_cannot_talk(capsys, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    monkeypatch.setattr(checkup, "IMPORTED", {})
    code, found = examine(capsys)
    assert code == 1 and not found["healthy"]
    assert "nosuch0" in found["problems"][0]
    assert any("GLOO_SOCKET_IFNAME=lo" in line for line in found["advice"])
    assert found["runs"]["engine=ddp"].startswith("no") and found["runs"]["engine=single"].startswith("yes")  # fmt: skip


def test_processes_that_do_not_answer():
    works, text = try_collective("gloo", timeout_s=0.2)
    assert not works and text == "no answer within 0.2 s"


def test_old_and_missing_packages(capsys, monkeypatch):
    needs = ["torch>=99.0", "numpy>=2.0", "no-such-package>=1", "vllm>=1; extra == 'vllm'"]
    monkeypatch.setattr(checkup, "_requirements", lambda: needs)
    code, found = examine(capsys, "try=false")
    assert code == 1 and len(found["problems"]) == 2
    assert f"torch {torch.__version__} does not fit" in found["problems"][0]
    assert 'pip install "torch>=99.0"' in found["problems"][0]
    assert found["problems"][1].startswith("no-such-package is missing")


def test_a_package_built_for_another_torch(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    info = tmp_path / "flash_attn-2.8.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(checkup, "IMPORTED", {"flash-attn": "flash_attn"})
    monkeypatch.setattr(checkup, "collectives", dict)
    found = doctor.examine()
    assert found["versions"]["flash-attn"] == "2.8.3"
    assert any("undefined symbol: _ZN3c10" in line for line in found["advice"])
    assert found["runs"]["flash-attn"].startswith("no")


@pytest.mark.parametrize(
    ("driver", "built", "said"),
    [
        ("12.4", "13.0", "torch is built for CUDA 13.0 and the driver runs 12.4 at most"),
        ("13.0", "13.0", "sees no GPU: check the driver"),
        ("13.0", None, "torch is a build for CPUs: install one for CUDA"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines whose torch sees no GPU")
def test_driver_and_torch_that_do_not_fit(tmp_path, monkeypatch, driver, built, said):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '| Driver Version: 550.1   CUDA Version: {driver}     |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.version, "cuda", built)
    assert any(said in line for line in doctor.examine(is_trying=False)["advice"])


@pytest.mark.gpu
def test_gpus_are_described():
    found = doctor.examine()
    assert found["healthy"]
    for gpu in found["gpus"]:
        assert gpu["bf16"] == torch.cuda.is_bf16_supported(including_emulation=False)
        assert gpu["memory_gib"] > 1
