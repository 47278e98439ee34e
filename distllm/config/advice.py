"""When a run does not fit: the cheapest change of settings that makes it fit.

Every combination of a few settings is forecast with the formulas; of those that fit, the one that costs least time per
step is taken, and among equals the one that changes least.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from distllm import registry
from distllm.config.checks import model_options, rules
from distllm.config.forecast import Forecast, Models, forecast, target_of
from distllm.config.layout import layout_of
from distllm.config.schema import Config
from distllm.engines.cluster import ClusterOptions
from distllm.engines.mesh import mesh_problems

CHECKPOINTING = ("none", "selective", "full")
"""From the fastest to the smallest."""
_CLOSE = 1.005
"""Step times this near to each other count as equal."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A change that makes a run fit."""

    settings: dict[str, Any]
    """Dotted key -> value, as typed on the command line."""
    slowdown: float
    """Predicted step time over that of the settings as they are."""
    forecast: Forecast

    @property
    def text(self) -> str:
        """The settings as they are typed."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


def cheapest_fit(config: Config, models: Models, now: Forecast) -> Advice | None:
    """Find the cheapest change that makes `config` fit its cluster; None when nothing here does.

    More GPUs are asked for only when no other change helps.
    """
    cluster = config.hardware
    if not isinstance(cluster, ClusterOptions) or now.time is None:
        return None
    found = _best(config, models, now, cluster.num_gpus)
    gpus = cluster.num_gpus
    while found is None and gpus < 2**20:
        gpus *= 2
        found = _best(config, models, now, gpus)
    return found


def _best(config: Config, models: Models, now: Forecast, gpus: int) -> Advice | None:
    best: Advice | None = None
    assert now.time is not None
    per_token = now.time.step_s / now.tokens_per_step * now.layout.world_size
    for settings in _candidates(config, gpus):
        changed = with_settings(config, settings)
        if changed is None:
            continue
        found = forecast(changed, models)
        if not found.fits or found.time is None:
            continue
        cost = found.time.step_s / found.tokens_per_step * found.layout.world_size
        advice = Advice(settings, cost / per_token, found)
        if best is None or _rank(advice) < _rank(best):
            best = advice
    return best


def _rank(advice: Advice) -> tuple[float, int]:
    steps = round(advice.slowdown / (_CLOSE - 1))
    return steps, len(advice.settings)


def _candidates(config: Config, gpus: int) -> Iterator[dict[str, Any]]:
    """Yield the settings that differ from `config`, for every combination of what can be changed."""
    now = present(config) | {"hardware.num_gpus": config.hardware.num_gpus}  # type: ignore[attr-defined]
    allowed = rules()["engine.activation_checkpointing"].holds
    micro = now["train.micro_batch_size"]
    values: dict[str, Sequence[Any]] = {
        "hardware.num_gpus": [gpus],
        "engine": [now["engine"], *({"fsdp"} & set(registry.names("engine")) - {now["engine"]})],
        "engine.activation_checkpointing": [
            mode
            for mode in CHECKPOINTING[CHECKPOINTING.index(now["engine.activation_checkpointing"]) :]
            if allowed(mode)
        ],
        "train.micro_batch_size": [micro // 2**i for i in range(12) if micro % 2**i == 0],
        "engine.mesh.tp_size": sorted({1, 2, 4, 8, now.get("engine.mesh.tp_size", 1)}),
        "engine.mesh.dp_replicate": sorted({1, now.get("engine.mesh.dp_replicate", 1)}),
    }
    if "engine.zero_stage" in now:
        values["engine.zero_stage"] = range(now["engine.zero_stage"], 4)
    defaults = {"engine.mesh.tp_size": 1, "engine.mesh.dp_replicate": 1}
    for combination in itertools.product(*values.values()):
        wanted = dict(zip(values, combination, strict=True))
        yield {k: v for k, v in wanted.items() if v != now.get(k, defaults.get(k))}


def present(config: Config) -> dict[str, Any]:
    """Return the settings that can be changed, as they are; those that the engine does not have are left out."""
    engine, mesh = config.engine, getattr(config.engine, "mesh", None)
    found = {
        "engine": engine.name,
        "engine.activation_checkpointing": engine.activation_checkpointing,
        "train.micro_batch_size": config.train.micro_batch_size,
    }
    if hasattr(engine, "zero_stage"):
        found["engine.zero_stage"] = engine.zero_stage
    if mesh is not None:
        found["engine.mesh.tp_size"] = mesh.tp_size
        found["engine.mesh.dp_replicate"] = mesh.dp_replicate
    return found


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config | None:
    """Return a config with `settings` in place; None where they cannot work together."""
    engine = config.engine
    if settings.get("engine", engine.name) != engine.name:
        other = registry.get("engine", settings["engine"]).Options
        shared = {f.name for f in fields(other)} & {f.name for f in fields(engine)} - {"name"}
        engine = other(**{name: getattr(engine, name) for name in shared})
    groups: dict[str, dict[str, Any]] = {
        "engine": {},
        "engine.mesh": {},
        "train": {},
        "hardware": {},
    }
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if group:
            groups[group][name] = value
    if groups["engine.mesh"]:
        if not hasattr(engine, "mesh"):
            return None
        groups["engine"]["mesh"] = replace(engine.mesh, **groups["engine.mesh"])
    if "zero_stage" in groups["engine"] and not hasattr(engine, "zero_stage"):
        return None
    changed = replace(
        config,
        engine=replace(engine, **groups["engine"]),
        train=replace(config.train, **groups["train"]),
        hardware=replace(config.hardware, **groups["hardware"]),
    )
    if layout_problems(changed):
        return None
    unit = (
        changed.train.micro_batch_size * layout_of(changed.engine, target_of(changed).world_size).dp
    )
    return None if changed.train.global_batch_size % unit else changed


def layout_problems(config: Config) -> list[str]:
    """Check that the planned cluster, the mesh, the model and the batch fit together.

    Returns:
        Problems: what is set, the rule with its numbers, what to type instead.
    """
    cluster, engine = config.hardware, config.engine
    if not isinstance(cluster, ClusterOptions) or engine.name == "single":
        return []
    gpus, mesh = cluster.num_gpus, getattr(engine, "mesh", None)
    tp = mesh.tp_size if mesh else 1
    replicas = mesh.dp_replicate if mesh else 1
    if gpus % (tp * replicas):
        return [
            f"engine.mesh: dp_replicate ({replicas}) x tp_size ({tp}) = {tp * replicas} does not divide "
            f"hardware.num_gpus={gpus}. Set hardware.num_gpus to a multiple of {tp * replicas}."
        ]
    problems = mesh_problems(engine, gpus)
    options = model_options(config)
    for name in ("n_heads", "n_kv_heads", "d_ff"):
        count = getattr(options, name, 0)
        if count % tp:
            problems.append(
                f"engine.mesh.tp_size={tp} does not divide arch.{name}={count}: every process gets whole heads and "
                f"equal columns. Set engine.mesh.tp_size to a divisor of {count}."
            )
    if config.train.seq_len % tp:
        problems.append(
            f"engine.mesh.tp_size={tp} does not divide train.seq_len={config.train.seq_len}, which it splits between "
            f"blocks. Set train.seq_len={-(-config.train.seq_len // tp) * tp}."
        )
    return problems
