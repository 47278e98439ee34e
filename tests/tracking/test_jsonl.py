"""metrics.jsonl and samples.jsonl: exact, always valid, and cut back to any earlier state."""

import json
import math
import os
import random
import subprocess
import sys
import textwrap

import pytest
import torch

from distllm.errors import ConfigError, EngineError
from distllm.tracking.base import MultiTracker, make_trackers
from distllm.tracking.lines import read_jsonl
from distllm.tracking.options import TrackingOptions


def trackers(run_dir, is_main=True, name="jsonl"):
    return make_trackers(TrackingOptions(name=name), run_dir, is_main, {})


def strict(line: str):
    """Parse JSON as the standard has it: Python's own parser also takes a bare NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(line, parse_constant=refuse)


def test_floats_read_back_bit_for_bit(tmp_path):
    generator = random.Random(0)
    values = [generator.uniform(-1, 1) * 10 ** generator.randint(-300, 300) for _ in range(200)]
    tracker = trackers(tmp_path)
    for step, value in enumerate(values):
        tracker.log(step, {"stage": "pretrain", "train/loss": value})
    tracker.close()
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"].hex() for row in rows] == [value.hex() for value in values]
    assert [list(row)[:2] for row in rows] == [["step", "stage"]] * 200


def test_what_is_not_finite_or_not_python_is_still_strict_json(tmp_path):
    tracker = trackers(tmp_path)
    tracker.log(
        1,
        {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": torch.tensor(0.1).double()},
    )
    tracker.sample(
        {"step": 1, "response": "zwei\u2028Zeilen\n\ud800", "ids": [1, (2, math.nan)], "ok": True}
    )
    tracker.close()
    row = strict((tmp_path / "metrics.jsonl").read_text())
    assert math.isnan(float(row["a"]))
    assert (float(row["b"]), float(row["c"])) == (math.inf, -math.inf)
    assert row["d"] == float(torch.tensor(0.1).double())
    raw = (tmp_path / "samples.jsonl").read_bytes()
    assert raw.count(b"\n") == 1
    assert strict(raw.decode())["response"] == "zwei\u2028Zeilen\n\ud800"
    assert strict(raw.decode())["ids"] == [1, [2, "NaN"]]
    assert strict(raw.decode())["ok"] is True


def test_restore_equals_a_run_that_was_never_interrupted(tmp_path):
    def write(tracker, steps):
        for step in steps:
            tracker.log(step, {"train/loss": 1 / (step + 1)})
            tracker.sample({"step": step, "response": "ä" * step})

    straight = trackers(tmp_path / "straight")
    write(straight, range(10))
    straight.close()

    first = trackers(tmp_path / "cut")
    write(first, range(5))
    state = json.loads(json.dumps(first.state()))
    write(first, range(5, 8))
    first.close()
    with open(tmp_path / "cut" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "train/lo')  # as a kill in the middle of a write leaves it
    second = trackers(tmp_path / "cut")
    second.restore(state, 4)
    write(second, range(5, 10))
    second.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_restore_to_nothing_clears_what_a_run_without_checkpoint_left(tmp_path):
    tracker = trackers(tmp_path)
    tracker.log(3, {"train/loss": 1.0})
    tracker.close()
    tracker = trackers(tmp_path)
    tracker.restore({}, 0)
    tracker.log(1, {"train/loss": 2.0})
    tracker.close()
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("torn", [b'{"step": 2', b"x" * 200_000])
def test_a_torn_last_line_is_dropped_on_opening(tmp_path, torn):
    whole = b'{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    (tmp_path / "samples.jsonl").write_bytes(torn)
    trackers(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


def test_a_file_shorter_than_its_checkpoint_is_kept_and_reported(tmp_path, caplog):
    tracker = trackers(tmp_path)
    tracker.log(1, {"train/loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    tracker.restore({"jsonl": {"metrics_bytes": 1000, "samples_bytes": 0}}, 5)
    tracker.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size == size  # not padded with zero bytes
    assert f"holds {size} bytes, but held 1000" in caplog.text


def test_lines_reach_the_file_without_flush_or_close(tmp_path):
    script = f"""
        import os
        from pathlib import Path
        from distllm.tracking.base import make_trackers
        from distllm.tracking.options import TrackingOptions
        tracker = make_trackers(TrackingOptions(), Path({str(tmp_path)!r}), True, {{}})
        tracker.log(1, {{"train/loss": 1.0}})
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=os.getcwd())
    assert done.returncode == -9
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_full_disk_is_reported_with_path_and_bytes(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = trackers(tmp_path)
    with pytest.raises(
        EngineError, match=r"Cannot write 12 bytes to .*metrics\.jsonl: No space left"
    ):
        tracker.log(1, {})


def test_only_the_main_rank_writes(tmp_path):
    tracker = trackers(tmp_path, is_main=False)
    tracker.log(1, {"train/loss": 1.0})
    tracker.sample({"step": 1})
    assert tracker.state() == {}
    tracker.restore({"jsonl": {"metrics_bytes": 3}}, 1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_goes_on_after_one_tracker_fails(tmp_path):
    class Failing:
        def close(self):
            raise RuntimeError("no")

    files = trackers(tmp_path).trackers["jsonl"]
    with pytest.raises(RuntimeError, match="no"):
        MultiTracker({"jsonl": files, "other": Failing()}).close()
    assert files.metrics._file.closed and files.samples._file.closed


def test_unknown_tracker_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"tracking=wandbb is unknown\. Did you mean wandb\?"):
        trackers(tmp_path, name="wandbb")


def test_importing_and_logging_open_no_socket(tmp_path):
    script = f"""
        import socket, sys
        from pathlib import Path
        def refuse(*args, **kwargs):
            raise SystemExit("a socket was opened")
        sys.addaudithook(lambda event, args: refuse() if event.startswith("socket.") else None)
        from distllm.tracking.base import make_trackers
        from distllm.tracking.console import print_table, setup_logging
        from distllm.tracking.options import TrackingOptions
        from distllm.tracking.progress import progress
        from distllm.tracking.report import write_report
        run_dir = Path({str(tmp_path)!r})
        setup_logging(run_dir)
        tracker = make_trackers(TrackingOptions(), run_dir, True, {{}})
        with progress(3, "work") as bar:
            for step in range(3):
                tracker.log(step, {{"stage": "pretrain", "train/loss": 1.0}})
                bar.advance()
        tracker.close()
        write_report([run_dir], run_dir / "report.html")
        print_table("t", ["a"], [[1]])
        assert not {{"wandb", "tensorboard"}} & set(sys.modules)
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr


def test_damaged_lines_are_passed_over_when_reading(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n\xff\xfe\nnull\n[1]\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_jsonl(file)] == [1, 2]
    assert list(read_jsonl(tmp_path / "missing.jsonl")) == []
