"""One stage from start to finish: build, resume, train, evaluate, export, and leave a record of where it came from.

What surrounds it (processes, lock, logs) is in `session.py`.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.arch.adapter import merged
from distllm.arch.io import save_model
from distllm.config.checks import check_training
from distllm.config.flops import model_flops
from distllm.config.footprint import build_meta
from distllm.config.schema import Config, supervised_stages, to_dict
from distllm.engines import collectives
from distllm.engines.base import Engine
from distllm.engines.hardware import tune_cpu
from distllm.engines.peak import measured_peak, peak_flops_per_s
from distllm.engines.processes import note_step, phase
from distllm.errors import CheckpointError
from distllm.pipeline import reinforcement, supervised
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.lineage import describe_lineage, describe_origin, model_hash
from distllm.pipeline.session import leave_stopped, session
from distllm.tracking.base import Tracker, make_trackers
from distllm.tracking.progress import progress
from distllm.tracking.watch import Watch
from distllm.train.checkpoint import Checkpoints
from distllm.train.files import atomic_write_json, free_bytes
from distllm.train.intervals import paired_interval
from distllm.train.loop import Loop
from distllm.train.meters import Meters
from distllm.train.rng import seed_all
from distllm.train.signals import StopFlag
from distllm.train.state import RunState

_log = logging.getLogger("distllm")


@dataclass(slots=True)
class StageResult:
    """How a stage ended."""

    finished: bool
    """False when a signal stopped it after a clean save; start it again to go on."""
    run_dir: Path
    metrics: dict[str, Any]
    """`before/...` and `after/...`; empty when unfinished."""


def run_stage(config: Config, stop: StopFlag | None = None) -> StageResult:
    """Run the stage that `config` describes, or go on with it where its run directory stands. All ranks take part.

    Raises:
        UserError: something in the configuration, the data, the directory or the machine is not as it must be.
        OtherRankError, LostRankError: another rank failed or is gone.
    """
    if stop is None:
        with StopFlag() as stop:
            return run_stage(config, stop)
    check_training(config)
    with session(config) as folder:
        done = collectives.from_main(lambda: read_result(folder))
        if done is not None and done["steps"] >= config.train.max_steps:
            _log.info("%s is complete (%d steps).", folder, done["steps"])
            return StageResult(True, folder, done["metrics"])
        threads = tune_cpu(config.hardware)
        seed_all(config.run.seed, collectives.rank())
        with phase("build"):
            builder = Builder(config, folder)
            is_rl = config.stage.name not in supervised_stages()
            parts = (reinforcement if is_rl else supervised).build(builder)
        first = parts.engines[parts.trained[0]]
        _log.info(
            "%s: %s on %s, %s, processes: %d, threads each: %d.",
            config.stage.name,
            config.arch.name,
            first.device,
            str(first.dtype).removeprefix("torch."),
            first.ranks.world_size,
            threads,
        )
        if first.attention is not None:
            _log.info("Attention: %s: %s.", first.attention.name, first.attention.reason)
        tracker = make_trackers(config.tracking, folder, first.ranks.is_main, to_dict(config))
        try:
            return _train(config, folder, builder, parts, tracker, stop)
        except Exception as error:
            if disk_is_full(error):
                raise CheckpointError(
                    f"The disk of {folder} is full ({free_bytes(folder)} bytes free): {error}. The last "
                    "checkpoint is intact; make room, then start again to go on from it."
                ) from error
            raise
        finally:
            tracker.close()
            parts.close()
            for engine in parts.engines.values():
                engine.close()


def _train(
    config: Config,
    folder: Path,
    builder: Builder,
    parts: Parts,
    tracker: Tracker,
    stop: StopFlag,
) -> StageResult:
    stage = config.stage.name
    started = time.monotonic()
    notes: dict[str, Any] = {"before": None, "train_s": 0.0}
    checkpoints = Checkpoints(
        folder / "checkpoints",
        config.train.keep_last,
        background=config.train.async_save,
        wait_s=config.engine.long_timeout_s,
        fallback=config.train.checkpoint_fallback,
    )
    checkpoints.clean()
    trained = {role: parts.engines[role] for role in parts.trained}
    with phase("load"):
        origin = collectives.from_main(lambda: describe_origin(builder))
    state = RunState(
        checkpoints,
        trained,
        tracker.state,
        notes,
        origin,
        config.train.allow_other_data,
        config.run.seed,
    )
    main = trained[parts.trained[0]]
    watch = Watch(tracker, is_main=main.ranks.is_main, max_steps=config.train.max_steps)

    def measure(when: str, step: int) -> dict[str, Any]:
        with phase("evaluation"):
            metrics, samples = parts.evaluate()
        for record in samples:
            tracker.sample({"step": step, "stage": stage, "when": when, **record})
        if when != "train":  # the loop writes its own lines
            watch.log(step, {"stage": stage, **_scalars(metrics)})
        return metrics

    def save(loop: Loop) -> None:
        notes["train_s"] = before_s + time.monotonic() - started
        state.save(loop)

    def stop_requested() -> bool:
        note_step(loop.step + 1)  # the loop asks before each step
        # A failed save in the background stops the run too: the last save, which all ranks make, says why.
        return collectives.any_true(stop.requested or checkpoints.has_failed)

    def roll_back(loop: Loop) -> bool:
        count, failed_at = loop.num_rollbacks + 1, loop.step + 1
        if count > config.train.max_rollbacks:
            return False
        checkpoints.wait()
        _, handed_out = loop.source.state()
        tracked = state.restore(loop)
        if tracked is None:
            return False
        loop.source.pass_over(handed_out)
        loop.num_rollbacks = count
        tracker.restore(tracked, loop.step)
        bar.advance(loop.step - failed_at + 1)
        _log.warning(
            "Step %d was not finite once too often: back to step %d, without the data since (rollback %d of %d).",
            failed_at,
            loop.step,
            count,
            config.train.max_rollbacks,
        )
        return True

    loop = Loop(
        options=config.train,
        stage=stage,
        source=parts.source,
        log=watch.log,
        evaluate=lambda step: _scalars(measure("train", step)),
        save=save,
        stop_requested=stop_requested,
        roll_back=roll_back,
        progress=lambda step, shown: bar.advance(1, **_shown(shown)),
    )
    model: Any = main.model
    tracked = state.restore(loop)
    if config.adapter.name != "none":
        _check_base(config, notes)
    _meter_flops(config, trained, notes, loop.meters)
    tracker.restore(tracked or {}, loop.step)
    watch.recall(folder / "metrics.jsonl")
    parts.connect(tracker, loop.stop_requested)
    before_s = notes["train_s"]
    if notes["before"] is None:
        measured = measure("before", 0)
        with phase("evaluation"):
            notes["before"] = measured | parts.baselines()
    else:
        _log.info("Going on from step %d.", loop.step)

    gc.enable()  # the command line pauses it while everything is imported and built
    shown = {"start": loop.step, "is_main": main.ranks.is_main}
    with progress(config.train.max_steps, stage, **shown) as bar:
        finished = loop.run()
        with phase("save"):
            checkpoints.wait()
    if not finished:
        leave_stopped(folder, loop.step)
        _log.info("Stopped after step %d; start again with the same run.dir to go on.", loop.step)
        return StageResult(False, folder, {})

    parts.finish()
    metrics = summarise(notes["before"], measure("after", loop.step))
    result = {
        "name": folder.name,
        "stage": stage,
        "steps": loop.step,
        "metrics": metrics,
        "wall_s": notes["train_s"],
        "num_parameters": main.num_parameters,
        **parts.facts,
    }
    with phase("export"):
        weights = merged(model, main.export())
        lineage = describe_lineage(config, origin, parts.parents)
        collectives.on_main(
            lambda: _export(folder, lineage, builder, parts, model, weights, result)
        )
    return StageResult(True, folder, metrics)


def _check_base(config: Config, notes: dict[str, Any]) -> None:
    """Refuse to go on beside other weights than the adapter was trained with: a checkpoint does not hold them."""
    assert config.model is not None
    now = collectives.from_main(lambda: model_hash(Path(config.model)))
    if notes.setdefault("base_sha256", now) != now:
        raise CheckpointError(
            f"model={config.model} has changed since this run began, and its adapter was trained beside the weights that "
            "were there. Put them back, or start over with another run.dir."
        )


def _export(
    folder: Path,
    lineage: dict[str, Any],
    builder: Builder,
    parts: Parts,
    model: Any,
    weights: dict[str, Any],
    result: dict[str, Any],
) -> None:
    """Write the model, where it comes from, and, last, what it reached."""
    save_model(model, parts.tokenizer, folder / "model", state=weights, end_ids=builder.end_ids)
    atomic_write_json(folder / "lineage.json", lineage)
    atomic_write_json(folder / "result.json", result)


def _meter_flops(
    config: Config, engines: dict[str, Engine], notes: dict[str, Any], meters: Meters
) -> None:
    """Tell the meters what a token costs and what all processes together could compute."""
    for role, engine in engines.items():
        model: Any = engine.model
        adapter = None if config.adapter.name == "none" else config.adapter
        meters.costs[role] = model_flops(build_meta(model.options, model.head_name), adapter)
    first = next(iter(engines.values()))
    known = notes.get("peak_flops_per_s", {})
    source, rate = peak_flops_per_s(config.hardware, first.device, first.dtype, known)
    own, reached = measured_peak(first.device, first.dtype, {source: rate, **known})
    notes["peak_flops_per_s"] = {source: rate, own: reached}
    meters.peak_flops_per_s = rate * first.ranks.world_size
    meters.measured_flops_per_s = reached * first.ranks.world_size


def disk_is_full(error: Exception) -> bool:
    """Recognise a full disk or quota, whichever library reports it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and "os error 28" in str(error)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Read what a finished stage reported; None when it has not finished."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def summarise(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Merge two evaluations: `before/x`, `after/x`, and paired intervals of per-sample rewards."""
    merged = {k: v for k, v in before.items() if k.startswith("baseline/")}
    for when, metrics in (("before", before), ("after", after)):
        for key, value in _scalars(metrics).items():
            if key.startswith("eval/"):
                merged[f"{when}/{key.removeprefix('eval/')}"] = value
    if "eval/reward" in before and "eval/reward" in after:
        mean, low, high = paired_interval(before["eval/rewards"], after["eval/rewards"])
        merged["gain/reward"] = mean
        if math.isfinite(high - low):  # one prompt has no spread, so no interval
            merged |= {"gain/reward_low": low, "gain/reward_high": high}
    return merged


def _scalars(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if not isinstance(v, list)}


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    names = {
        "train/loss": "loss",
        "rl/reward_mean": "reward",
        "rl/kl_ref": "kl",
        "rl/entropy": "entropy",
        "rl/response_length": "length",
    }
    return {short: metrics[name] for name, short in names.items() if name in metrics}
