"""Weights & Biases: the only door to the `wandb` library.

Without WANDB_API_KEY in the environment, or with WANDB_MODE=offline, nothing leaves the machine: the run is
written below `run_dir/wandb` and `wandb sync` uploads it later. The key is read by the library from the environment
and goes nowhere else. Whatever fails here is reported once and never stops training.

A resumed run keeps its id. Online it is rewound to the checkpoint's step; where the server cannot rewind, it goes on
and the server drops the steps it has seen (they repeat exactly). Offline the library can neither resume nor rewind, so
the history in `metrics.jsonl` is written again into a new folder, which replaces the earlier ones.
"""

import importlib.util
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distllm.errors import ConfigError
from distllm.registry import register
from distllm.tracking.lines import numbers, read_jsonl
from distllm.tracking.options import TrackingOptions

logger = logging.getLogger("distllm")

INIT_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 10.0
SAMPLE_COLUMNS = ("step", "stage", "when", "prompt", "response", "answer", "reward")


@register("tracking")
class WandbTracker:
    """Reports to one wandb run, started at the first call so that a resumed run can name its id."""

    Options = TrackingOptions

    def __init__(self, options: TrackingOptions, run_dir: Path, config_dict: Mapping[str, Any]):
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "tracking=wandb needs the package wandb, which is not installed. "
                "Type: pip install wandb, or set tracking=jsonl."
            )
        self.options, self.run_dir, self.config = options, run_dir, dict(config_dict)
        self.mode = wandb_mode()
        self._run: Any = None
        self._stopped = False
        self._step = 0
        self._samples: list[Any] = []

    @property
    def run_id(self) -> str:
        """The id of the run, the same over all its resumes; kept in the run directory too, for a run that never saved."""
        file = self.run_dir / "wandb" / "run_id"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4))
        return file.read_text().strip()

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Send the numbers among `metrics`."""
        self._step = max(self._step, step)
        self._guard(lambda: self._started().log(numbers(metrics), step=step))

    def sample(self, record: Mapping[str, Any]) -> None:
        """Keep `record` for the table that is sent at the next checkpoint."""
        self._samples.append([record.get(column) for column in SAMPLE_COLUMNS])

    def state(self) -> dict[str, Any]:
        """Send the sample table and return the run's id and where its history is."""
        self._guard(self._send_samples)
        return {"run_id": self.run_id, "mode": self.mode}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Take up the run of `state` and rewind it to `step`."""
        if self._run is not None:
            self._guard(self._run.finish)
            self._run = None
        file = self.run_dir / "wandb" / "run_id"
        if "run_id" in state:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(state["run_id"])
        self._step = step
        on_server = file.is_file() and state.get("mode", "online") == "online"
        self._guard(lambda: self._rewind(on_server))

    def close(self) -> None:
        """Upload what is left, for at most ten seconds."""
        if self._run is None or self._stopped:
            return
        self._guard(self._send_samples)
        finish = threading.Thread(target=lambda: self._guard(self._run.finish), daemon=True)
        finish.start()
        finish.join(CLOSE_TIMEOUT_S)
        if finish.is_alive():
            self._warn(f"did not finish uploading within {CLOSE_TIMEOUT_S:g} s")
        self._stopped = True

    def _guard(self, action: Callable[[], Any]) -> None:
        """Run `action`; its first failure is the last thing heard of wandb in this run."""
        if self._stopped:
            return
        try:
            action()
        except Exception as error:  # whatever the library raises: training goes on
            self._stopped = True
            self._warn(_first_line(error))

    def _warn(self, reason: str) -> None:
        logger.warning(
            "wandb: %s. Training goes on without it; metrics.jsonl is complete. "
            "`wandb sync %s` uploads what was recorded.", reason, self.run_dir / "wandb",
        )  # fmt: skip

    def _started(self) -> Any:
        if self._run is None:
            self._start([{"resume": "allow"} if self.mode == "online" else {}])
        return self._run

    def _rewind(self, on_server: bool) -> None:
        """Start the run so that its history ends at `self._step`; `on_server` tells that the server has a history."""
        earlier = list((self.run_dir / "wandb").glob(f"offline-run-*-{self.run_id}"))
        if on_server and self.mode == "online":
            self._start([{"resume_from": f"{self.run_id}?_step={self._step}"}, {"resume": "allow"}])
        else:
            self._started()
        if self.mode == "online" and on_server:
            return
        for row in read_jsonl(self.run_dir / "metrics.jsonl"):
            if row.get("step", 0) <= self._step:
                self._run.log(numbers(row), step=row.get("step", 0))
        for record in read_jsonl(self.run_dir / "samples.jsonl"):
            self.sample(record)
        if self.mode == "offline":
            for folder in earlier:
                shutil.rmtree(folder, ignore_errors=True)

    def _start(self, attempts: list[dict[str, Any]]) -> None:
        """Start the run in the first way that works; the last resort is offline."""
        # Set before the import: the library reads them there.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        started, reason = time.monotonic(), Exception()
        for attempt in attempts:
            try:
                self._init(wandb, attempt)
                break
            except Exception as error:
                if self.mode != "online":
                    raise
                reason = error
                wandb.teardown()  # else the library holds the id of the failed attempt as in use
            if time.monotonic() - started > INIT_TIMEOUT_S / 2:
                break  # the server does not answer: no use in asking it something else
        if self._run is None:
            logger.warning(
                "wandb: cannot start online (%s); going on offline.", _first_line(reason)
            )
            self.mode = "offline"
            self._init(wandb, {})
        run: Any = self._run
        if self.mode == "offline":
            folder = Path(run.settings.sync_dir)
            logger.info("wandb: offline. Upload later with: wandb sync %s", folder)
        elif self.mode == "online":
            logger.info("wandb: %s", run.url)

    def _init(self, wandb: Any, how: dict[str, str]) -> None:
        self._run = wandb.init(
            id=self.run_id,
            project=self.options.project,
            name=self.options.run_name or self.run_dir.resolve().name,
            dir=str(self.run_dir),
            config=self.config,
            mode=self.mode,
            settings=_settings(wandb, self.mode),
            **how,
        )

    def _send_samples(self) -> None:
        if not self._samples:
            return
        import wandb

        table = wandb.Table(list(SAMPLE_COLUMNS), self._samples, allow_mixed_types=True)
        self._started().log({"samples": table}, step=self._step)
        self._samples = []


def wandb_mode() -> str:
    """Return `online`, `offline` or `disabled`, from the environment alone."""
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        return mode
    allowed = mode not in ("offline", "dryrun")
    return "online" if allowed and os.environ.get("WANDB_API_KEY") else "offline"


def _settings(wandb: Any, mode: str) -> Any:
    """Settings that keep wandb quiet, bounded in time, and away from what is not ours to report."""
    wanted = {
        "silent": True,
        "console": "off",
        "disable_code": True,
        "disable_git": True,  # a remote's address may hold a token
        "x_save_requirements": False,
        "x_disable_stats": mode != "online",  # asks a cloud's metadata address
        "init_timeout": INIT_TIMEOUT_S,
        "finish_timeout": CLOSE_TIMEOUT_S - 2,
    }
    known = wandb.Settings.model_fields  # `finish_timeout` is younger than the others
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
