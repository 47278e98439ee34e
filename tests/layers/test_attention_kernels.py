"""Every attention kernel against eager: packed, padded, windowed, prefixed and crossing; and who may serve whom.

GPU kernels are tested on a GPU (`gpu`). Their variable-length form is tested here with a kernel of this file in their
place, which attends one piece after another as their libraries document it.
"""

import dataclasses
import itertools

import pytest
import torch
from patched import planted

from distllm.config.checks import check_training
from distllm.config.compose import compose
from distllm.errors import ConfigError
from distllm.layers import attention as door
from distllm.layers import attention_kernels, flex_attention, pieces
from distllm.layers.attention import attention
from distllm.layers.attention_kernels import KERNELS, Need, choose, refusal
from distllm.layers.masks import cross_mask, lay_out

SEQ, SOURCE = 24, 17
SEGMENTS = torch.tensor([[1] * 9 + [2] * 1 + [3] * 11 + [0] * 3, [1] * 20 + [2] * 4])
LEFT = (torch.arange(SEQ) >= torch.tensor([[5], [0]])).long()
CASES = {
    "full": {"causal": False},
    "causal": {},
    "right padded": {"attention_mask": LEFT.flip(1), "causal": False},
    "left padded": {"attention_mask": LEFT},
    "packed": {"segment_ids": SEGMENTS},
    "packed both ways": {"segment_ids": SEGMENTS, "causal": False},
    "window": {"windows": (6,)},
    "packed window": {"windows": (6,), "segment_ids": SEGMENTS},
    "window both ways": {"windows": (6,), "causal": False, "attention_mask": LEFT},
    "prefix": {"prefix_lengths": torch.tensor([7, 0])},
    "left padded prefix": {"prefix_lengths": torch.tensor([7, 3]), "attention_mask": LEFT},
    "packed prefix": {
        "segment_ids": SEGMENTS,
        "prefix_lengths": torch.where(SEGMENTS == 3, 5, torch.where(SEGMENTS == 1, 3, 1)),
    },
    "cross": {},
    "cross padded": {"key_mask": (torch.arange(SOURCE) < torch.tensor([[11], [17]])).long()},
    "cross packed": {
        "queries": SEGMENTS,
        "keys": torch.tensor([[1] * 4 + [2] * 7 + [3] * 3 + [0] * 3, [1] * 5 + [2] * 12]),
    },
}


def mask_for(case, kernel, dtype=torch.float32, device="cpu"):
    """Return (mask, keys, [batch, SEQ] bool: queries whose result counts)."""
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in CASES[case].items()}
    device = torch.device(device)
    if case.startswith("cross"):
        queries = given.get("queries")
        mask = cross_mask(
            queries, given.get("keys"), given.get("key_mask"), dtype,
            shape=(2, SEQ, SOURCE), kernel=kernel, device=device,
        )  # fmt: skip
        real = torch.ones(2, SEQ, device=device) if queries is None else queries
        return mask, SOURCE, real != 0
    given = {"attention_mask": None, "segment_ids": None, "position_ids": None} | given
    layout = lay_out((2, SEQ), **given, past=0, dtype=dtype, device=device, kernel=kernel)
    real = torch.ones(2, SEQ, device=device) if layout.real is None else layout.real
    return next(iter(layout.masks.values())), SEQ, real != 0


def outcome(case, kernel, *, n_kv_heads=2, grad=True, dtype=torch.float32, device="cpu", **more):
    """Return the result and the gradients of queries, keys and values (and of the bias, where there is one)."""
    mask, kv_seq, real = mask_for(case, kernel, dtype, device)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad)

    inputs = [draw(2, SEQ, 4, 16), draw(2, kv_seq, n_kv_heads, 16), draw(2, kv_seq, n_kv_heads, 16)]
    if "bias" in more:
        bias = draw(1, 4, SEQ, kv_seq)
        inputs.append(bias)
        hiding = mask.bias
        if hiding is None and mask.causal and mask.block_mask is None:
            hiding = door.causal_bias(SEQ, dtype, torch.device(device))
        mask = dataclasses.replace(mask, bias=bias if hiding is None else bias + hiding)
    how = {"scale": 0.4, "softcap": more.get("softcap"), "kernel": kernel}
    if "sinks" in more:
        how["sinks"] = draw(4)
        inputs.append(how["sinks"])
    out = attention(*inputs[:3], mask=mask, **how)
    factors = torch.randn(out.shape, generator=generator).to(device, dtype) * real[..., None, None]
    results = [out * real[..., None, None]]
    if grad:
        results += torch.autograd.grad((out * factors).sum(), inputs)
    return [x.detach().float().cpu() for x in results]


