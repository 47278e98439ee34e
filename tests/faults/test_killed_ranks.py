"""kill -9 of one rank, in the middle of a step and in every phase of a save: a restart ends with the same bytes."""

import signal

import pytest
from fault_runs import check_equal, saved_steps

from distllm.train.manifest import verify

pytestmark = pytest.mark.timeout(900)

LATE = {"at": "all_reduce", "do": "sleep", "seconds": 1.5}
MOMENTS = {
    "forward": [{"rank": 1, "at": "forward", "do": "kill"}],
    "backward": [{"rank": 0, "at": "backward", "do": "kill"}],
    "all_reduce": [{"rank": 1, "at": "all_reduce", "do": "kill"}, {"rank": 0, **LATE}],
    "optimizer": [{"rank": 0, "at": "optimizer", "do": "kill"}],
}


def test_f01_a_rank_killed_in_each_part_of_a_step(nursery, settings, oracle, tmp_path):
    """One run that meets all four, each after a restart of the one before."""
    run_dir = tmp_path / "run"
    for number, (moment, faults) in enumerate(MOMENTS.items()):
        step = 3 * number + 1
        victim = faults[0]["rank"]
        other = 1 - victim
        due = [{**f, "step": step} for f in faults]
        with nursery.start(run_dir, *settings, faults=due) as job:
            codes = job.end()
            assert codes[victim] == -signal.SIGKILL, (moment, job.text())
            assert codes[other] == 1, (moment, job.text())
            told = job.ranks[other].text
            # The optimizer exchanges nothing: the other rank has gone on to the save of this step.
            phase = "save" if moment == "optimizer" else "update"
            limit_s = {"update": 100, "save": 1800}[phase]
            expected = f"rank {other} lost another rank in phase {phase} of step {step} (limit {limit_s} s)"
            assert expected in told, (moment, told)
            assert "Traceback" not in told, (moment, told)
        assert max(saved_steps(run_dir), default=0) == (step - 1) // 2 * 2, moment
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [0, 0], job.text()
    check_equal(run_dir, oracle)


PHASES = [
    # what is killed at, which rank is hit, in the save of which step, and the newest checkpoint then
    ("mid_write", 1, 2, 0),
    ("mid_write", 0, 2, 0),
    ("before_manifest", 0, 4, 2),
    ("before_rename", 0, 6, 4),
    ("after_rename", 0, 8, 8),
    ("mid_delete", 0, 10, 10),
]


def test_f02_a_rank_killed_in_each_phase_of_a_save(nursery, settings, oracle, tmp_path):
    """One run that meets all of them; the same phases without ranks: tests/train/test_checkpoint_faults.py."""
    run_dir = tmp_path / "run"
    for phase, victim, step, newest in PHASES:
        fault = {"rank": victim, "at": f"save:{phase}", "step": step, "do": "kill"}
        with nursery.start(run_dir, *settings, faults=[fault]) as job:
            codes = job.end()
            assert codes[victim] == -signal.SIGKILL, (phase, job.text())
            assert codes[1 - victim] == 1, (phase, job.text())
        assert max(saved_steps(run_dir), default=0) == newest, phase
        for kept in saved_steps(run_dir):
            verify(run_dir / "checkpoints" / f"step_{kept:08d}")
        debris = [p.name for p in (run_dir / "checkpoints").glob(".*")]
        # Rank 0 tidies up when it outlives the other; when it dies itself, the next start does.
        assert bool(debris) == (victim == 0 and phase != "after_rename"), (phase, debris)
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [0, 0], job.text()
    check_equal(run_dir, oracle)
