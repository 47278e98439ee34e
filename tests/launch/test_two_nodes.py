"""Two machines: two network namespaces joined by a cable (a veth pair), a torchrun agent in each, two processes each.

Needs the right to make namespaces (root, as in most containers of CI) and `ip` of iproute2; skipped without.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest
from launched import SFT, Job, are_gone, losses

from distllm.testing.stages import run_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

NUM_STEPS = 10
SETTINGS = [*SFT, "train.micro_batch_size=2", "train.save_every_steps=5", "train.keep_last=3"]
TIMEOUT_S = 30


class Cable:
    """Two namespaces that see each other and nothing else."""

    def __init__(self):
        tag = f"dl{os.getpid() % 100000}"
        self.names = (f"{tag}a", f"{tag}b")
        self.ends = (f"{tag}va", f"{tag}vb")
        self.addresses = ("10.77.3.1", "10.77.3.2")
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for name, end, address in zip(self.names, self.ends, self.addresses, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")

    def set(self, state):
        """Plug in (`up`) or cut (`down`)."""
        ip("-n", self.names[0], "link", "set", self.ends[0], state)

    def close(self):
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    @contextlib.contextmanager
    def jobs(self, run_dir, *settings, **environment):
        """Start the same command on both nodes."""
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(
                    Job(
                        "torchrun.sh",
                        run_dir,
                        *settings,
                        prefix=("ip", "netns", "exec", self.names[node]),
                        NPROC_PER_NODE="2",
                        RDZV_ENDPOINT=f"{self.addresses[0]}:29400",
                        RDZV_CONF=f"is_host={int(node == 0)},last_call_timeout=3",
                        LOCAL_ADDR=self.addresses[node],
                        GLOO_SOCKET_IFNAME=self.ends[node],
                        **{"NNODES": "2", **environment},
                    )
                )
                for node in (0, 1)
            ]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def cable():
    if shutil.which("ip") is None:
        pytest.skip("`ip` is not installed (Debian: apt install iproute2)")
    try:
        cable = Cable()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no right to make network namespaces: {error.stderr.decode().strip()}")
    yield cable
    cable.close()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "run"
    run_tiny(folder, [*SETTINGS, f"train.max_steps={NUM_STEPS}"])
    return losses(folder)


@pytest.mark.parametrize(
    "engine", [["engine=fsdp"], ["engine=deepspeed", "engine.zero_stage=2"]], ids=["fsdp", "zero-2"]
)
def test_ten_steps_on_two_nodes_equal_one_process(tmp_path, cable, single, engine):
    if "deepspeed" in engine[0]:
        pytest.importorskip("deepspeed")
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, *engine, f"train.max_steps={NUM_STEPS}"]
    with cable.jobs(run_dir, *settings, MAX_RESTARTS="0", DS_ACCELERATOR="cpu") as jobs:
        for job in jobs:
            assert job.end() == 0, job.text()[-4000:]
        assert "processes: 4" in jobs[0].text() + jobs[1].text()
    assert losses(run_dir) == pytest.approx(single, rel=1e-5)


def test_a_cut_cable_ends_every_process_and_a_restart_goes_on(tmp_path, cable):
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, "engine=fsdp", f"engine.timeout_s={TIMEOUT_S}"]
    with cable.jobs(run_dir, *settings, "train.max_steps=100000", MAX_RESTARTS="0") as jobs:
        jobs[0].wait_for(lambda: max(losses(run_dir), default=0) >= 7)
        below = [process for job in jobs for process in job.below()]
        cable.set("down")
        cut_s = time.monotonic()
        try:
            for job in jobs:
                assert job.end() == 1, job.text()[-4000:]
                last = job.text()[job.text().rindex("distllm: rank") :]
                assert "lost another rank" in last, last
            took_s = time.monotonic() - cut_s
            assert are_gone(below)
        finally:
            cable.set("up")
        # The isolated agent waits for its rendezvous, and is ended after 30 s; the rest is for a busy machine.
        assert took_s < TIMEOUT_S + 180
        reached = max(losses(run_dir))

    with cable.jobs(run_dir, *settings, f"train.max_steps={reached + 5}", MAX_RESTARTS="0") as jobs:
        for job in jobs:
            assert job.end() == 0, job.text()[-4000:]
        assert "Going on from step" in jobs[0].text() + jobs[1].text()
    assert sorted(losses(run_dir)) == list(range(1, reached + 6))


def test_f11_a_partition_leaves_one_world_and_the_nodes_meet_again(tmp_path, cable):
    """One node is enough (NNODES=1:2): the side of the rendezvous goes on alone, the other one waits for the cable."""
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, "engine=fsdp", "engine.timeout_s=8", "train.max_steps=100000"]
    elastic = {"NNODES": "1:2", "MAX_RESTARTS": "20"}
    with cable.jobs(run_dir, *settings, **elastic) as jobs:

        def num_starts(size):
            return sum(job.text().count(f"processes: {size},") for job in jobs)

        jobs[0].wait_for(lambda: num_starts(4) == 1 and max(losses(run_dir), default=0) >= 7)
        cable.set("down")
        try:
            jobs[0].wait_for(lambda: "processes: 2," in jobs[0].text())
            before = max(losses(run_dir))
            jobs[0].wait_for(lambda: max(losses(run_dir)) >= before + 7)
            assert jobs[1].process.poll() is None
            assert "processes: 2," not in jobs[1].text()  # no second world
        finally:
            cable.set("up")
        jobs[0].wait_for(lambda: num_starts(4) == 2)
        before = max(losses(run_dir))
        jobs[0].wait_for(lambda: max(losses(run_dir)) >= before + 3)
        for job in jobs:
            job.process.send_signal(signal.SIGTERM)
        assert [job.end() for job in jobs] == [3, 3], jobs[0].text()[-4000:]
    assert sorted(losses(run_dir)) == list(range(1, max(losses(run_dir)) + 1))