def piecewise(q, k, v, part, *, causal, scale, window, softcap):
    """Attend one piece after another, a window reaching `window - 1` tokens; what no key answers is zero."""
    groups, outs = q.shape[1] // k.shape[1], []
    starts, key_starts = part.cu_queries.tolist(), part.cu_keys.tolist()
    assert max(b - a for a, b in itertools.pairwise(starts)) == part.max_queries
    assert max(b - a for a, b in itertools.pairwise(key_starts)) == part.max_keys
    for i in range(len(starts) - 1):
        queries = q[starts[i] : starts[i + 1]]
        keys, values = (
            x[key_starts[i] : key_starts[i + 1]].repeat_interleave(groups, dim=1) for x in (k, v)
        )
        if not len(keys):
            outs.append(torch.zeros_like(queries))
            continue
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = torch.arange(len(keys)) - torch.arange(len(queries))[:, None]
        hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
        if window is not None:
            hidden = hidden | (ahead.abs() >= window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outs)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(door, "varlen_kernel", lambda name: piecewise)


def assert_near(got, expected, tolerance=2e-6):
    for ours, reference in zip(got, expected, strict=True):
        limit = tolerance * max(1.0, float(reference.abs().max()))
        assert float((ours - reference).abs().max()) <= limit


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["sdpa", "sdpa_flash", "sdpa_math", "blocked"])
def test_torchs_and_our_kernels_on_a_cpu(kernel, case):
    assert_near(outcome(case, kernel), outcome(case, "eager"))


@pytest.mark.parametrize("case", CASES)
def test_variable_lengths(stand_in, case):
    expected = outcome(case, "eager")
    assert_near(outcome(case, "flash2"), expected)
    assert_near(outcome(case, "flash3", softcap=3.0), outcome(case, "eager", softcap=3.0))


@pytest.mark.parametrize("case", CASES)
def test_flex_on_a_cpu(case):
    expected = outcome(case, "eager", grad=False)
    assert_near(outcome(case, "flex", grad=False), expected)


