"""wandb: offline without a key, one id over resumes, no key on disk, and never in the way of training."""

import http.server
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
import types

import pytest
from wandb_file import history

from distllm.errors import ConfigError
from distllm.tracking import wandb as ours
from distllm.tracking.base import make_trackers
from distllm.tracking.options import TrackingOptions

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Keep the machine's wandb settings out, and see what is written outside the run directory."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    yield home
    import wandb

    wandb.teardown()


def trackers(run_dir, is_main=True):
    options = TrackingOptions(name="wandb", project="tests")
    return make_trackers(options, run_dir, is_main, {"optim": {"lr": 0.1}})


def logs(run_dir):
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def test_resumed_offline_run_keeps_its_id_and_its_history(tmp_path):
    run_dir = tmp_path / "run"
    first = trackers(run_dir)
    for step in (1, 2, 3):
        first.log(step, {"stage": "sft", "train/loss": step / 10})
    first.sample({"step": 3, "stage": "sft", "prompt": "p", "response": "r", "when": "before"})
    state = json.loads(json.dumps(first.state()))
    first.log(4, {"train/loss": 99.0})  # after the checkpoint: to be forgotten
    first.close()
    (log,) = logs(run_dir)
    assert history(log)[4]["train/loss"] == 99.0

    second = trackers(run_dir)
    second.restore(state, 3)
    assert second.state()["wandb"]["run_id"] == state["wandb"]["run_id"]
    second.log(4, {"train/loss": float("inf")})
    second.log(5, {"train/loss": 0.5})
    second.close()
    (log,) = logs(run_dir)
    assert state["wandb"]["run_id"] in log.name
    rows = history(log)
    assert {step: row["train/loss"] for step, row in rows.items()} == {
        1: 0.1, 2: 0.2, 3: 0.3, 4: math.inf, 5: 0.5,
    }  # fmt: skip
    assert rows[3]["samples/nrows"] == 1


def test_run_that_never_saved_starts_over_under_the_same_id(tmp_path):
    run_dir = tmp_path / "run"
    first = trackers(run_dir)
    first.log(1, {"train/loss": 9.0})
    run_id = first.state()["wandb"]["run_id"]
    first.close()
    second = trackers(run_dir)
    second.restore({}, 0)
    second.log(1, {"train/loss": 1.0})
    second.close()
    (log,) = logs(run_dir)
    assert log.name == f"run-{run_id}.wandb"
    assert history(log)[1]["train/loss"] == 1.0


def test_key_stays_in_the_environment(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    caplog.set_level(logging.DEBUG)
    run_dir = tmp_path / "run"
    tracker = trackers(run_dir)
    tracker.log(1, {"train/loss": 1.0})
    tracker.sample({"step": 1, "prompt": "p"})
    tracker.state()
    tracker.close()
    assert logs(run_dir)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    leaks = [str(path) for path in files if KEY.encode() in path.read_bytes()]
    assert leaks == []
    assert KEY not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("key", "mode", "expected"),
    [
        (None, None, "offline"),
        (None, "online", "offline"),
        (KEY, None, "online"),
        (KEY, "offline", "offline"),
        (KEY, "disabled", "disabled"),
        (None, "disabled", "disabled"),
    ],
)
def test_mode_follows_the_environment(monkeypatch, key, mode, expected):
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", mode)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert ours.wandb_mode() == expected


@pytest.fixture
def server(monkeypatch):
    """A server that keeps what it is asked and answers with GraphQL errors, or never if `hangs` is set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.queries.append(body["query"].split("(")[0].split()[-1])
            found.variables.append(body["variables"])
            if found.hangs:
                found.closing.wait(30)
                return
            answer = json.dumps({"errors": [{"message": "no such thing here"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    found = types.SimpleNamespace(queries=[], variables=[], hangs=False, closing=threading.Event())
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
    yield found
    found.closing.set()
    listening.shutdown()
    listening.server_close()
    thread.join()


ON_SERVER = {"wandb": {"run_id": "abc12345", "mode": "online"}, "jsonl": {"metrics_bytes": 32}}


def test_online_resume_asks_to_rewind_then_to_resume_then_goes_offline(tmp_path, server, caplog):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 4, "train/loss": 0.25}\n')
    tracker = trackers(run_dir)
    with caplog.at_level(logging.WARNING):
        tracker.restore(ON_SERVER, 4)
        tracker.log(5, {"train/loss": 0.5})
        tracker.close()
    assert server.queries == ["RewindRun", "RunResumeStatus"]
    rewind = server.variables[0]
    assert (rewind["runName"], rewind["metricValue"]) == ("abc12345", 4)
    assert caplog.text.count("cannot start online") == 1
    (log,) = logs(run_dir)
    assert {step: row["train/loss"] for step, row in history(log).items()} == {4: 0.25, 5: 0.5}


def test_server_that_never_answers_is_asked_once_and_does_not_stop(
    tmp_path, server, monkeypatch, caplog
):
    server.hangs = True
    monkeypatch.setattr(ours, "INIT_TIMEOUT_S", 2.0)
    run_dir = tmp_path / "run"
    tracker = trackers(run_dir)
    tracker.restore(ON_SERVER, 4)
    tracker.log(5, {"train/loss": 1.0})
    start = time.monotonic()
    tracker.close()
    assert time.monotonic() - start < 11
    assert set(server.queries) == {"RewindRun"}
    assert caplog.text.count("going on offline") == 1
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 5, "train/loss": 1.0}\n'
    assert len(logs(run_dir)) == 1


def test_close_gives_up_on_a_library_that_hangs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ours, "CLOSE_TIMEOUT_S", 0.3)
    tracker = trackers(tmp_path / "run")
    tracker.log(1, {"train/loss": 1.0})
    finish, go_on = tracker.trackers["wandb"]._run.finish, threading.Event()
    monkeypatch.setattr(tracker.trackers["wandb"]._run, "finish", lambda: go_on.wait(60))
    start = time.monotonic()
    tracker.close()
    assert time.monotonic() - start < 5
    assert "did not finish uploading within 0.3 s" in caplog.text
    go_on.set()
    finish()


def test_failure_in_the_middle_warns_once_and_logging_goes_on(tmp_path, caplog):
    tracker = trackers(tmp_path / "run")
    tracker.log(1, {"train/loss": 1.0})
    import wandb

    wandb.run.finish()  # as if the service had died under us: the library raises from now on
    for step in range(2, 5):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    assert caplog.text.count("Training goes on without it") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_other_ranks_never_load_the_library(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from distllm.tracking.base import make_trackers\n"
        "from distllm.tracking.options import TrackingOptions\n"
        f"t = make_trackers(TrackingOptions(name='wandb'), Path({str(tmp_path)!r}), False, {{}})\n"
        "t.log(1, {'a': 1.0}); t.restore({}, 0); t.close()\n"
        "print('wandb' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        trackers(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb")
