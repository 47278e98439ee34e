"""Decides which plots the report shows for a stage, from the metrics that were logged.

One stage may come from several runs: each run then has a colour of its own. A stage of one run uses the colours to
tell what was measured in training from what was measured on held-out data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from distllm.tracking.report_data import Curve, RunData, StageData
from distllm.tracking.report_plots import NUM_COLORS, Plot, Series, draw, short, smoothed

TITLES = {
    "loss": "Loss",
    "rl/reward_mean": "Reward",
    "rl/kl_ref": "KL to the reference",
    "rl/entropy": "Entropy",
    "rl/response_length": "Response length",
    "rl/clip_fraction": "Tokens clipped",
    "rl/kl": "KL per token, by estimator",
    "rl/truncated": "Responses cut by the length limit",
    "rl/zero_spread": "Groups without spread",
    "rl/explained_variance": "Explained variance of the values",
    "rl/effective_sample_size": "Effective sample size, share of tokens",
    "rl/sampler_mismatch": "Sampler against trainer, |log-ratio| per token",
    "time": "Seconds per step, by phase",
    "eval/exact_match": "Exact match, held out",
    "eval/accuracy": "Pairwise accuracy, held out",
    "eval/bits_per_byte": "Bits per byte, held out",
    "eval/ece": "Calibration error, held out",
    "perf/tokens_per_s": "Tokens per second",
    "train/grad_norm": "Gradient norm",
    "train/lr": "Learning rate",
}
PAIRED = {
    "loss": ("train/loss", "eval/loss"),
    "rl/reward_mean": ("rl/reward_mean", "eval/reward"),
    "rl/kl_ref": ("rl/kl_ref", "eval/kl_ref"),
    "rl/response_length": ("rl/response_length", "eval/response_length"),
}
"""Panels that show a metric of training together with the same thing on held-out data."""
GROUPED = {
    "rl/kl": {"rl/kl_k1": "k1", "rl/kl_k2": "k2", "rl/kl_k3": "k3"},
    "rl/clip_fraction": {"rl/clip_low": "below", "rl/clip_high": "above"},
    "time": {
        "time/sample_s": "sample", "time/reward_s": "reward", "time/prepare_s": "prepare",
        "time/update_s": "update",
    },
}  # fmt: skip
"""Panels of several metrics, each with its label."""
SPREAD = {"rl/reward_mean": "rl/reward_std"}
"""Metric -> what is drawn as a band around it, where no interval was logged."""
RL_SMALL = (
    "rl/kl_ref", "eval/exact_match", "rl/entropy", "rl/response_length", "rl/truncated", "rl/zero_spread",
    "rl/kl", "rl/clip_fraction", "rl/effective_sample_size", "rl/explained_variance", "rl/sampler_mismatch",
    "time",
)  # fmt: skip
SMALL = (
    "eval/exact_match", "eval/accuracy", "eval/bits_per_byte", "eval/ece", "train/grad_norm",
    "perf/tokens_per_s",
)  # fmt: skip
MAX_MORE = 30


@dataclass(slots=True, kw_only=True)
class Panel:
    """One plot with its title and legend."""

    title: str
    plot: Plot
    legend: list[tuple[str, int, str]] = field(default_factory=list)
    """(label, colour, `line` or `dots`)."""


@dataclass(slots=True, kw_only=True)
class Panels:
    """The plots of a stage, by how prominent they are."""

    main: Panel | None
    small: list[Panel]
    more: list[Panel]


Member = tuple[int, RunData, StageData]
"""A stage within a run, and the run's number, from 1, which is its colour."""


def make_panels(members: Sequence[Member], prefix: str, num_runs: int) -> Panels:
    """Draw the plots of one stage.

    Args:
        members: the stage in each run that has it.
        prefix: unique on the page.
        num_runs: number of runs in the report.
    """
    is_rl = any(stage.is_rl for _, _, stage in members)
    names = list(dict.fromkeys(name for _, _, stage in members for name in stage.curves))
    used: set[str] = set()

    def panel(key: str, width: int, height: int) -> Panel | None:
        wanted = GROUPED.get(key) or PAIRED.get(key, (key,))
        series, legend = _series(members, wanted, num_runs)
        if not series:
            return None
        used.update(wanted, [key])
        levels = _levels(members) if key == "loss" and not is_rl else None
        name = f"{prefix}-p{len(used)}"
        plot = draw(series, name=name, width=width, height=height, levels=levels)
        unit = (
            ", nats per token"
            if key == "loss" and members[0][2].kind in ("pretrain", "sft")
            else ""
        )
        return Panel(title=title_of(key) + unit, plot=plot, legend=legend)

    main_key = "rl/reward_mean" if is_rl else "loss"
    main = panel(main_key, 740 if num_runs == 1 else 1124, 300)
    small = [panel(key, 350, 190) for key in (RL_SMALL if is_rl else SMALL)]
    small = [one for one in small if one is not None][: len(RL_SMALL) if is_rl else 3]
    rest = [n for n in names if n not in used and not n.endswith(("_low", "_high"))]
    more = [panel(key, 350, 170) for key in rest[:MAX_MORE]]
    if main is None and small:
        main = small.pop(0)
    return Panels(main=main, small=small, more=[one for one in more if one is not None])


