"""The preference stages: a policy, what a frozen reference says of the same answers, and held-out preferences.

The reference is the model that training starts from. Its log-probabilities are computed once and kept in the run
directory, or at each step; the losses cannot tell.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distllm import registry
from distllm.data.datasets import PairDataset, UnpairedDataset, UnpairedExample
from distllm.data.sampler import Samples
from distllm.engines.base import Engine
from distllm.engines.collectives import from_main, on_main
from distllm.objectives.kto import KTO, baseline_of
from distllm.objectives.preference import PairLoss, Sides, accuracy, response_logprobs
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import NUM_SAMPLES_SHOWN, Measure
from distllm.pipeline.reference import build_reference
from distllm.tracking.progress import progress
from distllm.train.evaluate import preference_metrics
from distllm.train.intervals import area_under_roc, wilson
from distllm.train.source import SampleSource
from distllm.train.tensor_files import write_tensors

_log = logging.getLogger("distllm")

REFERENCE_FILE = "reference.safetensors"
"""What the reference says of the answers, below the run directory."""

_DATASETS: dict[str, Any] = {"pairs": PairDataset, "unpaired": UnpairedDataset}


def build(builder: Builder) -> Parts:
    """Build a stage whose objective compares answers."""
    config, stage = builder.config, builder.config.stage
    cls = registry.get("objective", stage.name)
    model = builder.model("lm", dropout=False)
    objective = cls(stage, builder.pad_id, model.join)
    read = getattr(builder.data, cls.records)
    args = (builder.tokenizer, config.train.seq_len, config.data)
    train = _DATASETS[cls.records](read("train"), *args)
    heldout = _DATASETS[cls.records](read("heldout")[: config.train.num_eval_samples], *args)
    engines = {"model": builder.engine("model", model, trained=True)}
    if cls.needs_reference:
        reference = attach_reference(builder, engines["model"], objective, train, heldout)
        engines |= {"reference": reference} if reference else {}
    source = SampleSource(
        train,
        engines["model"],
        objective,
        builder.schedule(),
        builder.peak_lr,
        config.train,
        config.run.seed,
        reference=engines.get("reference"),
    )
    measure: Any = measure_pairs if isinstance(objective, PairLoss) else measure_unpaired
    return Parts(
        tokenizer=builder.tokenizer,
        data=builder.data,
        engines=engines,
        trained=["model"],
        source=source,
        evaluate=measure(engines["model"], objective, heldout, config.train.micro_batch_size),
        parents={"model": config.model} if config.model else {},
    )


def attach_reference(
    builder: Builder, policy: Engine, objective: Any, train: Samples[Any], heldout: Samples[Any]
) -> Engine | None:
    """Give the samples what the reference says of them; return its engine if it is still needed. All ranks take part.

    Held-out samples always get it beforehand, training samples if `stage.reference` says so.
    """
    config, stage = builder.config, builder.config.stage
    live = stage.reference == "live" or (
        stage.reference == "auto"
        and config.train.global_batch_size * config.train.max_steps < len(train)
    )
    path = builder.run_dir / REFERENCE_FILE
    sides = {"heldout": heldout} if live else {"heldout": heldout, "train": train}
    kept = load_file(path) if from_main(path.exists) else {}
    engine = None
    if live or kept.keys() != sides.keys():
        engine = build_reference(builder, policy, lambda: builder.model("lm", dropout=False))
    if kept.keys() != sides.keys():
        assert engine is not None
        kept = {
            name: answer_logprobs(engine, objective, examples, config.train.micro_batch_size, name)
            for name, examples in sides.items()
        }
        aside = path.with_name(f".{path.name}.tmp")
        on_main(lambda: (write_tensors(aside, kept), aside.rename(path)))
    for name, examples in sides.items():
        for index in range(len(examples)):
            objective.note_reference(examples[index], kept[name][index].tolist())
    if live:
        return engine
    _log.info("The reference's log-probabilities are in %s.", path)
    if engine is not None:
        engine.close()
    return None


def answer_logprobs(
    engine: Engine, objective: Any, examples: Samples[Any], batch_size: int, name: str = ""
) -> Tensor:
    """Return the log-probabilities of each sample's answers, [samples, answers] float64. All ranks take part.

    A pair has two answers; an unpaired sample its own and the one to another prompt.
    """
    layouts = [objective.collate]
    if isinstance(objective, KTO):
        layouts.append(objective.collate_others)
    found: dict[int, Tensor] = {}
    shares = engine.share(len(examples), batch_size)
    with progress(
        len(shares), f"reference {name}", is_main=bool(name) and engine.ranks.is_main
    ) as bar:
        for numbers, counts in shares:
            chosen = [examples[i] for i in numbers]
            sums = [
                engine.infer(response_logprobs, lay_out(chosen).to(engine.device)).double().cpu()
                for lay_out in layouts
            ]
            rows = torch.cat(sums).view(-1, len(chosen)).T
            found |= zip(numbers, rows, strict=True) if counts else {}
            bar.advance(1)
    return torch.stack(engine.gather(found, len(examples)))


def measure_pairs(
    engine: Engine, objective: PairLoss, heldout: PairDataset, batch_size: int
) -> Measure:
    """Loss, and how often and how surely the chosen answer gets the higher reward."""
    examples = [heldout[i] for i in range(len(heldout))]
    lengths = torch.tensor([[len(e.chosen_ids), len(e.rejected_ids)] for e in examples])
    confidences = torch.tensor([e.confidence for e in examples], dtype=torch.float64)
    known = [e.ref_logprobs for e in examples]
    ref_chosen, ref_rejected = (
        torch.tensor(known, dtype=torch.float64).T if objective.needs_reference else (None, None)
    )

    def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        now = answer_logprobs(engine, objective, examples, batch_size)
        sides = Sides(
            now[:, 0],
            now[:, 1],
            lengths[:, 0],
            lengths[:, 1],
            confidences,
            ref_chosen,
            ref_rejected,
        )
        chosen, rejected = objective.rewards(sides)
        loss = objective.coefficients["pairs"] * objective.losses(sides).mean()
        if "sft" in objective.coefficients:
            loss -= objective.coefficients["sft"] * now[:, 0].sum() / lengths[:, 0].sum()
        metrics = {
            "eval/loss": loss.item(),
            "eval/margin": (chosen - rejected).mean().item(),
            "eval/reward_chosen": chosen.mean().item(),
            "eval/reward_rejected": rejected.mean().item(),
            "eval/logprob_chosen": now[:, 0].mean().item(),
            "eval/logprob_rejected": now[:, 1].mean().item(),
        }
        shown = [
            {
                "prompt": r.prompt[-1]["content"],
                "chosen": r.chosen,
                "rejected": r.rejected,
                "chosen_score": chosen[i].item(),
                "rejected_score": rejected[i].item(),
                "kind": r.kind,
            }
            for i, r in enumerate(heldout.records[:NUM_SAMPLES_SHOWN])
        ]
        return metrics | preference_metrics(chosen - rejected, examples), shown

    return measure


def measure_unpaired(
    engine: Engine, objective: KTO, heldout: UnpairedDataset, batch_size: int
) -> Measure:
    """Loss, and how well the rewards tell good answers from bad ones."""
    examples = [heldout[i] for i in range(len(heldout))]
    good = torch.tensor([e.good for e in examples])
    reference = torch.tensor([_of_reference(e) for e in examples]).double()
    has_other = torch.tensor([bool(e.other_ids) for e in examples])

    def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        ratios = answer_logprobs(engine, objective, examples, batch_size) - reference
        baseline = baseline_of(ratios[:, 1].sum(), has_other.sum())
        rewards = objective.options.beta * ratios[:, 0]
        metrics: dict[str, Any] = {
            "eval/loss": objective.losses(ratios[:, 0], good, baseline).mean().item(),
            "eval/kl_baseline": baseline.item(),
            "eval/num_answers": float(len(examples)),
        }
        for name, members in (("good", good), ("bad", ~good)):
            if members.any():
                metrics[f"eval/reward_{name}"] = rewards[members].mean().item()
        if good.any() and not good.all():
            metrics["eval/auc"] = area_under_roc(rewards.tolist(), good.tolist())
        metrics |= _accuracy_within_prompts(examples, rewards.tolist())
        shown = [
            {
                "prompt": r.prompt[-1]["content"],
                "response": r.completion,
                "good": r.good,
                "reward": rewards[i].item(),
            }
            for i, r in enumerate(heldout.records[:NUM_SAMPLES_SHOWN])
        ]
        return metrics, shown

    return measure


def _accuracy_within_prompts(
    examples: Sequence[UnpairedExample], rewards: Sequence[float]
) -> dict[str, float]:
    """Compare good with bad answers to the same prompt, where there are both."""
    by_prompt: dict[tuple[int, ...], tuple[list[float], list[float]]] = {}
    for example, reward in zip(examples, rewards, strict=True):
        sides = by_prompt.setdefault(tuple(example.prompt_ids), ([], []))
        sides[0 if example.good else 1].append(reward)
    margins = [g - b for good, bad in by_prompt.values() for g in good for b in bad]
    if not margins:
        return {}
    right = accuracy(torch.tensor(margins)).sum().item()
    low, high = wilson(right, len(margins))
    return {
        "eval/accuracy": right / len(margins),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/num_pairs": float(len(margins)),
    }


def _of_reference(example: UnpairedExample) -> tuple[float, float]:
    """Return what the reference says of a sample's own answer and of the one to another prompt."""
    assert example.ref_logprobs is not None and example.ref_other is not None
    return example.ref_logprobs[0], example.ref_other
