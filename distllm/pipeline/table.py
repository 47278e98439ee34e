"""The table of a pipeline: what each stage reached, beside what it has to reach.

Each row compares two measurements on the same held-out data. A bar that is missed is shown as missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]

KL_BOUND = 4.0
"""Nats per response that a policy trained against a reward model may be away from its reference.

Set after looking at runs on seed 0: one without enough KL penalty ended at 4.1 and answered worse than before."""


def bars(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return the rows for stage name -> `result.json`."""
    rows: list[Row] = []
    for name, result in results.items():
        metrics = dict(result.get("metrics", {}))
        if not metrics:
            continue
        metrics["by_model"] = float(result.get("reward") == "model")
        kind = result.get("stage", "")
        if name.startswith("control"):
            rows += _control(name, result, results)
        elif kind in _ROWS:
            rows += _ROWS[kind](name, metrics)
    return rows


def _row(
    stage: str,
    metric: str,
    before: float | None,
    after: float | None,
    bar: str = "",
    ok: bool | None = None,
    note: str = "",
) -> Row:
    return {
        "stage": stage,
        "metric": metric,
        "before": before,
        "after": after,
        "bar": bar,
        "ok": ok,
        "note": note,
    }


def _pretrain(name: str, m: Mapping[str, float]) -> list[Row]:
    loss = m["after/loss"]
    note, bar, ok = "", "", None
    if "baseline/unigram" in m:
        limit = 0.75 * m["baseline/unigram"]
        bar, ok = f"<= {limit:.3f} (25% below unigram {m['baseline/unigram']:.3f})", loss <= limit
        best = min((v, k) for k, v in m.items() if k.startswith("baseline/kneser"))
        ahead = "the model" if loss < best[0] else "the n-gram"
        label = best[1].removeprefix("baseline/kneser_ney_")
        note = f"{ahead} is ahead: Kneser-Ney {label}-gram {best[0]:.3f}"
    return [
        _row(name, "held-out nats per token", m["before/loss"], loss, bar, ok, note),
        _row(name, "held-out bits per byte", m["before/bits_per_byte"], m["after/bits_per_byte"]),
    ]


def _sft(name: str, m: Mapping[str, float]) -> list[Row]:
    if "after/exact_match" not in m:
        return [_row(name, "held-out nats per token", m["before/loss"], m["after/loss"])]
    before, after = m["before/exact_match"], m["after/exact_match"]
    ok = after >= 4 * before and after > 0.25
    return [_row(name, "exact match", before, after, "> 25% and >= 4x before", ok, _interval(m))]


def _reward(name: str, m: Mapping[str, float]) -> list[Row]:
    judge = m.get("baseline/likelihood_accuracy")
    accuracy = m["after/accuracy"]
    note = f"95%: {m['after/accuracy_low']:.1%} to {m['after/accuracy_high']:.1%}; chance 50%"
    rows = [
        _row(
            name,
            "pairwise accuracy",
            m["before/accuracy"],
            accuracy,
            "> 75%",
            accuracy > 0.75,
            note,
        )
    ]
    if "after/accuracy_corrupted" in m:
        corrupted = m["after/accuracy_corrupted"]
        rows.append(
            _row(
                name,
                "... on corrupted answers",
                m["before/accuracy_corrupted"],
                corrupted,
                "> 85%",
                corrupted > 0.85,
            )
        )
    if "after/accuracy_sampled" in m:
        share = m["after/share_sampled"]
        rows.append(
            _row(
                name,
                "... on the policy's own wrong answers",
                m["before/accuracy_sampled"],
                m["after/accuracy_sampled"],
                "share >= 50%",
                share >= 0.5,
                f"{share:.0%} of the pairs",
            )
        )
    if judge is not None:
        rows.append(
            _row(
                name,
                "... against the starting model's likelihood",
                judge,
                accuracy,
                f"> {judge:.1%}",
                accuracy > judge,
            )
        )
    length = m["after/length_only_accuracy"]
    rows.append(_row(name, "accuracy of length alone", None, length, "< 60%", length < 0.6))
    rows.append(_row(name, "calibration error (ECE)", m["before/ece"], m["after/ece"]))
    return rows


def _rl(name: str, m: Mapping[str, float]) -> list[Row]:
    before, after = m["before/exact_match"], m["after/exact_match"]
    low, high = m.get("gain/reward_low"), m.get("gain/reward_high")
    known = low is not None and high is not None
    note = f"paired 95%: {low:+.3f} to {high:+.3f}" if known else "too few scores for an interval"
    if "gain/reward" in m:
        note += f" (mean {m['gain/reward']:+.3f})"
    rows = [
        _row(
            name,
            "reward",
            m.get("before/reward"),
            m.get("after/reward"),
            "gain above 0",
            known and low > 0,
            note,
        )
    ]
    needed = -0.02 if m.get("by_model") else 0.10
    rows.append(
        _row(
            name,
            "exact match",
            before,
            after,
            f">= {needed:+.0%} points".replace("%", ""),
            after - before >= needed,
            _interval(m),
        )
    )
    if "after/kl_ref" in m:
        kl = m["after/kl_ref"]
        bar, ok = (f"< {KL_BOUND:g}", kl < KL_BOUND) if m.get("by_model") else ("", None)
        rows.append(_row(name, "KL from the reference, nats per response", 0.0, kl, bar, ok))
    rows.append(
        _row(
            name, "response length, tokens", m["before/response_length"], m["after/response_length"]
        )
    )
    return rows


def _control(
    name: str, result: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """Compare RL with more of the same SFT for at least its wall time."""
    m = result["metrics"]
    rival = next((r for n, r in results.items() if r.get("stage") == "grpo"), None)
    bar, ok, note = "", None, ""
    if rival is not None:
        reached = rival["metrics"]["after/exact_match"]
        ok = reached - m["after/exact_match"] >= 0.05
        bar = f"GRPO ({reached:.1%}) ahead by >= 5 points"
        note = f"{result['wall_s']:.0f} s against GRPO's {rival['wall_s']:.0f} s"
    return [
        _row(name, "exact match", m["before/exact_match"], m["after/exact_match"], bar, ok, note)
    ]


def _interval(m: Mapping[str, float]) -> str:
    return f"95%: {m['after/exact_match_low']:.1%} to {m['after/exact_match_high']:.1%}"


_ROWS = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "ppo": _rl, "grpo": _rl}
