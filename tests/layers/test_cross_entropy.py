"""Fused vocabulary loss and log-probabilities against torch's, written with full logits."""

import pytest
import torch
import torch.nn.functional as F
from patched import with_bug

from distllm.layers import chunked_logprobs, cross_entropy, sampled_softmax
from distllm.layers.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_z,
    linear_logprobs,
)

TOKENS, D_MODEL, VOCAB = 40, 16, 50
WHOLE = (2**24, 2**20, 2**26)
PIECES = (VOCAB * 8 * 7, VOCAB * 8 * 3, 0)
"""Seven tokens a chunk, three a slice, nothing kept."""


@pytest.fixture(params=[WHOLE, PIECES], ids=["whole", "pieces"])
def sizes(request, monkeypatch):
    for name, value in zip(
        ("_CHUNK_BYTES", "_SLICE_BYTES", "_KEEP_BYTES"), request.param, strict=True
    ):
        monkeypatch.setattr(cross_entropy, name, value)


def case(dtype=torch.float64, vocab=VOCAB):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, D_MODEL, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, D_MODEL, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocab, (TOKENS,))


def reference(hidden, weight, targets, temperature):
    logprobs = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    entropy = torch.distributions.Categorical(logits=hidden @ weight.t() / temperature).entropy()
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def assert_same(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("ignored", [0, 7, TOKENS - 1])
@pytest.mark.usefixtures("sizes")
def test_loss_and_gradient_equal_full_logits(ignored):
    hidden, weight, labels = case()
    labels[torch.randperm(TOKENS)[:ignored]] = -100
    got = linear_cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    assert_same([got], [expected])
    upstream = torch.tensor(0.37, dtype=torch.float64)
    assert_same(
        torch.autograd.grad(got, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
    )


@pytest.mark.parametrize("labels", [torch.full((TOKENS,), -100), torch.empty(0, dtype=torch.int64)])
def test_no_labels_give_zero_with_a_graph(labels):
    hidden, weight, _ = case()
    loss = linear_cross_entropy(hidden[: len(labels)], weight, labels)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_a_target_of_vanishing_probability_has_its_true_loss():
    weight = torch.tensor([[0.0], [1.0], [2.0]], requires_grad=True)
    hidden = torch.tensor([[300.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    assert loss.item() == pytest.approx(600.0)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0]))
    assert logprobs.item() == pytest.approx(-600.0)
    assert entropy.item() == pytest.approx(0.0, abs=1e-4)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.item() == pytest.approx(2.0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("used", ["both", "logprobs", "entropy"])
@pytest.mark.usefixtures("sizes")
def test_logprobs_entropy_and_gradients_equal_full_logits(temperature, used):
    hidden, weight, targets = case()
    got = linear_logprobs(hidden, weight, targets, temperature)
    expected = reference(hidden, weight, targets, temperature)
    assert_same(got, expected)
    upstream = torch.randn(2, TOKENS, dtype=torch.float64)
    if used != "both":
        upstream[1 if used == "logprobs" else 0] = 0
    picked = {"both": (0, 1), "logprobs": (0,), "entropy": (1,)}[used]

    def gradients(pair):
        return torch.autograd.grad(
            sum((pair[i] * upstream[i]).sum() for i in picked), (hidden, weight)
        )

    assert_same(gradients(got), gradients(expected))


@pytest.mark.usefixtures("sizes")
def test_backward_twice_gives_the_same():
    hidden, weight, targets = case()
    for scalar in (
        linear_cross_entropy(hidden, weight, targets),
        linear_logprobs(hidden, weight, targets)[0].sum(),
    ):
        first = torch.autograd.grad(scalar, (hidden, weight), retain_graph=True)
        assert_same(torch.autograd.grad(scalar, (hidden, weight)), first, 0)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = case()
    loss = linear_cross_entropy(hidden.detach(), weight, targets)
    loss.backward()
    assert hidden.grad is None
    assert weight.grad is not None
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, targets)[0].requires_grad


def test_bfloat16_autocast_gives_float32_results_near_the_exact_ones():
    hidden, weight, labels = case(torch.float32)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    exact = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=3e-3)
    for ours, theirs in zip(torch.autograd.grad(got, (hidden, weight)), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("what", ["loss", "logprobs"])
def test_peak_memory_stays_below_full_logits(what):
    """The largest tensor alive at once, counted by torch's own allocator records."""
    tokens, vocab = 8192, 4096
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))

    def peak(function):
        with torch.profiler.profile(profile_memory=True) as profile:
            function().backward()
        changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        alive = most = 0
        for event in sorted(changes, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            most = max(most, alive)
        return most

    def ours():
        if what == "loss":
            return linear_cross_entropy(hidden, weight, labels)
        return linear_logprobs(hidden, weight, labels)[0].sum()

    full = peak(lambda: F.cross_entropy(hidden @ weight.t(), labels, reduction="sum"))
    assert full > tokens * vocab * 4
    assert peak(ours) < full / 3


@pytest.mark.parametrize("kind", ["fused", "chunked"])
def test_z_loss_against_torch(sizes, kind, monkeypatch):
    hidden, weight, labels = case()
    labels[3] = -100 if kind == "fused" else labels[3]
    logits = hidden @ weight.t()
    normaliser = torch.logsumexp(logits, dim=-1)[labels != -100]
    expected = F.cross_entropy(logits, labels, reduction="sum") + 0.1 * normaliser.square().sum()
    grads = torch.autograd.grad(2 * expected, (hidden, weight))
    if kind == "fused":
        ours, squares = linear_cross_entropy_z(hidden, weight, labels, 0.1)
    else:
        monkeypatch.setattr(chunked_logprobs, "_CHUNK_TOKENS", 7)
        found = chunked_logprobs.chunked_normalisers(lambda x: x @ weight.t(), hidden)
        squares = found.square().sum()
        picked, _ = chunked_logprobs.chunked_logprobs(lambda x: x @ weight.t(), hidden, labels)
        ours = 0.1 * squares - picked.sum()
    assert_same(
        (ours, squares, *torch.autograd.grad(2 * ours, (hidden, weight))),
        (expected, normaliser.square().sum(), *grads),
        1e-8,
    )


def test_all_words_sampled_give_the_exact_loss():
    hidden, weight, labels = case()
    got = sampled_softmax.sampled_cross_entropy(hidden, weight, labels, VOCAB)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    assert_same([got], [expected])
    both = (torch.autograd.grad(x, (hidden, weight)) for x in (got, expected))
    assert_same(*both)


@pytest.mark.parametrize(
    "bug", [None, (".log()", ""), ("others[torch.randperm", "others[torch.arange")]
)
def test_the_normaliser_of_sampled_words_is_unbiased(bug):
    """Mean over draws against the exact one, in standard errors of the mean."""
    module = with_bug(sampled_softmax, *bug) if bug else sampled_softmax
    hidden, weight, labels = case(vocab=300)
    hidden = 0.3 * hidden[:1].detach()
    label = labels[:1]
    logits = (hidden @ weight.t())[0]
    torch.manual_seed(1)
    losses = [module.sampled_cross_entropy(hidden, weight, label, 20) for _ in range(800)]
    normalisers = (torch.stack(losses) + logits[label]).exp()
    error = (normalisers.mean() - logits.exp().sum()) / (normalisers.std() / len(losses) ** 0.5)
    assert (abs(error) < 3) == (bug is None)