@pytest.mark.parametrize("more", [{"bias": True}, {"softcap": 3.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("case", ["packed window", "packed prefix", "full"])
def test_flex_with_what_others_cannot(case, more):
    expected = outcome(case, "eager", grad=False, **more)
    assert_near(outcome(case, "flex", grad=False, **more), expected)


@pytest.mark.parametrize("kernel", ["sdpa", "sdpa_math", "blocked"])
def test_a_learned_bias_gets_its_gradient(kernel):
    for case in ("packed", "full", "cross packed"):
        assert_near(outcome(case, kernel, bias=True), outcome(case, "eager", bias=True))


@pytest.mark.parametrize(
    ("old", "new", "case"),
    [
        ("order, once(pieces.prefix, False)", "order, once(pieces.prefix, True)", "prefix"),
        ("    found.order_queries, found.order_keys = _order(marks), _order(key_marks)\n", "", "left padded"),
        ("padding_last = segments.where(segments != 0, width - 1)", "padding_last = segments.clamp(max=2)", "packed"),
        ("kept = (sizes > 0) | (key_sizes > 0)", "kept = sizes > 2", "packed"),
    ],
)  # fmt: skip
def test_bugs_in_laying_pieces_out_are_noticed(stand_in, old, new, case):
    with planted(pieces, old, new):
        try:
            got = outcome(case, "flash2")
        except (AssertionError, RuntimeError):
            return
    with pytest.raises(AssertionError):
        assert_near(got, outcome(case, "eager"))


@pytest.mark.parametrize(
    ("old", "new", "case"),
    [
        ("(q - kv).abs() < window", "(q - kv).abs() <= window", "window"),
        ("seen = seen | prefix[b, kv]", "pass", "prefix"),
        ("seen = seen & (queries[b, q] == keys[b, kv])", "pass", "packed"),
    ],
)
def test_bugs_in_block_masks_are_noticed(old, new, case):
    with planted(flex_attention, old, new):
        got = outcome(case, "flex", grad=False)
    with pytest.raises(AssertionError):
        assert_near(got, outcome(case, "eager", grad=False))


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def need(device=CUDA, dtype=torch.bfloat16, d_head=64, **more):
    return Need(device=device, dtype=dtype, d_head=d_head, **more)


@pytest.fixture
def hopper(monkeypatch):
    """Answer as a machine with an H100 and every package does."""
    monkeypatch.setattr(attention_kernels, "_capability", lambda device: 9)
    monkeypatch.setattr(attention_kernels, "_installed", lambda module: True)


def test_the_first_that_serves_is_chosen_with_the_reason(hopper, monkeypatch):
    assert choose("auto", need()).name == "flash3"
    monkeypatch.setattr(attention_kernels, "_installed", lambda m: m.endswith("flash_attn_interface")
                        and m.startswith("flash_attn."))  # fmt: skip
    found = choose("auto", need())
    assert found.name == "flash2"
    assert "no flash3" in found.reason and "not installed" in found.reason
    monkeypatch.setattr(attention_kernels, "_capability", lambda device: 7)
    assert choose("auto", need()).name == "flex"


def test_on_a_cpu(hopper):
    assert choose("auto", need(CPU, torch.float32)).name == "blocked"
    assert choose("auto", need(CPU, torch.float32, sinks=True)).name == "eager"


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("flash2", need(CPU), "GPU alone"),
        ("sdpa_cudnn", need(CPU), "GPU alone"),
        ("blocked", need(), "CPU alone"),
        ("flash2", need(dtype=torch.float32), "float32"),
        ("flash3", need(d_head=320), "head size 320 is above its limit of 256"),
        ("sdpa_cudnn", need(d_head=192), "192"),
        ("flash2", need(d_head=100), "100 is not a multiple of 8"),
        ("flash2", need(bias=True), "bias"),
        ("sdpa_cudnn", need(bias=True, trains=True), "gradient"),
        ("sdpa_flash", need(softcap=True), "soft-cap"),
        ("flash3", need(sinks=True), "sink"),
        ("sdpa", need(sinks=True), "sink"),
        ("flex", need(CPU, trains=True), "no backward on a CPU"),
    ],
)
def test_a_kernel_that_cannot_serve_says_why_and_names_those_that_can(hopper, name, asked, words):
    with pytest.raises(ConfigError) as caught:
        choose(name, asked)
    message = str(caught.value)
    assert f"hardware.attention={name}" in message and words in message
    able = message.split("What can: ")[1].split(". Set")[0].split(", ")
    assert able == [k for k in KERNELS if refusal(k, asked) is None]
    assert name not in able and "eager" in able


def test_the_gpu_that_a_kernel_is_not_written_for(hopper, monkeypatch):
    monkeypatch.setattr(attention_kernels, "_capability", lambda device: 8)
    assert "8.x" in (refusal("flash3", need()) or "")
    assert choose("auto", need()).name == "flash2"


def test_a_package_that_is_missing():
    assert "not installed" in (refusal("flash2", need(CUDA)) or "")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["hardware.attention=flash9"], "must be one of auto, flash3"),
        (["hardware.attention=flash2"], "What can: sdpa_flash, sdpa, sdpa_math, blocked, eager"),
        (["hardware.attention=flex"], "no backward on a CPU"),
        (["hardware.attention=sdpa_flash", "arch=t5_tiny"], "learned bias"),
        (["hardware.attention=sdpa", "arch=gpt_oss_20b", "train.seq_len=64"], "sink"),
        (["hardware.attention=sdpa", "arch=lstm_tiny"], "no attention"),
    ],
)
def test_a_run_refuses_before_it_starts(overrides, words):
    with pytest.raises(ConfigError, match=r"hardware\.attention") as caught:
        check_training(compose([*overrides, "hardware.device=cpu", "run.dir=unused"]))
    assert words in str(caught.value)


GPU_KERNELS = [
    "flash2",
    "flash3",
    "flash4",
    "sdpa_flash",
    "sdpa_cudnn",
    "sdpa",
    "sdpa_math",
    "flex",
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", GPU_KERNELS)
def test_on_a_gpu(kernel, case):
    """Within bfloat16's rounding of eager in float32, no worse than twice eager in bfloat16; gradients too."""
    reason = refusal(kernel, need(CUDA, d_head=16, trains=True))
    if reason:
        pytest.skip(reason)
    exact = outcome(case, "eager", device="cuda")
    rounded = outcome(case, "eager", device="cuda", dtype=torch.bfloat16)
    got = outcome(case, kernel, device="cuda", dtype=torch.bfloat16)
    for ours, theirs, reference in zip(got, rounded, exact, strict=True):
        own, limit = ((x - reference).abs().max() for x in (ours, theirs))
        assert own <= 2 * limit + 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("more", [{"bias": True}, {"softcap": 3.0}, {"sinks": True}], ids=str)
def test_flex_gradients_on_a_gpu(more):
    for case in ("packed window", "packed prefix", "full"):
        expected = outcome(case, "eager", device="cuda", **more)
        assert_near(outcome(case, "flex", device="cuda", **more), expected, 1e-2)
