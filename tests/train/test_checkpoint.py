"""Checkpoints: what is written, that every damage is found, what is kept. Kills and full disks: next file."""

import ast
import json
import logging
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distllm.errors import CheckpointError, ConfigError
from distllm.train import checkpoint
from distllm.train.checkpoint import Checkpoints
from distllm.train.manifest import FORMAT, sealed, verify
from distllm.train.rng import rng_state, seed_all

ROOT = Path(checkpoint.__file__).parents[2]


def tiny(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that are a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(3, 5, generator=generator), "n": torch.tensor(step)},
        "optim": {"m": torch.randn(4, generator=generator, dtype=torch.float64)},
    }


def save(folder: Path, *steps: int, keep_last: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_last)
    for step in steps:
        checkpoints.save(step, tiny(step), {"step": step, "loss": 0.1 * step})
    return checkpoints


def assert_holds(found: checkpoint.Loaded | None, step: int) -> None:
    assert found is not None
    assert found.step == step
    assert found.state == {"step": step, "loss": 0.1 * step}
    for stem, tensors in tiny(step).items():
        loaded = found.tensors(stem)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read the format by its specification: header length, JSON header, raw little-endian data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    kinds = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1", "BF16": "<u2"}
    arrays = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        start, end = entry["data_offsets"]
        data = raw[8 + length + start : 8 + length + end]
        arrays[name] = np.frombuffer(data, kinds[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def test_another_reader_agrees(tmp_path):
    path = save(tmp_path, 7)._paths()[0]
    assert path == tmp_path / "step_00000007"
    for stem, tensors in tiny(7).items():
        arrays = read_safetensors(path / f"{stem}.safetensors")
        assert arrays.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(arrays[name], tensor.numpy())
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["world"] == {"world_size": 1}
    assert sorted([*manifest["files"], "manifest.json"]) == sorted(os.listdir(path))
    sums = subprocess.run(
        ["sha256sum", *manifest["files"]], cwd=path, capture_output=True, text=True, check=True
    )
    for line in sums.stdout.splitlines():
        digest, name = line.split()
        assert manifest["files"][name] == {
            "bytes": (path / name).stat().st_size,
            "sha256": digest,
        }


def test_state_comes_back_exactly(tmp_path):
    state = {
        "data_position": {"hash": "é\n", "position": 2**60 + 1},
        "kl_coef": 0.1 + 0.2,
        "best": float("inf"),
        "none": None,
        "list": [1, 1.0, True, {"a": []}],
    }
    Checkpoints(tmp_path).save(1, {}, state)
    found = Checkpoints(tmp_path).latest()
    assert found is not None and found.stems == []
    assert repr([found.state[key] for key in state]) == repr(list(state.values()))
    assert found.manifest["data_position"] == {"hash": "é\n", "position": 2**60 + 1}


@pytest.mark.parametrize(
    ("state", "where"),
    [({"a": {1: 2}}, "state.a"), ({"a": [0, (1, 2)]}, r"state.a\[1\]"), ({"a": Path()}, "state.a")],
)
def test_what_json_would_change_is_refused(tmp_path, state, where):
    with pytest.raises(TypeError, match=where):
        Checkpoints(tmp_path).save(1, {}, state)
    assert list(tmp_path.iterdir()) == []


def test_views_shared_and_odd_tensors(tmp_path):
    base = torch.arange(1_000_000, dtype=torch.float32)
    weight = torch.randn(4, 6, requires_grad=True)
    tensors = {
        "head": base[:3],
        "again": base[:3],
        "tail": base[5:7],
        "transposed": weight.t(),
        "strided": weight.detach()[::2, ::3],
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "void": torch.empty(0),
        "half": torch.randn(3).bfloat16(),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    path = Checkpoints(tmp_path).save(1, {"odd": tensors}, {})
    assert (path / "odd.safetensors").stat().st_size < 2000
    loaded = Checkpoints(tmp_path).latest().tensors("odd")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(
            loaded[name].contiguous().flatten().view(torch.uint8),
            tensor.detach().contiguous().flatten().view(torch.uint8),
        ), name


@pytest.mark.parametrize("stem", ["", "../model", "a/b", ".hidden"])
def test_stem_must_be_a_file_name(tmp_path, stem):
    with pytest.raises(ValueError, match="stem"):
        Checkpoints(tmp_path).save(1, {stem: {}}, {})
    assert list(tmp_path.iterdir()) == []


def test_unknown_stem_names_the_known_ones(tmp_path):
    found = save(tmp_path, 1).latest()
    with pytest.raises(CheckpointError, match=r"value.*model, optim"):
        found.tensors("value")


SAVE_ONCE = """
import sys, torch
from distllm.train.checkpoint import Checkpoints
from distllm.train.rng import rng_state, seed_all
seed_all(3)
torch.rand(5), torch.randn(3)
names = {f"w{i}" for i in range(20)}  # iterated in an order that depends on the hash seed
tensors = {n: torch.full((3,), float(n[1:])) for n in names}
state = {n: 1 for n in names}
Checkpoints(sys.argv[1]).save(4, {n: tensors for n in ("b", "a")} | {"rng": rng_state()}, state)
"""


def test_equal_runs_write_equal_bytes(tmp_path):
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", SAVE_ONCE, str(tmp_path / seed)], env=env, check=True)
    first, second = tree(tmp_path / "1"), tree(tmp_path / "2")
    assert len(first) == 5
    assert first == second


def damages(file: Path):
    """Inflict every single flipped bit and every truncation on a file in turn; say which."""
    raw = file.read_bytes()
    with open(file, "r+b", buffering=0) as handle:
        for position, byte in enumerate(raw):
            for bit in range(8):
                os.pwrite(handle.fileno(), bytes([byte ^ 1 << bit]), position)
                yield f"bit {bit} of byte {position}"
            os.pwrite(handle.fileno(), bytes([byte]), position)
        os.pwrite(handle.fileno(), b"\n", len(raw))
        yield "one byte more"
        for length in reversed(range(len(raw))):
            os.truncate(handle.fileno(), length)
            yield f"cut to {length}"
    file.write_bytes(bytes(len(raw)))
    yield "zeroed"
    file.write_bytes(raw)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_every_flip_and_truncation_is_found(tmp_path, name):
    path = save(tmp_path, 3)._paths()[0]
    file = path / name
    size = file.stat().st_size
    tried = 0
    for what in damages(file):
        try:
            verify(path)
        except CheckpointError as error:
            assert str(file) in str(error), what
        else:
            pytest.fail(f"{name}: {what} was not noticed")
        tried += 1
    assert tried == size * 9 + 2
    assert verify(path)["step"] == 3


@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "model.safetensors", "optim.safetensors"]
)
@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "link"])
def test_falls_back_and_says_why(tmp_path, caplog, name, how):
    checkpoints = save(tmp_path, 1, 2)
    file = tmp_path / "step_00000002" / name
    raw = bytearray(file.read_bytes())
    file.unlink()
    if how == "flip":
        raw[len(raw) // 2] ^= 16
        file.write_bytes(raw)
    elif how == "truncate":
        file.write_bytes(raw[:-1])
    elif how == "link":
        (tmp_path / "elsewhere").write_bytes(raw)
        file.symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, "distllm"):
        assert_holds(checkpoints.latest(), 1)
    warned = [r.getMessage() for r in caplog.records if str(file) in r.getMessage()]
    assert len(warned) == 1
    reason = {"delete": "No such file", "link": "not a "}.get(how, "SHA-256|bytes")
    assert any(part in warned[0] for part in reason.split("|"))


