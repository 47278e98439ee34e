"""What the fault tests share: forked ranks, a toy model, and the run that nothing happens to."""

import pytest
from fault_runs import NUM_STEPS, SETTINGS, write_dialogues
from nursery import Nursery

from distllm.testing.stages import TINY, write_text


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Return the process that forks ranks; its first child has made the toy model of `parent`."""
    folder = tmp_path_factory.mktemp("faults")
    text = write_text(folder / "text.txt")
    settings = ["stage=pretrain", "data=file", f"data.path='{text}'", "train.max_steps=2"]
    words = ["train", *TINY, *settings, "engine=fsdp", f"run.dir='{folder / 'parent'}'"]
    nursery = Nursery(folder, words)
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def settings(nursery):
    """Return the settings of every run here."""
    model = f"model='{nursery.folder / 'parent/model'}'"
    return [*SETTINGS, model, *write_dialogues(nursery.folder)]


@pytest.fixture(scope="session")
def oracle(nursery, settings):
    """Return the directory of the undisturbed run of two ranks, with the checkpoint of every second step."""
    run_dir = nursery.folder / "oracle"
    kept = f"train.keep_last={NUM_STEPS}"
    with nursery.start(run_dir, *settings, kept) as job:
        assert job.end() == [0, 0], job.text()
    return run_dir
