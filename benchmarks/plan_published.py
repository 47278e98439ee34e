"""Predicted against published: memory and tokens per second of training runs that others have measured on many GPUs.

The five numbers of `distllm.config.step_time.Efficiency` are fitted to the five runs marked `calibrates` in
`published_runs.py`; the error on all the others is what the time model is worth. Memory has nothing to fit. Written to
`plan_published.json` beside this file and to `docs/plan.md`; `--quick` writes nothing and fails if the numbers in the
code are not those of the fit. Starts nothing and needs no GPU.

The published programs differ from ours in three ways that the formulas are told about: they keep the residual stream in
bf16, torchtitan's selective checkpointing keeps every second product only, and without a chunked loss all logits exist
at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from published_runs import HARDWARE, MODELS, PUBLISHED_PARAMETERS, RUNS, Run

from distllm.arch.decoder import DecoderOptions
from distllm.config.activations import MicroBatch, moments
from distllm.config.compose import compose
from distllm.config.layout import Layout, stage_layers
from distllm.config.memory import in_flight, rank_memory
from distllm.config.shapes import ModelShape, shape_of_model
from distllm.config.step_time import Efficiency, step_time
from distllm.engines.cluster import ClusterOptions

ROOT = Path(__file__).parent.parent
DATASHEET = 989e12
"""Dense bf16 FLOP/s of an H100, which published MFUs divide by."""
START = Efficiency(matmul=0.75, fp8=0.6, attention=0.4, traffic=4.0, links=0.7)
"""Where the fit begins, and what it leans to, weakly, where the five runs leave it free."""
LEANING = 0.02
HALVES = (0.365, 27648 / 47104)
"""Where every second product of a Llama 3 8B block is repeated: share of the operations repeated, of results kept."""


@dataclass(frozen=True, slots=True)
class Case:
    """A published run in the terms of the formulas."""

    shape: ModelShape
    work: MicroBatch
    layout: Layout
    cluster: ClusterOptions


def case_of(run: Run, shapes: dict[str, ModelShape], base: ClusterOptions) -> Case:
    """Translate a published run."""
    given: dict[str, Any] = {"engine": "fsdp", "zero_stage": 3} | run.layout
    shard = run.gpus // given.get("tp", 1) // given.get("pp", 1)
    layout = Layout(**{"dp_shard": shard} | given)
    work = MicroBatch(
        batch=run.micro,
        seq=run.seq,
        element=2,
        packed=False,
        on_cpu=False,
        checkpointing=run.checkpointing,
        compiled=run.compiled,
        casts_blocks=False,
        tp=layout.tp,
        stream=2,
        selected=HALVES[1],
    )
    cluster = replace(base, num_gpus=run.gpus, **HARDWARE[run.hardware])
    return Case(shapes[run.model], work, layout, cluster)


def predicted_rate(run: Run, case: Case, efficiency: Efficiency) -> float:
    """Return tokens per second and GPU."""
    time = step_time(
        case.shape,
        case.work,
        case.layout,
        run.accum,
        case.cluster,
        fp8=run.fp8,
        recomputed_matmuls=HALVES[0],
        efficiency=efficiency,
    )
    return run.micro * run.seq * run.accum * case.layout.dp / time.step_s / run.gpus


def published_rate(run: Run, shape: ModelShape) -> float:
    """Return tokens per second and GPU, from the MFU where no rate is published."""
    if run.tokens_per_s is not None:
        return run.tokens_per_s
    assert run.mfu is not None
    attention = 4 * shape.n_layers * run.seq * shape.q_width
    return run.mfu * DATASHEET / (3 * (2 * shape.multiplied + attention))


def predicted_gib(run: Run, case: Case) -> float:
    """Return the peak of one GPU, with all logits at once at the loss."""
    layers = stage_layers(case.shape, case.layout) * in_flight(case.layout, run.accum)
    logits = int(run.logit_bytes * case.work.tokens * case.shape.vocab_size / case.layout.tp)
    found = [
        replace(moment, logits=logits) if moment.name.startswith("loss") else moment
        for moment in moments(replace(case.shape, n_layers=layers), case.work)
    ]
    memory = rank_memory(case.shape, case.work, case.layout, run.accum, moments=found)
    return memory.peak / 2**30


def fit(runs: Sequence[Run], cases: Sequence[Case]) -> Efficiency:
    """Fit the five numbers to `runs` by least squares of the logarithms (Gauss and Newton)."""

    def misses(logs: torch.Tensor) -> torch.Tensor:
        efficiency = _efficiency(logs.exp().tolist())
        ratios = [
            predicted_rate(run, case, efficiency) / published_rate(run, case.shape)
            for run, case in zip(runs, cases, strict=True)
        ]
        leaning = LEANING * (logs - start)
        return torch.cat((torch.tensor(ratios, dtype=torch.float64).log(), leaning))

    start = torch.tensor(astuple(START), dtype=torch.float64).log()
    logs = start.clone()
    for _ in range(40):
        slopes = _slopes(misses, logs)
        step = torch.linalg.lstsq(slopes, -misses(logs)[:, None]).solution[:, 0]
        logs = logs + step.clamp(-0.3, 0.3)
    return _efficiency([round(x, 3) for x in logs.exp().tolist()])


def _efficiency(numbers: Sequence[float]) -> Efficiency:
    return Efficiency(**{f.name: n for f, n in zip(fields(Efficiency), numbers, strict=True)})


def _slopes(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    step, here = 1e-4, function(at)
    return torch.stack(
        [(function(at + step * e) - here) / step for e in torch.eye(len(at), dtype=at.dtype)], dim=1
    )


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Predict all runs; return everything that is reported."""
    base: Any = compose(["hardware=8xh100"]).hardware
    shapes = {name: shape_of_model(DecoderOptions(**fields)) for name, fields in MODELS.items()}
    cases = [case_of(run, shapes, base) for run in runs]
    chosen = [i for i, run in enumerate(runs) if run.calibrates]
    efficiency = fit([runs[i] for i in chosen], [cases[i] for i in chosen])
    rows = []
    for run, case in zip(runs, cases, strict=True):
        rate, known = predicted_rate(run, case, efficiency), published_rate(run, case.shape)
        row = {
            "source": run.source,
            "model": run.model,
            "gpus": run.gpus,
            "hardware": run.hardware,
            "seq": run.seq,
            "micro": run.micro,
            "accum": run.accum,
            "how": _how(run),
            "tokens_per_s": {"published": round(known), "predicted": round(rate)},
            "rate_error": round(rate / known - 1, 4),
            "step_time_error": round(known / rate - 1, 4),
            "calibrates": run.calibrates,
            "note": run.note,
        }
        if run.memory_gib is not None:
            gib = predicted_gib(run, case)
            row["gib"] = {"published": run.memory_gib, "predicted": round(gib, 1)}
            row["memory_error"] = round(gib / run.memory_gib - 1, 4)
        rows.append(row)
    others = [abs(row["step_time_error"]) for row in rows if not row["calibrates"]]
    memory = [abs(row["memory_error"]) for row in rows if "memory_error" in row]
    parameters = {
        name: round(shape.parameters / PUBLISHED_PARAMETERS[name] - 1, 4)
        for name, shape in shapes.items()
    }
    return {
        "efficiency": asdict(efficiency),
        "rows": rows,
        "summary": {
            "step time": _summary(others, 0.2),
            "memory": _summary(memory, 0.1),
        },
        "parameter_errors": parameters,
    }


