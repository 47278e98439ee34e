"""What the vocabulary loss takes at its worst moment, measured as the memory of a process; and the choice of its kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distllm.config.checks import check_training
from distllm.config.compose import compose
from distllm.errors import ConfigError
from distllm.layers import liger_loss
from distllm.layers.cross_entropy import linear_cross_entropy_z
from distllm.layers.liger_loss import check_loss_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

MEASURE = """
import json, re, sys
import torch
import torch.nn.functional as F
from distllm.layers.cross_entropy import linear_cross_entropy

how, tokens, vocab, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)


def case(tokens):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator).requires_grad_()
    weight = torch.randn(vocab, 16, generator=generator).mul_(0.5).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator)


def loss_of(hidden, weight, labels):
    if how == "chunked":
        return linear_cross_entropy(hidden, weight, labels)
    return F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")


def high_water_kib():
    # What the process held at most. getrusage's figure would begin with that of the process it was started by.
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])


loss_of(*case(2)).backward()  # libraries load what they need
given = case(tokens)
before = high_water_kib()
loss = loss_of(*given)
loss.backward()
peak = high_water_kib() - before
torch.save([loss.detach(), given[0].grad, given[1].grad], out)
print(json.dumps(peak * 1024))
"""


def compare(tmp_path, tokens, vocab):
    """Return how many times less memory ours takes than full logits, once losses and gradients are equal."""
    peaks, found = {}, {}
    for how in ("full", "chunked"):
        out = tmp_path / f"{how}.pt"
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, how, str(tokens), str(vocab), str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks[how], found[how] = json.loads(done.stdout.splitlines()[-1]), torch.load(out)
    for ours, full in zip(found["chunked"], found["full"], strict=True):
        assert float((ours - full).abs().max()) <= 1e-4 * float(full.abs().max())
    assert peaks["full"] >= tokens * vocab * 4  # the logits were there
    return peaks["full"] / peaks["chunked"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_process_needs_far_less_memory_than_with_full_logits(tmp_path):
    assert compare(tmp_path, tokens=1024, vocab=30_000) >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_vocabulary_of_151936_at_8192_tokens(tmp_path):
    """Qwen's vocabulary: logits and their gradient alone are 10 GB."""
    if _available_bytes() < 17 * 2**30:
        pytest.skip("full logits need 17 GiB of free memory to be measured")
    assert compare(tmp_path, tokens=8192, vocab=151_936) >= 5


def _available_bytes():
    import psutil

    return psutil.virtual_memory().available


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["hardware.loss=liger"], "it runs on a GPU alone, and the device is cpu"),
        (["hardware.loss=ligr"], "hardware.loss=ligr is unknown. Known: chunked, liger"),
    ],
)
def test_a_run_refuses_before_it_starts(overrides, words):
    with pytest.raises(ConfigError) as caught:
        check_training(compose([*overrides, "hardware.device=cpu", "run.dir=unused"]))
    assert words in str(caught.value)


def test_what_liger_cannot_serve_is_named(monkeypatch):
    monkeypatch.setattr(liger_loss.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"liger-kernel is not installed.*hardware\.loss=chunked"):
        check_loss_kernel("liger", CUDA, is_plain=True, is_split=False)
    monkeypatch.setattr(liger_loss.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="bias or a soft-cap"):
        check_loss_kernel("liger", CUDA, is_plain=False, is_split=False)
    with pytest.raises(ConfigError, match=r"engine\.mesh\.tp_size"):
        check_loss_kernel("liger", CUDA, is_plain=True, is_split=True)
    check_loss_kernel("liger", CUDA, is_plain=True, is_split=False)


@pytest.mark.gpu
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_gives_what_ours_gives(dtype, z_loss):
    pytest.importorskip("liger_kernel")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).to(CUDA, dtype).requires_grad_()
    weight = torch.randn(5_000, 64, generator=generator).to(CUDA, dtype).requires_grad_()
    labels = torch.randint(0, 5_000, (300,), generator=generator).to(CUDA)
    labels[::7] = -100
    results = []
    for kernel in ("chunked", "liger"):
        total, squares = linear_cross_entropy_z(hidden, weight, labels, z_loss, kernel)
        results.append((total, *torch.autograd.grad(total / 300, (hidden, weight))))
        if z_loss:
            results[-1] += (squares,)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, liger in zip(*results, strict=True):
        assert float((ours - liger).abs().max()) <= tolerance * float(ours.abs().max())
