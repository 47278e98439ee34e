"""Turns what runs recorded into the rows of the report's tables: measurements, samples, lineage. Text only, unescaped."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distllm.tracking.progress import duration
from distllm.tracking.report_data import RunData, StageData, number
from distllm.tracking.report_panels import describe_level, tokens_per_s
from distllm.tracking.report_plots import short

NUM_SAMPLES_OPEN = 5
MAX_SAMPLES = 40
MAX_TEXT = 4000
MAX_ROLLOUTS = 4000
"""Texts sampled while training that the page holds; of more, some steps are left out."""
MAX_ROLLOUT_TEXT = 1200
NAMES = {
    "ece": "calibration error (ECE)",
    "kl_ref": "KL to the reference",
    "num_pairs": "pairs",
    "loss": "loss (nats)",
}
"""Metrics whose names need words; the others only lose their underscores."""


def stage_table(run: RunData) -> list[dict[str, Any]]:
    """Return the rows of the pipeline's own table, every value as text."""
    rows = []
    for row in run.table:
        rows.append(
            {
                "stage": text(row.get("stage")),
                "metric": text(row.get("metric")),
                "before": value_text(row.get("before")),
                "after": value_text(row.get("after")),
                "bar": value_text(row.get("bar")),
                "ok": row.get("ok") if isinstance(row.get("ok"), bool) else None,
                "note": text(row.get("note")),
            }
        )
    return rows


def facts(stage: StageData) -> list[tuple[str, str]]:
    """Return what a stage was: length, time, size, speed."""
    steps = number(stage.result.get("steps")) or max(
        (curve.steps[-1] for curve in stage.curves.values() if curve.steps), default=None
    )
    wall_s, size = number(stage.result.get("wall_s")), number(stage.result.get("num_parameters"))
    speed = tokens_per_s(stage)
    found = [
        ("Steps", f"{steps:,.0f}" if steps else ""),
        ("Time", duration(wall_s) if wall_s is not None else ""),
        ("Parameters", short(size) if size else ""),
        ("Tokens per second", f"{speed:,.0f}" if speed else ""),
    ]
    return [(name, shown) for name, shown in found if shown]


Measured = tuple[str, str]
"""A value and its interval, both as text; empty when unknown."""


def measurements(stage: StageData, *, parts: bool = False) -> list[tuple[str, Measured, Measured]]:
    """Return (metric, before, after) of what was measured at the stage's ends.

    Args:
        stage: the stage.
        parts: the metrics of parts (`exact_match/reverse`) instead of those of the whole, if there are both.
    """
    metrics = stage.metrics
    wholes: dict[str, bool] = {}
    for key in metrics:
        when, _, name = key.partition("/")
        name = name if when in ("before", "after") and name else key.removeprefix("eval/")
        if not name.endswith(("_low", "_high")):
            wholes[name] = "/" not in name.removeprefix("gain/")
    has_whole = any(wholes.values())
    names = [name for name, whole in wholes.items() if (whole or not has_whole) != parts]
    rows = []
    for name in names:
        before = _with_interval(metrics, f"before/{name}")
        after = _with_interval(metrics, f"after/{name}")
        plain = _with_interval(metrics, name if name in metrics else f"eval/{name}")
        title = NAMES.get(name, name.replace("gain/", "gain in ").replace("_", " "))
        rows.append((title, before, after if after[0] else plain))
    return rows


def sample_rows(stage: StageData) -> list[dict[str, Any]]:
    """Return one row per prompt with the texts before and after the stage."""
    rows: dict[str, dict[str, Any]] = {}
    for record in stage.samples:
        when = record.get("when")
        if when not in ("before", "after") or "response" not in record:
            continue
        prompt = text(record.get("prompt"))
        row = rows.setdefault(prompt, {"prompt": prompt, "answer": None})
        answer = record.get("answer")
        row["answer"] = row["answer"] if answer is None else text(answer)
        row[when] = _sample_cell(record)
    for row in rows.values():
        row.setdefault("before", None)
        row.setdefault("after", None)
    return list(rows.values())[:MAX_SAMPLES]


def pair_rows(stage: StageData) -> list[dict[str, Any]]:
    """Return the preference pairs among the samples, with the scores that the reward model gave them."""
    rows = []
    for record in stage.samples:
        if "chosen" in record and "rejected" in record:
            scores = [number(record.get(f"{side}_score")) for side in ("chosen", "rejected")]
            known = None not in scores
            rows.append(
                {
                    "prompt": text(record.get("prompt")),
                    "chosen": text(record["chosen"]),
                    "rejected": text(record["rejected"]),
                    "scores": ["" if s is None else f"{s:+.2f}" for s in scores],
                    "right": scores[0] > scores[1] if known else None,  # type: ignore[operator]
                    "kind": text(record.get("kind")),
                    "when": text(record.get("when")),
                }
            )
    last = [row for row in rows if row["when"] == "after"] or rows
    return last[:MAX_SAMPLES]


