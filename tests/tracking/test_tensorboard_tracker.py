"""TensorBoard: what TensorBoard itself reads back equals what was logged, also after a resume."""

import sys

import pytest

from distllm.errors import ConfigError
from distllm.tracking.base import make_trackers
from distllm.tracking.options import TrackingOptions

pytestmark = pytest.mark.filterwarnings("ignore")


def trackers(run_dir):
    return make_trackers(TrackingOptions(name="tensorboard"), run_dir, True, {})


def scalars(run_dir, tag):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = event_accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_resumed_run_hides_the_steps_after_its_checkpoint(tmp_path):
    first = trackers(tmp_path)
    for step in (1, 2, 3, 4):
        first.log(step, {"stage": "sft", "train/loss": 0.5 * step})
    first.close()
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    second = trackers(tmp_path)
    second.restore({}, 2)
    for step in (3, 4, 5):
        second.log(step, {"train/loss": 8.0 * step})
    second.sample({"step": 5, "stage": "sft", "when": "after", "prompt": "a\nb", "response": "c"})
    second.state()
    second.close()
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 1.0), (3, 24.0), (4, 32.0), (5, 40.0)]


def test_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        trackers(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorboard")
