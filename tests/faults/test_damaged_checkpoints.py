"""Damage in any file of a checkpoint of several ranks, both of two damaged, other world sizes, other configurations."""

import json
import logging
import shutil

import pytest
from fault_runs import (
    change_state,
    check_equal,
    logged_steps,
    state_of,
    stopped_at,
    write_dialogues,
)

from distllm.errors import CheckpointError
from distllm.train.checkpoint import Checkpoints
from distllm.train.manifest import verify

pytestmark = pytest.mark.timeout(900)


def flip(path, _):
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def halve(path, _):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path, _):
    path.write_bytes(b"")


def zero(path, _):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path, _):
    path.unlink()


def swap(path, others):
    """Exchange it with another file of the checkpoint."""
    other = next(p for p in others if p != path)
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGES = [flip, halve, empty, zero, delete, swap]


def test_f17_every_damage_to_every_file_is_named_and_passed_over(oracle, tmp_path, caplog):
    whole = oracle / "checkpoints"
    names = sorted(p.name for p in (whole / "step_00000008").iterdir())
    shards = [n for n in names if "-of-00002" in n]
    assert len(shards) == 4 and {"manifest.json", "state.json"} < set(
        names
    )  # model and rng, two ranks each
    for name in names:
        for damage in DAMAGES:
            folder = tmp_path / f"{name}-{damage.__name__}"
            for step in (6, 8):
                path = folder / f"step_{step:08d}"
                shutil.copytree(whole / path.name, path)
            damage(path / name, sorted(path.iterdir()))
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="distllm"):
                found = Checkpoints(folder).latest()
            assert found is not None and found.step == 6, (name, damage)
            told = [r.getMessage() for r in caplog.records]
            assert any(str(path) in t for t in told), (name, damage, told)
            if damage is not swap:
                assert any(str(path / name) in t for t in told), (name, damage, told)


def test_f17_ranks_go_on_from_the_one_before(nursery, settings, oracle, tmp_path):
    run_dir = stopped_at(oracle, tmp_path / "run", 6, 8)
    damaged = run_dir / "checkpoints/step_00000008/model-00001-of-00002.safetensors"
    flip(damaged, ())
    with nursery.start(run_dir, *settings, "train.checkpoint_fallback=false") as job:
        assert job.end() == [2, 2], job.text()
        told = job.ranks[0].text
    assert f"{damaged}: SHA-256 differs" in told and "checkpoint_fallback=true" in told, told
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [0, 0], job.text()
        told = job.ranks[0].text
    assert f"Damaged checkpoint passed over: {damaged}: SHA-256 differs" in told, told
    assert "Going on from step 6." in told
    check_equal(run_dir, oracle)


def test_f18_when_all_are_damaged_the_run_does_not_start_over(nursery, settings, oracle, tmp_path):
    run_dir = stopped_at(oracle, tmp_path / "run", 6, 8)
    kept = (run_dir / "metrics.jsonl").read_bytes()
    damaged = [
        run_dir / f"checkpoints/step_{step:08d}/model-0000{rank}-of-00002.safetensors"
        for step, rank in ((6, 0), (8, 1))
    ]
    halve(damaged[0], ())
    flip(damaged[1], ())
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [2, 2], job.text()
        told = job.ranks[0].text
    assert all(str(path) in told for path in damaged), told
    assert "Every checkpoint in" in told and "Traceback" not in job.text()
    assert (run_dir / "metrics.jsonl").read_bytes() == kept
    assert all(path.exists() for path in damaged)


@pytest.mark.slow
def test_f19_a_run_of_another_configuration_names_the_differences(
    nursery, settings, oracle, tmp_path
):
    run_dir = stopped_at(oracle, tmp_path / "run", 6)
    kept = (run_dir / "config.yaml").read_bytes()
    with nursery.start(run_dir, *settings, "arch.d_ff=48", "optim.lr=0.5") as job:
        assert job.end() == [2, 2], job.text()
    told = job.ranks[0].text
    assert "arch.d_ff: 32 there, 48 now" in told and "optim.lr: " in told and ", 0.5 now" in told
    assert (run_dir / "config.yaml").read_bytes() == kept