def _how(run: Run) -> str:
    sizes = [f"{name} {run.layout[name]}" for name in ("tp", "pp") if name in run.layout]
    stage = run.layout.get("zero_stage", 3)
    words = ["fp8" if run.fp8 else "bf16", "FSDP" if stage == 3 else f"ZeRO-{stage}", *sizes]
    if run.checkpointing != "none":
        words.append(f"{run.checkpointing} recomputation")
    return ", ".join([*words, *(["compiled"] if run.compiled else [])])


def _summary(errors: Sequence[float], target: float) -> dict[str, Any]:
    return {
        "runs": len(errors),
        "target": target,
        "within": sum(e <= target for e in errors),
        "median_error": round(statistics.median(errors), 4),
        "largest_error": max(errors),
    }


def markdown(found: dict[str, Any]) -> str:
    """Word the comparison."""
    time, memory = found["summary"]["step time"], found["summary"]["memory"]
    misses = [
        f"{row['source']} {row['model']} on {row['gpus']:,} ({row['step_time_error']:+.0%})"
        for row in found["rows"]
        if abs(row["step_time_error"]) > time["target"]
    ]
    numbers = ", ".join(f"{name} {value}" for name, value in found["efficiency"].items())
    lines = [
        "# How far to trust `distllm plan`",
        "",
        "Written by `python benchmarks/plan_published.py`; the raw numbers are in `benchmarks/plan_published.json`, the",
        "runs with their sources in `benchmarks/published_runs.py`. Nothing here was measured by us on these machines:",
        "*published* is what others report, *predicted* is what the formulas of `distllm plan` say about the same run.",
        "On a CPU the same memory formulas are held against real storages, engine by engine, in",
        "`tests/config/test_memory.py`. Under DeepSpeed (ZeRO 1 to 3 on two and four processes) weights, gradients, moments",
        "and peak are within 5% on the fullest process, and so is what it offloads: a CPU has one memory only, so what",
        "would be the host's is told apart by name there, and no transfer between the two was measured. All of it describes",
        "hardware that multiplies bf16: a CPU without such instructions also holds wider copies of the factors in passing.",
        "",
        "## Time",
        "",
        f"Five numbers are fitted to the five runs marked *fitted* ({numbers}). On the other {time['runs']} runs the",
        f"step time is predicted within 20% in {time['within']}, the median error is {time['median_error']:.1%} and the",
        f"largest {time['largest_error']:.0%}.",
        "Beyond 20%: " + "; ".join(misses) + ".",
        "For GPUs held to 500 W the authors do not know the peak; it is taken to fall with the cube root of the power.",
        "",
        _header("source", "model", "GPUs", "tokens", "micro", "how", "published", "predicted", "error"),
    ]  # fmt: skip
    for row in found["rows"]:
        rates = row["tokens_per_s"]
        error = f"{row['step_time_error']:+.1%}" + (" (fitted)" if row["calibrates"] else "")
        lines.append(_line(row["source"], row["model"], f"{row['gpus']:,} {row['hardware']}",
                           f"{row['seq']:,}", f"{row['micro']} x {row['accum']}", row["how"],
                           f"{rates['published']:,}", f"{rates['predicted']:,}", error))  # fmt: skip
    lines += [
        "",
        "Tokens per second and GPU; *micro* is sequences per micro-batch x micro-batches per step; the error is that of",
        "the step time. What a source does not say is inferred; the file with the runs says where.",
        "",
        "## Memory",
        "",
        f"Nothing is fitted. Of {memory['runs']} published peaks {memory['within']} are predicted within 10%, the median",
        f"error is {memory['median_error']:.1%} and the largest {memory['largest_error']:.0%}. Published peaks are what the",
        "allocator reserved, predicted ones what tensors take, so predictions lean low. The misses are the 70B runs with",
        "tensor parallel, for which the sources do not say what the loss keeps, and runs without a compiler.",
        "",
        _header("source", "model", "GPUs", "how", "published GiB", "predicted GiB", "error"),
    ]  # fmt: skip
    for row in found["rows"]:
        if "gib" in row:
            lines.append(_line(row["source"], row["model"], f"{row['gpus']:,}", row["how"],
                               row["gib"]["published"], row["gib"]["predicted"],
                               f"{row['memory_error']:+.1%}"))  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _header(*cells: str) -> str:
    return _line(*cells) + "\n" + _line(*["---"] * len(cells))


def main() -> int:
    """Compare, write, print the summary; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="write nothing; fail if the code has other numbers"
    )
    arguments = parser.parse_args()
    found = compare(RUNS)
    for name, summary in found["summary"].items():
        print(f"{name}: {json.dumps(summary)}")
    stale = {
        f.name: found["efficiency"][f.name]
        for f in fields(Efficiency)
        if getattr(Efficiency(), f.name) != found["efficiency"][f.name]
    }
    if stale:
        print(f"distllm/config/step_time.py has other numbers than the fit: {stale}")
    if not (arguments.quick):
        text = json.dumps(found, indent=1)
        (Path(__file__).parent / "plan_published.json").write_text(text + "\n", encoding="utf-8")
        (ROOT / "docs" / "plan.md").write_text(markdown(found), encoding="utf-8")
    print(json.dumps({"name": "plan_published", **found["summary"]}))
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
