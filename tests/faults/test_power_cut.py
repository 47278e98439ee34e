"""A power cut keeps what was fsynced and may lose the rest: every call of a run of two ranks, recorded and checked in order."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def calls(nursery, settings, tmp_path_factory):
    """Run two ranks; return (rank, call, path, path it was renamed to or None) in the order of the calls, and the run."""
    folder = tmp_path_factory.mktemp("power")
    run_dir, log = folder / "run", folder / "calls.jsonl"
    faults = [
        {"rank": r, "at": "record", "step": 0, "do": "record", "log": str(log)} for r in (0, 1)
    ]
    with nursery.start(run_dir, *settings, faults=faults) as job:
        assert job.end() == [0, 0], job.text()
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()], run_dir


def check_renames(calls, run_dir):
    """Whatever gets its name by a rename was durable before, and the name is durable before the same rank does the next."""
    synced, num_checked = set(), 0
    for index, (rank, call, path, to) in enumerate(calls):
        if call == "fsync":
            synced.add(path)
            continue
        target = Path(to)
        if not target.is_relative_to(run_dir) or target.suffix == ".trash":
            continue
        if target.name == "report.html":  # `distllm report` makes it again
            continue
        inside = set(json.loads(path)["files"])
        source = json.loads(path)["path"]
        missing = ({source} | inside) - synced
        assert not missing, f"{call} to {to}: not durable: {sorted(missing)}"
        after = next(c for c in calls[index + 1 :] if c[0] == rank)
        assert after[1:3] == ("fsync", str(target.parent)), f"after {call} to {to}: {after}"
        synced -= {source} | inside
        num_checked += 1
    return num_checked


def test_f04_everything_is_durable_before_it_gets_its_name(calls):
    found, run_dir = calls
    named = [Path(to).name for _, call, _, to in found if call != "fsync"]
    assert {f"step_{step:08d}" for step in range(2, 13, 2)} <= set(named)
    assert {"model", "result.json", "lineage.json", "config.yaml"} <= set(named)
    assert check_renames(found, run_dir) >= 10
    writers = {(r, Path(p).name) for r, call, p, _ in found if call == "fsync" and "-of-00002" in p}
    assert {r for r, _ in writers} == {0, 1}
    assert all(f"{r:05d}-of" in name for r, name in writers)


@pytest.mark.parametrize(
    "lost", ["manifest.json", "model-00001-of-00002.safetensors", ".step_00000004.tmp"]
)
def test_f04_a_missing_fsync_would_be_noticed(calls, lost):
    found, run_dir = calls
    kept = [c for c in found if not (c[1] == "fsync" and Path(c[2]).name == lost)]
    assert len(kept) < len(found)
    with pytest.raises(AssertionError, match="not durable"):
        check_renames(kept, run_dir)


def test_f04_an_old_checkpoint_is_deleted_only_after_the_new_one_is_durable(calls):
    found, run_dir = calls
    folder = str(run_dir / "checkpoints")
    deleted = [i for i, c in enumerate(found) if c[1] != "fsync" and c[3].endswith(".trash")]
    assert len(deleted) == 4  # of six checkpoints two are kept
    for index in deleted:
        renamed = max(
            i for i, c in enumerate(found[:index]) if c[1] == "rename" and "/step_" in c[3]
        )
        assert any(c[1:3] == ("fsync", folder) for c in found[renamed + 1 : index])