@pytest.mark.slow
def test_f19_a_checkpoint_of_a_newer_format_is_refused(oracle, tmp_path, monkeypatch):
    from distllm.train import checkpoint

    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    Checkpoints(tmp_path).save(3, {}, {"step": 3})
    with pytest.raises(CheckpointError, match="has format 99; this distllm reads up to"):
        Checkpoints(tmp_path).latest()


@pytest.mark.slow
def test_f19_data_that_changed_is_named_and_has_to_be_allowed(nursery, settings, tmp_path):
    run_dir, there = tmp_path / "run", tmp_path / "data"
    there.mkdir()
    own = [*settings, *write_dialogues(there)]
    with nursery.start(run_dir, *own, "train.max_steps=4") as job:
        assert job.end() == [0, 0], job.text()
    (run_dir / "result.json").unlink()
    was = state_of(run_dir, 4)["origin"]["data"]
    file = there / "train.jsonl"
    file.write_text(file.read_text().replace("Say 3:", "Say 3 :"))
    with nursery.start(run_dir, *own, "train.max_steps=6") as job:
        assert job.end() == [2, 2], job.text()
        told = job.ranks[0].text
    assert "step_00000004 rests on other data:" in told and f"  data: {was} there, " in told, told
    assert "train.allow_other_data=true" in told and logged_steps(run_dir) == [1, 2, 3, 4]
    with nursery.start(run_dir, *own, "train.max_steps=6", "train.allow_other_data=true") as job:
        assert job.end() == [0, 0], job.text()
        assert "goes on as allowed" in job.ranks[0].text
    assert logged_steps(run_dir) == [1, 2, 3, 4, 5, 6]
    assert state_of(run_dir, 6)["origin"]["data"] != was


@pytest.mark.slow
@pytest.mark.parametrize("how", ["other code", "older"])
def test_f19_a_checkpoint_of_other_code_goes_on_and_says_so(
    nursery, settings, oracle, tmp_path, how
):
    """An older one does not say yet what it rests on, or how often the run went back."""

    def change(state):
        if how == "older":
            del state["origin"], state["num_rollbacks"]
        else:
            state["origin"]["code"] = "0" * 64

    run_dir = stopped_at(oracle, tmp_path / "run", 6)
    change_state(run_dir, 6, change)
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [0, 0], job.text()
        assert ("was written by other code" in job.ranks[0].text) == (how == "other code")
    check_equal(run_dir, oracle)


def losses_of(run_dir):
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {m["step"]: m["train/loss"] for m in lines if "train/loss" in m}


@pytest.fixture(scope="module")
def exact(nursery, settings):
    """Two ranks without dropout, whose noise depends on the number of ranks."""
    run_dir = nursery.folder / "exact"
    with nursery.start(run_dir, *settings, "arch.dropout=0", "train.keep_last=12") as job:
        assert job.end() == [0, 0], job.text()
    return run_dir


@pytest.mark.parametrize("world", [1, 4])
def test_f20_another_number_of_ranks_goes_on_with_the_same_samples(
    nursery, settings, exact, tmp_path, world
):
    run_dir = stopped_at(exact, tmp_path / "run", 6)
    with nursery.start(run_dir, *settings, "arch.dropout=0", world=world) as job:
        assert job.end() == [0] * world, job.text()
    assert logged_steps(run_dir) == list(range(1, 13))
    assert losses_of(run_dir) == pytest.approx(losses_of(exact), rel=1e-6)
    assert state_of(run_dir, 12)["data_position"] == state_of(exact, 12)["data_position"]
    verify(run_dir / "checkpoints/step_00000012")


def test_f20_a_number_of_ranks_that_does_not_divide_the_batch_is_refused(
    nursery, settings, exact, tmp_path
):
    run_dir = stopped_at(exact, tmp_path / "run", 6)
    with nursery.start(run_dir, *settings, "arch.dropout=0", world=3) as job:
        assert job.end() == [2, 2, 2], job.text()
    assert "dp_size (3)" in job.ranks[0].text and "among 1, 2 or 4 processes" in job.ranks[0].text
