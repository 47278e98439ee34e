"""What is reported between two log lines."""

import json
from dataclasses import dataclass

import pytest
import torch

from distllm.testing.stages import run_tiny, write_text
from distllm.train.meters import Meters
from distllm.types import Batch


@dataclass
class AnEngine:
    role: str


@dataclass
class SomeWork:
    engine: AnEngine
    micro_batches: list[Batch]


def cost(batch, *, causal_half):
    return batch.input_ids.numel() * (500.0 if causal_half else 1000.0)


def some_work(role="model"):
    return [SomeWork(AnEngine(role), [Batch(input_ids=torch.zeros(2, 8, dtype=torch.int64))] * 3)]


def test_utilisation_is_work_over_what_could_have_been_done():
    meters = Meters({"model": cost}, peak_flops_per_s=1e6)
    for _ in range(2):
        meters.add({"train/loss": 3.0}, some_work(), tokens=96, seconds=0.5)  # two ranks: 2 x 48
    out = meters.flush()
    assert out["perf/tokens_per_s"] == 192
    assert out["perf/flops_per_token"] == 1000
    assert out["perf/flops_per_token_causal"] == 500
    assert out["perf/mfu"] == pytest.approx(192 * 1000 / 1e6)
    assert out["perf/mfu_causal"] == pytest.approx(out["perf/mfu"] / 2)
    assert "perf/mfu" not in Meters().flush()


def test_padding_and_packing_are_counted():
    packed = torch.tensor([[1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    padded = Batch(
        input_ids=packed, attention_mask=torch.tensor([[1] * 8, [1] * 2 + [0] * 6]),
        decoder_input_ids=packed[:, :4], decoder_attention_mask=torch.tensor([[1] * 4, [1, 0, 0, 0]]),
    )  # fmt: skip
    meters = Meters()
    batches = [Batch(input_ids=packed, segment_ids=packed), padded]
    meters.add({}, [SomeWork(AnEngine("model"), batches)], tokens=24, seconds=1.0)
    meters.measured_flops_per_s = 1e6
    out = meters.flush()
    assert out["data/padding_waste"] == pytest.approx(1 - (14 + 10 + 5) / (16 + 16 + 8))
    assert out["data/packing_efficiency"] == pytest.approx(29 / 40)
    assert out["data/documents_per_row"] == (3 + 1 + 1 + 1) / 4
    assert "data/padding_waste" not in meters.flush()


def test_every_trained_model_counts():
    meters = Meters({"policy": cost, "value": cost}, peak_flops_per_s=1e6)
    meters.add({}, some_work("policy") + some_work("value"), tokens=48, seconds=1.0)
    assert meters.flush()["perf/flops_per_token"] == 2000


def test_a_resumed_meter_goes_on_from_its_counts():
    first = Meters({"model": cost}, peak_flops_per_s=1e6)
    first.add({"train/loss": 3.0}, some_work(), tokens=48, seconds=1.0)
    second = Meters({"model": cost}, peak_flops_per_s=1e6)
    second.load_state(json.loads(json.dumps(first.state())))
    for meters in (first, second):
        meters.add({"train/loss": 5.0}, some_work(), tokens=48, seconds=1.0)
    first, second = first.flush(), second.flush()
    assert second["perf/flops_per_token"] == first["perf/flops_per_token"] == 1000
    assert second["train/loss"] == first["train/loss"] == 4.0


def test_a_run_logs_its_utilisation(tmp_path):
    text = write_text(tmp_path / "text.txt")
    settings = ["stage=pretrain", "data=file", f"data.path='{text}'", "train.max_steps=2"]
    run_tiny(tmp_path / "run", [*settings, "train.log_every_steps=1"])
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    assert len(logged) == 2
    for line in logged:
        rate = line["perf/tokens_per_s"] * line["perf/flops_per_token"]
        assert 0 < line["perf/mfu_causal"] < line["perf/mfu"]
        # On a CPU the yardstick of utilisation is what its own products reach.
        assert line["perf/measured_peak_share"] == line["perf/mfu"]
        assert line["data/padding_waste"] + line["data/packing_efficiency"] == pytest.approx(1)
        assert 0.3 < line["data/packing_efficiency"] <= 1 <= line["data/documents_per_row"]
        assert rate / line["perf/mfu"] > 1e8  # flops per second that any machine's products reach