def rollout_rows(stage: StageData) -> list[dict[str, Any]]:
    """Return the texts sampled while training, oldest first, for the page's script to browse; few numbers, no markup."""
    found = [
        r
        for r in stage.samples
        if r.get("when", "train") not in ("before", "after") and "response" in r
    ]
    stride = -(-len(found) // MAX_ROLLOUTS) if found else 1
    steps = {
        step: i for i, step in enumerate(dict.fromkeys(value_text(r.get("step")) for r in found))
    }
    rows = []
    for record in found:
        step, cell = value_text(record.get("step")), _sample_cell(record)
        if steps[step] % stride and steps[step] != len(steps) - 1:
            continue  # whole steps are left out, never a part of one
        rows.append(
            {
                "step": step,
                "prompt": text(record.get("prompt"))[:MAX_ROLLOUT_TEXT],
                "response": cell["response"][:MAX_ROLLOUT_TEXT],
                "answer": text(record.get("answer"))[:MAX_ROLLOUT_TEXT],
                "right": cell["right"],
                "reward": number(record.get("reward")),
                "tokens": number(record.get("tokens")),
                "cut": record.get("finish_reason") == "length",
            }
        )
    return rows


def lineage_rows(run: RunData) -> list[dict[str, str]]:
    """Return where each stage's model and data come from."""
    rows = []
    for stage in run.stages:
        lineage = stage.lineage
        data = lineage.get("data")
        data = data if isinstance(data, dict) else {}
        rows.append(
            {
                "stage": stage_title(stage),
                "parents": _parents(lineage),
                "data": " ".join(text(data.get(k)) for k in ("name", "path") if data.get(k)),
                "fingerprint": text(data.get("fingerprint"))[:12],
                "full": text(data.get("fingerprint")),
                "seed": value_text(lineage.get("seed", run.seed)),
            }
        )
    return rows


def versions(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """Return library -> version over all stages; several versions are listed with commas."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for stage in run.stages:
            listed = stage.lineage.get("versions")
            for name, version in (listed if isinstance(listed, dict) else {}).items():
                found.setdefault(str(name), {})[text(version)] = None
    return [(name, ", ".join(seen)) for name, seen in sorted(found.items())]


def stage_title(stage: StageData) -> str:
    """Name a stage for people."""
    known = {"sft": "SFT", "ppo": "PPO", "grpo": "GRPO", "dpo": "DPO"}
    name = "Reward model" if stage.name == "reward" else stage.name
    words = [known.get(word, word) for word in name.replace("_", " ").split()] or [name]
    name = " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])
    return f"{name} · round {stage.round}" if stage.round > 1 else name


def text(value: Any) -> str:
    """Write anything as text: messages as lines (a single one without its role), structures as JSON, what is too long cut."""
    if value is None:
        return ""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and "content" in m for m in value)
    ):
        roles = [f"{m.get('role', '')}: " if len(value) > 1 else "" for m in value]
        value = "\n".join(f"{role}{m['content']}" for role, m in zip(roles, value, strict=True))
    elif isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    value = str(value)
    return value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]} … ({len(value):,} characters)"


def value_text(value: Any) -> str:
    """Write a table value: numbers in few digits, anything else as text."""
    if isinstance(value, float):
        return describe_level(value)
    return text(value)


def _sample_cell(record: Mapping[str, Any]) -> dict[str, Any]:
    answer, reward = record.get("answer"), number(record.get("reward"))
    response = text(record.get("response"))
    shown = response.rstrip("\n")
    return {
        "response": shown if shown.strip() else "(white space)" if response else "(empty)",
        "right": None if answer is None else response.strip() == text(answer).strip(),
        "reward": None if reward is None else f"{reward:+.3g}",
    }


def _with_interval(metrics: Mapping[str, float], name: str) -> Measured:
    if name not in metrics:
        return "", ""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    if low is None or high is None:
        return describe_level(metrics[name]), ""
    return describe_level(metrics[name]), f"{low:.3g} to {high:.3g}"


def _parents(lineage: Mapping[str, Any]) -> str:
    """Write the parent models with the last parts of their folders and the start of their hashes."""
    parents = lineage.get("parents")
    if not isinstance(parents, dict) or not parents:
        parents = {"": lineage["parent"]} if lineage.get("parent") else {}
    shown = []
    for role, parent in parents.items():
        if isinstance(parent, dict):
            folder = Path(str(parent.get("dir") or parent.get("name") or parent.get("stage") or ""))
            name = "/".join(part for part in folder.parts[-2:] if part != "model")
            sha = parent.get("sha256") or parent.get("fingerprint")
            parent = f"{name} ({str(sha)[:8]})" if sha else name
        shown.append(f"{role}: {parent}" if role and len(parents) > 1 else text(parent))
    return "\n".join(shown) or "from scratch"
