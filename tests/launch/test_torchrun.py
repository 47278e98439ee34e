"""launch/torchrun.sh with real processes: a signal saves once and gives 3, kills cost time and nothing else.

Under ddp; the same and more under fsdp is in tests/faults/.
"""

import signal

import pytest
from launched import SFT, Job, are_gone, kill, losses
from safetensors.torch import load_file

from distllm.testing.stages import run_tiny

NUM_STEPS = 40
SETTINGS = [
    *SFT,
    f"train.max_steps={NUM_STEPS}",
    "train.save_every_steps=5",
    "train.keep_last=3",
    "train.micro_batch_size=4",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same run on one process, without a launcher."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_tiny(folder, SETTINGS)
    return folder


def check_curve(run_dir, undisturbed, num_steps):
    """Each step up to the last was logged once, with the loss of the undisturbed run."""
    ours, theirs = losses(run_dir), losses(undisturbed)
    assert sorted(ours) == list(range(1, num_steps + 1))
    assert ours == pytest.approx({k: v for k, v in theirs.items() if k <= num_steps}, rel=1e-5)


def check_weights(run_dir, undisturbed):
    """The weights are those of the undisturbed run."""
    weights, expected = (load_file(r / "model/model.safetensors") for r in (run_dir, undisturbed))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert (weights[name] - weight).abs().max() < 1e-4, name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_rank_is_replaced_and_a_signal_saves_once(tmp_path, undisturbed):
    """kill -9, a restart by torchrun itself, SIGUSR1: one start of the script sees it all."""
    run_dir = tmp_path / "a run"
    with Job("torchrun.sh", run_dir, *SETTINGS, "engine=ddp", NPROC_PER_NODE="2") as job:
        job.wait_for_step(7)
        victim = job.worker(1)
        kill(victim)
        job.wait_for_step(max(losses(run_dir)) + 2)
        assert f"rank 1: the process (pid {victim.pid}) " in job.text()
        below = job.below()
        job.process.send_signal(signal.SIGUSR1)
        assert job.end() == 3, job.text()[-4000:]
        assert are_gone(below)
        stopped_at = max(losses(run_dir))
        assert 9 <= stopped_at < NUM_STEPS
        assert (run_dir / f"checkpoints/step_{stopped_at:08d}").is_dir()
    check_curve(run_dir, undisturbed, stopped_at)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_signal_then_a_killed_rank_then_a_normal_end(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    with Job("torchrun.sh", run_dir, *SETTINGS, "engine=ddp", NPROC_PER_NODE="2") as job:
        job.wait_for_step(3)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 3, job.text()[-4000:]
        stopped_at = max(losses(run_dir))
    with Job("torchrun.sh", run_dir, *SETTINGS, "engine=ddp", NPROC_PER_NODE="2") as job:
        job.wait_for_step(stopped_at + 7)
        kill(job.worker(0))
        assert job.end() == 0, job.text()[-4000:]
    check_curve(run_dir, undisturbed, NUM_STEPS)
    check_weights(run_dir, undisturbed)


@pytest.mark.slow
def test_without_restarts_a_killed_rank_is_the_last_thing_read(tmp_path):
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, "engine=ddp", "train.max_steps=100000"]
    with Job("torchrun.sh", run_dir, *settings, NPROC_PER_NODE="2", MAX_RESTARTS="0") as job:
        job.wait_for_step(3)
        below, victim = job.below(), job.worker(1)
        kill(victim)
        assert job.end() == 1, job.text()[-4000:]
        last = job.text().splitlines()[-1]
        assert last.startswith("distllm: rank 1 failed first: ") and "kill -9" in last
        assert are_gone(below)
        assert not (run_dir / "stopped.json").exists()


@pytest.mark.slow
def test_killing_the_launcher_leaves_no_orphan(tmp_path):
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, "engine=ddp", "train.max_steps=100000"]
    for victim in ("launcher", "supervisor"):
        with Job("torchrun.sh", run_dir, *settings, NPROC_PER_NODE="2") as job:
            job.wait_for_step(max(losses(run_dir), default=0) + 3)
            below = job.below()
            launcher = next(p for p in below if "torch.distributed.run" in p.cmdline())
            kill(launcher if victim == "launcher" else job.process)
            assert job.end() != 0
            assert are_gone(below, timeout_s=5), victim
            if victim == "launcher":
                assert "the launcher was killed by SIGKILL" in job.text().splitlines()[-1]


@pytest.mark.slow
def test_a_users_mistake_is_told_once_and_not_tried_again(tmp_path):
    settings = [*SETTINGS, "engine=ddp", "data.path=nowhere"]
    with Job("torchrun.sh", tmp_path / "run", *settings, "data=file", NPROC_PER_NODE="2") as job:
        assert job.end() == 2, job.text()[-4000:]
        assert "nowhere" in job.text().splitlines()[-1]
        assert "Traceback" not in job.text()