def verdict(run: RunData, stage: StageData) -> str:
    """Say who is ahead on held-out text: the model or the statistical baselines; empty without both."""
    loss = heldout_loss(run, stage)
    if loss is None or not run.baselines:
        return ""
    ranked = sorted(run.baselines.items(), key=lambda item: item[1])
    best, best_loss = ranked[0]
    if loss < best_loss:
        return (
            f"The model is ahead of every statistical model: {loss:.3f} nats per held-out token against "
            f"{best_loss:.3f} of the {baseline_name(best)}, the best of them "
            f"({1 - loss / best_loss:.1%} lower)."
        )
    beaten = [baseline_name(name) for name, value in ranked if loss < value]
    text = (
        f"The {baseline_name(best)} is ahead: {best_loss:.3f} nats per held-out token against "
        f"{loss:.3f} of the model ({loss / best_loss - 1:.1%} higher)."
    )
    return text + (f" The model beats: {', '.join(beaten)}." if beaten else "")


def heldout_loss(run: RunData, stage: StageData) -> float | None:
    """Return the last measured held-out loss in nats per token."""
    curve = stage.curves.get("eval/loss")
    measured = [v for v in curve.values if math.isfinite(v)] if curve else []
    if measured:
        return measured[-1]
    return stage.metrics.get("after/loss", stage.metrics.get("eval/loss"))


def baseline_name(key: str) -> str:
    """Write `kneser_ney_5` or `kn5` as `Kneser-Ney 5-gram`."""
    digits = key.rstrip("0123456789")
    order = key[len(digits) :]
    if order and digits.strip("_-").lower() in ("kn", "kneser_ney"):
        return f"Kneser-Ney {order}-gram"
    return key.replace("_", " ")


def title_of(name: str) -> str:
    """Return the heading of a metric."""
    return TITLES.get(name) or name


def tokens_per_s(stage: StageData) -> float | None:
    """Return the median speed that was logged."""
    curve = stage.curves.get("perf/tokens_per_s")
    values = [v for v in curve.values if math.isfinite(v)] if curve else []
    return median(values) if values else None


def _levels(members: Sequence[Member]) -> dict[str, float] | None:
    """Return the baselines of the runs whose pretraining this is, named in short; those of one run if they agree."""
    found: dict[str, float] = {}
    for number, run, stage in members:
        if stage.kind != "pretrain" or stage.round != 1:
            continue
        for key, value in run.baselines.items():
            name = baseline_name(key).replace("Kneser-Ney ", "KN ")
            if name in found and not math.isclose(found[name], value, rel_tol=1e-6):
                name = f"{name} ({number})"
            found[name] = value
    return found or None


def _series(
    members: Sequence[Member], wanted: Iterable[str], num_runs: int
) -> tuple[list[Series], list[tuple[str, int, str]]]:
    """Return the lines for the metrics `wanted` of every member, and the legend; a mapping names each metric."""
    series, legend = [], []
    labels = wanted if isinstance(wanted, Mapping) else {}
    for number, run, stage in members:
        for place, name in enumerate(wanted, 1):
            curve = stage.curves.get(name)
            if curve is None or not any(math.isfinite(v) for v in curve.values):
                continue
            heldout = name.startswith("eval/")
            color = place if labels else 2 if heldout else 1
            color = (number - 1) % NUM_COLORS + 1 if num_runs > 1 else color
            kind = "held out" if heldout else "sampled" if name.startswith("rl/") else "training"
            kind = labels.get(name, kind)
            label = kind if num_runs == 1 else f"{run.name}, {kind}"
            low, high = (stage.curves.get(f"{name}_{end}") for end in ("low", "high"))
            band = low and high and low.steps == high.steps == curve.steps
            spread = stage.curves.get(SPREAD.get(name, ""))
            if not band and spread and spread.steps == curve.steps and len(members) == 1:
                low, high = _around(curve, spread)
                band = True
            series.append(
                Series(
                    label=label,
                    steps=curve.steps,
                    values=curve.values,
                    color=color,
                    smooth=not heldout,
                    markers=heldout and len(curve.steps) <= 40,
                    dashed=heldout and num_runs > 1,
                    low=low.values if low and band else None,
                    high=high.values if high and band else None,
                )
            )
            legend.append((label, color, "dots" if heldout else "line"))
    return series, legend if len(legend) > 1 else []


def _around(curve: Curve, spread: Curve) -> tuple[Curve, Curve]:
    """Return the curve with the spread taken off and put on, smoothed as the line between them is."""
    middle, width = smoothed(curve.values), smoothed(spread.values)
    pairs = list(zip(middle, width, strict=True))
    return (
        Curve(curve.steps, [m - w for m, w in pairs]),
        Curve(curve.steps, [m + w for m, w in pairs]),
    )


def describe_level(value: float) -> str:
    """Write a metric's value for the tables."""
    if not math.isfinite(value):
        return str(value)
    return short(value) if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
