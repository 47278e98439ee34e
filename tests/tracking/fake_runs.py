"""Writes run directories as a finished pipeline leaves them, with made-up but life-like numbers."""

import json
import math
import random
from pathlib import Path

BASELINES = {
    "unigram": 6.58, "kneser_ney_2": 4.71, "kneser_ney_3": 4.39, "kneser_ney_4": 4.31,
    "kneser_ney_5": 4.30,
}  # fmt: skip
TASKS = [
    ("Copy this: amber river stone", "amber river stone"),
    ("Reverse the word: lantern", "nretnal"),
    ("Sort these words: pear, apple, fig", "apple fig pear"),
    ("What is 17 + 25?", "42"),
    ("How many times does the letter e occur in: steeple", "3"),
    ("Which module documents the function bisect_left?", "bisect"),
    ("Copy this: <b>bold</b> & \"quotes\"", "<b>bold</b> & \"quotes\""),
]  # fmt: skip
CHAIN = [
    ("pretrain", 1), ("sft", 1), ("reward", 1), ("ppo", 1), ("grpo", 1), ("reward", 2), ("ppo", 2),
]  # fmt: skip


def write_pipeline(folder: Path, seed: int = 0, chain=CHAIN, skill: float = 0.0) -> Path:
    """Write a pipeline directory; `skill` moves every curve, so that runs can be told apart."""
    rng = random.Random(seed)
    stages, wall_s = [], 0.0
    for name, round_ in chain:
        dir_ = name if round_ == 1 else f"round_{round_}/{name}"
        stages.append({"name": name, "dir": dir_, "round": round_})
        wall_s += write_stage(folder / dir_, name, round_, rng, skill)
    after = round(4.52 - skill, 3)
    table = [
        row("pretrain", "held-out nats per token", 8.337, after, "<= 4.935", True, "Kneser-Ney 5-gram: 4.300, ahead of the model"),
        row("sft", "exact match", 0.012, 0.412, ">= 0.25", True, "4x the pretrained model's is 0.048"),
        row("reward", "pairwise accuracy", 0.497, 0.871, "> 0.75", True, "95% interval 0.846 to 0.893; ECE 0.031"),
        row("reward", "accuracy on corrupted pairs", 0.5, 0.934, "> 0.85", True, ""),
        row("reward", "length-only classifier", None, 0.541, "< 0.60", True, ""),
        row("ppo", "reward score", -0.31, 1.27, "gain > 0", True, "paired gain 1.58, 95% interval 1.41 to 1.75"),
        row("grpo", "exact match", 0.412, 0.563, ">= 0.512", True, ""),
        row("grpo", "lead over SFT continued", 0.448, 0.563, ">= 0.05", True, "control: SFT for GRPO's wall time"),
        row("ppo", "exact match, exact-match reward", 0.412, 0.471, ">= 0.492", False, "missed by 0.021"),
    ]  # fmt: skip
    record = {
        "name": folder.name, "seed": seed, "stages": stages, "table": table,
        "baselines": BASELINES, "wall_s": wall_s + 11,
    }  # fmt: skip
    (folder / "pipeline.json").write_text(json.dumps(record))
    return folder


def row(stage, metric, before, after, bar, ok, note):
    """Return one row of the stage table."""
    return {
        "stage": stage, "metric": metric, "before": before, "after": after, "bar": bar, "ok": ok,
        "note": note,
    }  # fmt: skip