def test_swapped_files_and_renamed_folders_are_found(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"a": {"w": torch.zeros(4)}, "b": {"w": torch.ones(4)}}, {})
    a, b = path / "a.safetensors", path / "b.safetensors"
    assert a.stat().st_size == b.stat().st_size
    a.rename(tmp_path / "x"), b.rename(a), (tmp_path / "x").rename(b)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: SHA-256"):
        verify(path)
    path = checkpoints.save(1, {"a": {"w": torch.zeros(4)}}, {})
    path.rename(tmp_path / "step_00000009")
    with pytest.raises(CheckpointError, match="belongs to step 1"):
        verify(tmp_path / "step_00000009")


def test_all_damaged_lists_what_was_tried(tmp_path):
    checkpoints = save(tmp_path, 1, 2)
    (tmp_path / "step_00000001" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.latest()
    message = str(caught.value)
    assert str(tmp_path / "step_00000001" / "model.safetensors") in message
    assert str(tmp_path / "step_00000002" / "manifest.json") in message
    assert "has 0 bytes, " in message and "run.dir" in message


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert Checkpoints(tmp_path / "absent").latest() is None
    Checkpoints(tmp_path / "absent").clean()
    assert not (tmp_path / "absent").exists()


def test_newer_format_is_refused_rather_than_passed_over(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", FORMAT + 1)
    save(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 2; this distllm reads up to 1"):
        Checkpoints(tmp_path).latest()


def test_a_manifest_cannot_point_outside(tmp_path):
    path = save(tmp_path / "c", 1)._paths()[0]
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((path / "model.safetensors").read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["../../secret.safetensors"] = manifest["files"]["model.safetensors"]
    (path / "manifest.json").write_bytes(sealed(manifest))
    with pytest.raises(CheckpointError, match="not a plain file"):
        verify(path)


def test_keeps_the_last_and_drops_abandoned_later_ones(tmp_path):
    checkpoints = save(tmp_path, 1, 5, 10, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000005", "step_00000010"]
    (tmp_path / "step_00000010" / "state.json").write_bytes(b"{}")
    assert_holds(checkpoints.latest(), 5)
    checkpoints.save(7, tiny(7), {"step": 7, "loss": 0.1 * 7})
    assert sorted(os.listdir(tmp_path)) == ["step_00000005", "step_00000007"]
    assert_holds(checkpoints.latest(), 7)
    with pytest.raises(ConfigError, match="keep_last=0"):
        Checkpoints(tmp_path, 0)


def test_order_is_by_number(tmp_path):
    checkpoints = save(tmp_path, 99_999_999, 100_000_000)
    assert_holds(checkpoints.latest(), 100_000_000)


def test_saving_the_same_again_changes_nothing(tmp_path):
    checkpoints = save(tmp_path, 4)
    file = tmp_path / "step_00000004" / "model.safetensors"
    before = (file.stat().st_ino, tree(tmp_path))
    save(tmp_path, 4)
    assert (file.stat().st_ino, tree(tmp_path)) == before
    checkpoints.save(4, tiny(40), {})
    found = checkpoints.latest()
    assert found.state == {}
    assert torch.equal(found.tensors("model")["w"], tiny(40)["model"]["w"])
    assert os.listdir(tmp_path) == ["step_00000004"]


def test_saving_repairs_a_damaged_one(tmp_path):
    checkpoints = save(tmp_path, 4)
    good = tree(tmp_path)
    file = tmp_path / "step_00000004" / "model.safetensors"
    file.write_bytes(file.read_bytes()[::-1])
    save(tmp_path, 4)
    assert tree(tmp_path) == good
    assert_holds(checkpoints.latest(), 4)


def test_clean_removes_our_debris_only(tmp_path):
    checkpoints = save(tmp_path, 1, 2)
    kept = {"notes.txt", "step_1", ".hidden", "best"}
    for name in [".step_00000003.tmp", ".step_00000001.trash", ".step_00000002.old", "best"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    for name in kept - {"best"}:
        (tmp_path / name).write_text("mine")
    checkpoints.clean()
    assert set(os.listdir(tmp_path)) == kept | {"step_00000001", "step_00000002"}
    assert_holds(checkpoints.latest(), 2)


def test_random_state_travels(tmp_path):
    seed_all(11)
    random.gauss(0, 1), np.random.normal(), torch.randn(7)
    Checkpoints(tmp_path).save(1, {"rng": rng_state()}, {})
    loaded = Checkpoints(tmp_path).latest().tensors("rng")
    assert all(torch.equal(loaded[k], v) for k, v in rng_state().items())


def test_no_pickle_in_the_source():
    for file in (ROOT / "distllm" / "train").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            assert not {n.partition(".")[0] for n in names} & {"pickle", "dill", "joblib"}, file
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.load",
                "torch.save",
            ):
                pytest.fail(f"{file}:{node.lineno} uses {ast.unparse(node)}")
