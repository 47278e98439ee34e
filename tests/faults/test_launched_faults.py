"""Faults under launch/torchrun.sh: who ends, what is left running, what the script returns, and that the next start goes on."""

import signal

import pytest
from fault_runs import check_equal, check_tidy, logged_steps, saved_steps
from launched import Job, are_gone, kill

from distllm.testing.gloo import free_port

pytestmark = pytest.mark.timeout(1200)


def reached(run_dir):
    """Return the last step that was logged."""
    return max(logged_steps(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def test_f01_f05_torchrun_replaces_a_killed_rank_and_a_signal_saves_once(
    nursery, settings, oracle, tmp_path
):
    """kill -9 of a rank, a restart by torchrun itself, SIGUSR1 to the script; then a start of other ranks ends the run."""
    run_dir = tmp_path / "a run"
    slow = "train.max_steps=100000"  # the end must not come before the signal
    with Job("torchrun.sh", run_dir, *settings, slow, NPROC_PER_NODE="2") as job:
        job.wait_for(lambda: reached(run_dir) >= 3)
        victim = job.worker(1)
        kill(victim)
        at = reached(run_dir)
        job.wait_for(lambda: f"rank 1: the process (pid {victim.pid}) " in job.text())
        job.wait_for(lambda: job.text().count("Going on from step") == 1)
        job.wait_for(lambda: reached(run_dir) >= at)
        below = job.below()
        job.process.send_signal(signal.SIGUSR1)
        assert job.end() == 3, job.text()[-4000:]
        assert are_gone(below)
    stopped_at = reached(run_dir)
    assert job.text().count("Stopped after step") == 1
    assert max(saved_steps(run_dir)) == stopped_at
    assert logged_steps(run_dir) == list(range(1, stopped_at + 1))
    assert {p.name for p in (run_dir / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    check_tidy(run_dir)


def test_f03_killing_the_launcher_leaves_no_orphan_and_the_next_start_goes_on(
    nursery, settings, oracle, tmp_path
):
    run_dir = tmp_path / "run"
    slow = "train.max_steps=100000"
    with Job("torchrun.sh", run_dir, *settings, slow, NPROC_PER_NODE="2") as job:
        job.wait_for(lambda: reached(run_dir) >= 3)
        below = job.below()
        assert len(below) >= 3
        kill(next(p for p in below if "torch.distributed.run" in p.cmdline()))
        assert job.end() == 1
        assert are_gone(below, timeout_s=20)
        assert "the launcher was killed by SIGKILL" in job.text().splitlines()[-1]
    last = saved_steps(run_dir)[-1]
    with nursery.start(run_dir, *settings, f"train.max_steps={last + 2}") as job:
        assert job.end() == [0, 0], job.text()
    assert logged_steps(run_dir) == list(range(1, last + 3))


def test_f22_a_second_start_is_refused_and_a_stale_lock_is_not(nursery, settings, oracle, tmp_path):
    run_dir = tmp_path / "run"
    mark = tmp_path / "held"
    held = {"at": "read", "step": 5, "do": "sleep", "seconds": 3600, "mark": str(mark)}
    with nursery.start(run_dir, *settings, faults=[held]) as first:
        first.wait_for(mark.exists)
        with nursery.start(run_dir, *settings) as second:
            assert second.end() == [2, 2], second.text()
        told = second.ranks[0].text
        assert f"is in use by process {first.ranks[0].pid} on " in told, told
        assert [r.poll() for r in first.ranks] == [None, None], first.text()
        for rank in first.ranks:
            rank.send(signal.SIGKILL)
        first.end()
    with nursery.start(run_dir, *settings) as third:
        assert third.end() == [0, 0], third.text()
    check_equal(run_dir, oracle)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("whom", ["script", "launcher", "one worker", "everyone"])
def test_f05_whoever_is_signalled_the_run_saves_once(nursery, settings, tmp_path, signum, whom):
    run_dir = tmp_path / "run"
    slow = "train.max_steps=100000"
    with Job("torchrun.sh", run_dir, *settings, slow, NPROC_PER_NODE="2") as job:
        job.wait_for(lambda: reached(run_dir) >= 3)
        below = job.below()
        launcher = next(p for p in below if "torch.distributed.run" in p.cmdline())
        targets = {
            "script": [job.process],
            "launcher": [launcher],
            "one worker": [job.worker(1)],
            "everyone": [job.process, *below],
        }
        for target in targets[whom]:
            target.send_signal(signum)
        assert job.end() == 3, job.text()[-4000:]
        assert are_gone(below)
    assert max(saved_steps(run_dir)) == reached(run_dir)
    assert job.text().count("Stopped after step") == 1
    check_tidy(run_dir)


@pytest.mark.slow
def test_f06_a_signal_in_the_middle_of_a_save_waits_for_it(nursery, settings, oracle, tmp_path):
    run_dir, mark = tmp_path / "run", tmp_path / "writing"
    slow = {
        "rank": 1,
        "at": "save:mid_write",
        "step": 4,
        "do": "sleep",
        "seconds": 3,
        "mark": str(mark),
    }
    with nursery.start(run_dir, *settings, faults=[slow]) as job:
        job.wait_for(mark.exists)
        for rank in job.ranks:
            rank.send(signal.SIGTERM)
        assert job.end() == [0, 0], job.text()
    assert (run_dir / "stopped.json").exists()
    assert saved_steps(run_dir)[-1] == 4
    check_tidy(run_dir)
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [0, 0], job.text()
    check_equal(run_dir, oracle)


@pytest.mark.slow
def test_f06_a_save_may_take_longer_than_a_step(nursery, settings, oracle, tmp_path):
    """The limit is that of the phase: 6 s of writing on one rank are no hang where a step may take 3 s, and end a step."""
    limits = ["engine.timeout_s=3", "engine.long_timeout_s=60"]
    slow = {"rank": 1, "do": "sleep", "seconds": 6}
    in_save = [{**slow, "at": "save:mid_write", "step": 4}]
    with nursery.start(tmp_path / "run", *settings, *limits, faults=in_save) as job:
        assert job.end() == [0, 0], job.text()
    check_equal(tmp_path / "run", oracle)
    in_step = [{**slow, "at": "read", "step": 4}]
    with nursery.start(tmp_path / "other", *settings, *limits, faults=in_step) as job:
        assert job.end()[0] == 1, job.text()
    assert "in phase update of step 4 (limit 3 s)" in job.ranks[0].text


@pytest.mark.slow
def test_a_rank_that_never_comes_is_missed_by_name(nursery, settings, tmp_path):
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    limit = "engine.start_timeout_s=5"
    with nursery.start(
        tmp_path / "run", *settings, limit, world=1, **environment, MASTER_PORT=free_port()
    ) as job:
        assert job.end() == [2], job.text()
    told = job.ranks[0].text
    assert "rank 0 of 2 did not meet the others at 127.0.0.1:" in told, told
    assert "engine.start_timeout_s=5" in told and "Traceback" not in told


TIMEOUT_S = 8


@pytest.mark.slow
def test_f07_a_stopped_rank_is_named_and_replaced(nursery, settings, tmp_path):
    """SIGSTOP: the process is there and says nothing. Its peers give up after the time-out, and torchrun starts anew."""
    run_dir = tmp_path / "run"
    more = ["train.max_steps=100000", f"engine.timeout_s={TIMEOUT_S}"]
    with Job("torchrun.sh", run_dir, *settings, *more, NPROC_PER_NODE="2") as job:
        job.wait_for(lambda: reached(run_dir) >= 3)
        victim = job.worker(1)
        victim.send_signal(signal.SIGSTOP)
        job.wait_for(lambda: "Going on from step" in job.text())
        assert are_gone([victim])  # it cannot come back into the new world
        text = job.text()
        assert "rank 0 lost another rank in phase update of step" in text, text
        assert f"(limit {TIMEOUT_S} s)" in text, text
        assert f"rank 1: the process (pid {victim.pid}) is stopped" in text, text
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 3, job.text()[-4000:]
    assert logged_steps(run_dir) == list(range(1, reached(run_dir) + 1))
    check_tidy(run_dir)


@pytest.mark.slow
def test_f13_when_the_host_of_the_rendezvous_dies_the_others_say_so(settings, tmp_path):
    run_dir, port = tmp_path / "run", free_port()
    more = ["train.max_steps=100000", f"engine.timeout_s={TIMEOUT_S}"]
    nodes = {
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{port}",
        "MAX_RESTARTS": "0",
    }
    start = ("torchrun.sh", run_dir, *settings, *more)
    with (
        Job(*start, **nodes, RDZV_CONF="is_host=1") as host,
        Job(*start, **nodes, RDZV_CONF="is_host=0") as job,
    ):
        job.wait_for(lambda: reached(run_dir) >= 3)
        for process in [host.process, *host.below()]:
            kill(process)
        below = job.below()
        assert job.end() == 1, job.text()[-4000:]
        assert are_gone(below)
        assert "lost another rank" in job.text()[job.text().rindex("distllm: rank") :]
    step = max(saved_steps(run_dir))
    check_tidy(run_dir)
    with Job(
        "torchrun.sh", run_dir, *settings, f"train.max_steps={step + 2}", NPROC_PER_NODE="2"
    ) as job:
        assert job.end() == 0, job.text()[-4000:]
    assert logged_steps(run_dir) == list(range(1, step + 3))