def write_stage(folder: Path, name: str, round_: int, rng: random.Random, skill: float) -> float:
    """Write one train run directory and return its wall time."""
    folder.mkdir(parents=True)
    is_rl = name in ("ppo", "grpo")
    num_steps = {"pretrain": 600, "sft": 300, "reward": 200}.get(name, 60)
    every = 2 if num_steps > 100 else 1
    start, end = {"pretrain": (8.34, 4.45), "sft": (3.1, 0.55), "reward": (0.69, 0.31)}.get(
        name, (0.02, -0.01)
    )
    rows = []
    for step in range(0, num_steps + 1, every):
        progress = step / num_steps
        fall = math.exp(-6 * progress) * 0.8 + 0.2 * (1 - progress)
        loss = end - skill + (start - end) * fall
        metrics = {"step": step, "stage": name}
        if step:
            metrics |= {
                "train/loss": loss + rng.gauss(0, 0.03 * abs(start - end) + 0.02),
                "train/grad_norm": abs(rng.gauss(0.9, 0.2)) + 2 * fall,
                "train/lr": 1e-3 * min(1, step / 30) * (1 if progress < 0.5 else 2 - 2 * progress),
                "perf/tokens_per_s": rng.gauss(4100, 120),
                "perf/step_s": rng.gauss(0.5, 0.02),
                "mem/peak_gib": 1.1,
            }
        if step and is_rl:
            metrics |= (
                {
                    "rl/reward_mean": -0.3 + 1.6 * (1 - fall) + skill + rng.gauss(0, 0.12),
                    "rl/kl_ref": 0.09 * progress + abs(rng.gauss(0, 0.006)),
                    "rl/entropy": 0.9 - 0.45 * progress + rng.gauss(0, 0.02),
                    "rl/response_length": 14 + 3 * progress + rng.gauss(0, 0.7),
                    "rl/clip_fraction": 0.02 + 0.06 * progress + abs(rng.gauss(0, 0.012)),
                    "rl/reward_std": 0.8 - 0.3 * progress + rng.gauss(0, 0.03),
                }
                | {
                    f"rl/kl_{kind}": (0.09 * progress + abs(rng.gauss(0, 0.004))) / 15
                    for kind in ("k1", "k2", "k3")
                }
                | {
                    f"time/{name}_s": rng.gauss(mean, 0.03)
                    for name, mean in (
                        ("sample", 0.9),
                        ("reward", 0.1),
                        ("prepare", 0.2),
                        ("update", 0.7),
                    )
                }
                | {
                    "rl/clip_low": 0.01 + 0.03 * progress,
                    "rl/clip_high": 0.01 + 0.02 * progress,
                    "rl/truncated": 0.05,
                    "rl/zero_spread": 0.3 + 0.5 * progress,
                    "rl/effective_sample_size": 0.97,
                    "rl/sampler_mismatch": 2e-7,
                    "rl/sampler_kl": 0.0,
                }
            )
        if step % (num_steps // 6) == 0:
            metrics |= heldout(name, fall, loss, skill)
        rows.append(metrics)
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "samples.jsonl", samples(name, rng))
    wall_s = {"pretrain": 118.0, "sft": 52.0, "reward": 31.0}.get(name, 44.0) + rng.random()
    first, last = heldout(name, 1.0, start, skill), heldout(name, 0.0, end - skill, skill)
    result = {
        "name": name, "stage": name, "steps": num_steps, "wall_s": wall_s, "num_parameters": 5_248_512,
        "metrics": {f"before/{k.removeprefix('eval/')}": v for k, v in first.items()}
        | {f"after/{k.removeprefix('eval/')}": v for k, v in last.items()},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    parent = (
        None if name == "pretrain" else {"dir": "runs/demo/sft/model", "sha256": "9f8e7d6c" * 8}
    )
    lineage = {
        "stage": name, "round": round_, "parent": parent, "seed": 0,
        "data": {"name": "stdlib" if name == "pretrain" else "skills", "fingerprint": "3c5a" * 16},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "distllm": "0.1"},
    }  # fmt: skip
    if is_rl:
        lineage["parents"] = {
            "policy": parent, "reward": {"dir": "runs/demo/reward/model", "sha256": "12ab" * 16},
        }  # fmt: skip
    (folder / "lineage.json").write_text(json.dumps(lineage))
    (folder / "config.yaml").write_text(f"stage:\n  name: {name}\noptim:\n  lr: 0.001\n")
    return wall_s


def heldout(name: str, fall: float, loss: float, skill: float) -> dict[str, float]:
    """Return what is measured on held-out data when a share `fall` of the way is still to go."""
    if name == "pretrain":
        return {"eval/loss": loss + 0.07, "eval/bits_per_byte": (loss + 0.07) * 0.52}
    if name == "reward":
        accuracy = 0.87 - 0.37 * fall
        return {
            "eval/loss": loss + 0.04, "eval/accuracy": accuracy, "eval/accuracy_low": accuracy - 0.025,
            "eval/accuracy_high": accuracy + 0.025, "eval/accuracy_corrupted": accuracy + 0.05,
            "eval/ece": 0.03 + 0.1 * fall, "eval/num_pairs": 512.0,
        }  # fmt: skip
    top, bottom = (0.41, 0.01) if name == "sft" else (0.56, 0.41)
    share = top - (top - bottom) * fall + skill / 4
    found = {
        "eval/exact_match": share, "eval/exact_match_low": share - 0.04,
        "eval/exact_match_high": share + 0.04, "eval/exact_match/copy": min(1, share * 1.6),
        "eval/exact_match/reverse": share * 0.4,
    }  # fmt: skip
    return found | (
        {"eval/loss": loss + 0.05} if name == "sft" else {"eval/reward": 1.3 - 1.6 * fall}
    )


def samples(name: str, rng: random.Random) -> list[dict]:
    """Return the texts of a stage."""
    if name == "pretrain":
        prompt = "Return the absolute value of the argument. The argument may be an"
        return [
            {"step": 0, "stage": name, "when": "before", "prompt": prompt, "response": " ycl\ufffdperties(' Raisthe unta  whichaw ,_"},
            {"step": 600, "stage": name, "when": "after", "prompt": prompt, "response": " integer or a floating-point number. If the argument is not a number,\nthe method is called with a single argument."},
        ]  # fmt: skip
    found = []
    for prompt, answer in TASKS:
        wrong = answer[:-1] + rng.choice("xyz")
        common = {"stage": name, "prompt": prompt}
        if name == "reward":
            for when, scores in (("before", (0.01, 0.02)), ("after", (1.9, -1.2))):
                found.append({
                    **common, "step": 0, "when": when, "chosen": answer, "rejected": wrong,
                    "chosen_score": scores[0], "rejected_score": scores[1], "kind": "sampled",
                })  # fmt: skip
            continue
        before = "the the module the" if name == "sft" else wrong
        after = answer if rng.random() < 0.7 else wrong
        found.append({**common, "step": 0, "when": "before", "response": before, "answer": answer})
        found.append({**common, "step": 60, "when": "after", "response": after, "answer": answer})
        if name != "sft":
            found += [
                {**common, "step": step, "when": "train", "response": f"{after} {step}" * (1 + step // 40), "reward": step / 60, "tokens": step, "answer": answer, "finish_reason": "length" if step > 50 else "stop"}
                for step in range(1, 61)
            ]  # fmt: skip
    return found


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
