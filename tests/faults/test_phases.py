"""Each phase waits for other ranks as long as it may take, and no longer: GRPO on two ranks, which has all of them."""

import json

import pytest

from distllm.testing.gloo import patient
from distllm.testing.stages import SKILLS, TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = ("build", "load", "evaluation", "sampling", "reward", "save", "export")


@pytest.fixture(scope="module")
def grpo(nursery):
    """Return the settings of a run of two steps."""
    return [
        *TINY,
        *SKILLS,
        "stage=grpo",
        "stage.num_samples=4",
        f"model='{nursery.folder / 'parent/model'}'",
        "engine=fsdp",
        "train.micro_batch_size=2",
        "train.max_steps=2",
        "train.save_every_steps=1",
        "train.log_every_steps=1",
    ]


def test_every_group_has_the_limit_of_the_phase(nursery, grpo, tmp_path):
    limits = ["engine.start_timeout_s=310", "engine.timeout_s=110", "engine.long_timeout_s=1810"]
    log = tmp_path / "limits.txt"
    noted = {"rank": 1, "at": "limits", "log": str(log)}
    with nursery.start(tmp_path / "run", *grpo, *limits, faults=[noted]) as job:
        assert job.end() == [0, 0], job.text()
    found = {}
    for line in log.read_text().splitlines():
        name, seconds = json.loads(line)
        found.setdefault(name, set()).update(seconds)
    assert found == {"start": {310.0}, "update": {110.0}, **{name: {1810.0} for name in LONG}}


def test_a_long_phase_is_no_hang(nursery, grpo, tmp_path):
    """One rank is late by more than a step may take, in one phase after the other."""
    late = {"rank": 1, "step": 2, "do": "sleep", "seconds": 2 * patient(10)}
    faults = [{**late, "at": f"phase:{name}"} for name in ("sampling", "reward", "save", "export")]
    limits = [f"engine.timeout_s={round(patient(10))}", "engine.long_timeout_s=1800"]
    with nursery.start(tmp_path / "run", *grpo, *limits, faults=faults) as job:
        assert job.end() == [0, 0], job.text()


@pytest.mark.parametrize("name", ["sampling", "reward", "save", "export"])
def test_a_stuck_rank_ends_the_phase_at_its_limit(nursery, grpo, tmp_path, name):
    limit_s = round(patient(15))
    stuck = {"rank": 1, "step": 2, "at": f"phase:{name}", "do": "sleep", "seconds": 3600}
    limits = [f"engine.long_timeout_s={limit_s}", "engine.timeout_s=1800"]
    with nursery.start(tmp_path / "run", *grpo, *limits, faults=[stuck]) as job:
        job.wait_for(lambda: job.ranks[0].poll() is not None)
        assert job.ranks[0].poll() == 1, job.text()
        told = job.ranks[0].text
        assert f"lost another rank in phase {name} of step 2 (limit {limit_s} s)" in told, told
