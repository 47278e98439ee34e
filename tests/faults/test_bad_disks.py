"""Full disks, failing writes and power cuts under a run of two ranks. Without ranks: tests/train/test_checkpoint_faults.py."""

import errno
import os
import shutil
import subprocess

import pytest
from fault_runs import check_equal, check_tidy, logged_steps, saved_steps, stopped_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def disk(tmp_path):
    """A real disk of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk, left_bytes):
    """Leave so many bytes free."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(0, free - left_bytes)))


def test_f15_a_full_disk_is_told_with_path_and_bytes(nursery, settings, oracle, disk):
    run_dir = stopped_at(oracle, disk / "run", 6)
    fill(disk, 150_000)  # enough for metrics, too little for a checkpoint of 400 KB
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [2, 2], job.text()
        told = job.ranks[0].text
    assert f"No room for checkpoint {run_dir}/checkpoints/step_00000008: it needs " in told, told
    assert " bytes and the disk has " in told and "Traceback" not in job.text()
    assert saved_steps(run_dir) == [6]
    check_tidy(run_dir)
    (disk / "filler").unlink()
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [0, 0], job.text()
    check_equal(run_dir, oracle)


def test_f15_a_disk_without_a_byte_left_for_the_log(nursery, settings, oracle, disk):
    run_dir = stopped_at(oracle, disk / "run", 6)
    fill(disk, 0)
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [2, 2], job.text()
    assert "No space left on device" in job.ranks[0].text, job.text()
    assert "Traceback" not in job.text()
    assert saved_steps(run_dir) == [6]
    check_tidy(run_dir)
    (disk / "filler").unlink()
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [0, 0], job.text()
    check_equal(run_dir, oracle)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("name", ["EIO", "EDQUOT", "EROFS"])
def test_f16_a_write_that_fails_on_one_rank_ends_all(
    nursery, settings, oracle, tmp_path, rank, call, name
):
    run_dir = tmp_path / "run"
    number = getattr(errno, name)
    fault = {"rank": rank, "at": f"call:{call}", "step": 4, "errno": number}
    with nursery.start(run_dir, *settings, faults=[fault]) as job:
        assert job.end() == [2, 2], job.text()
    told = job.ranks[rank].text
    assert f"step_00000004: {os.strerror(number)} (it needs " in told, told
    assert "Traceback" not in job.text()
    assert saved_steps(run_dir) == [2]
    check_tidy(run_dir)


def test_f16_a_save_in_the_background_that_fails_stops_the_next_step(nursery, settings, tmp_path):
    run_dir = tmp_path / "run"
    more = ["train.async_save=true", "train.max_steps=100000"]
    fault = {"rank": 1, "at": "call:fsync", "step": 4, "errno": errno.EIO}
    with nursery.start(run_dir, *settings, *more, faults=[fault]) as job:
        assert job.end() == [2, 2], job.text()
    assert "step_00000004: Input/output error" in job.text()
    assert max(logged_steps(run_dir)) <= 6
    assert saved_steps(run_dir) == [2]
    check_tidy(run_dir)


def test_f16_a_directory_that_may_not_be_written(nursery, settings, oracle, tmp_path, disk):
    """Read-only as a whole: permissions would not stop the root of a container."""
    run_dir = stopped_at(oracle, disk / "run", 6)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [2, 2], job.text()
    assert f"run.dir={run_dir} cannot be written: Read-only file system" in job.ranks[0].text
    assert "Traceback" not in job.text()
    shutil.copytree(run_dir, tmp_path / "run")
    with nursery.start(tmp_path / "run", *settings) as job:
        assert job.end() == [0, 0], job.text()
    check_equal(tmp_path / "run", oracle)
