"""The yardstick of utilisation."""

import time

import pytest
import torch

from distllm.config.compose import compose
from distllm.engines.options import HardwareOptions
from distllm.engines.peak import DATASHEET_BF16, measured, peak_flops_per_s

CPU = torch.device("cpu")


def test_measuring_draws_no_random_number():
    before = torch.get_rng_state()
    rate = measured(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < rate < 1e15


def test_a_product_by_hand_is_not_faster_than_the_peak():
    a = torch.ones(1024, 1024)
    a @ a
    started = time.process_time()
    a @ a
    by_hand = 2 * 1024**3 / (time.process_time() - started)
    # CPU time against wall time: a busy machine only lowers the second, so the best of several counts.
    assert any(by_hand < 3 * measured(CPU, torch.float32) for _ in range(20))


def test_what_is_known_is_not_measured_again():
    source, _ = peak_flops_per_s(HardwareOptions(), CPU, torch.float32, {})
    assert peak_flops_per_s(HardwareOptions(), CPU, torch.float32, {source: 123.0}) == (
        source,
        123.0,
    )
    assert "1 thread" in source or f"{torch.get_num_threads()} threads" in source


@pytest.mark.parametrize(("preset", "part"), [("8xh100", "H100 80GB HBM3"), ("8xh200", "H200")])
def test_presets_and_drivers_agree(preset, part):
    assert compose([f"hardware={preset}"]).hardware.peak_bf16_tflops * 1e12 == DATASHEET_BF16[part]
