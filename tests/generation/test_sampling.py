"""One draw against the softmax, top-k and top-p against brute force, the search against numpy."""

import numpy as np
import pytest
import torch
from patched import with_bug

from distllm.errors import ConfigError
from distllm.generation import sampling
from distllm.generation.noise import uniforms
from distllm.generation.options import GenerationOptions, check_options

TINY = torch.tensor([[1.0, -0.5, 2.0, 0.0, -3.0]], dtype=torch.float64)


def reference(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution drawn from, in plain numpy, token by token: `[vocab]`."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda v: -scaled[v])
    kept = set(order)
    if top_k:
        edge = scaled[order[min(top_k, len(order)) - 1]]
        kept = {v for v in kept if scaled[v] >= edge}
    if top_p < 1:
        mass = np.array([np.exp(scaled[v]) if v in kept else 0.0 for v in range(len(scaled))])
        mass /= mass.sum()
        total, nucleus = 0.0, set()
        for v in order:
            if total >= top_p:
                break
            nucleus.add(v)
            total += mass[v]
        edge = min(scaled[v] for v in nucleus)
        kept = {v for v in kept if scaled[v] >= edge}
    probs = np.array([np.exp(scaled[v]) if v in kept else 0.0 for v in range(len(scaled))])
    return probs / probs.sum()


CASES = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 2},
    {"top_p": 0.7},
    {"top_p": 0.9, "temperature": 1.5, "top_k": 4},
]


def check_exact_frequencies(module):
    """Noise swept evenly over (0, 1) hits each token as often as its probability, to 1 in n."""
    n = 20000
    sweep = torch.arange(n, dtype=torch.float64).add(0.5) / n
    for settings in CASES:
        tokens, logprobs = module.pick(TINY.expand(n, -1), sweep, GenerationOptions(**settings))
        expected = reference(TINY[0], **settings)
        frequency = np.bincount(tokens.numpy(), minlength=5) / n
        assert np.abs(frequency - expected).max() <= 1.01 / n, settings
        np.testing.assert_allclose(logprobs.exp().numpy(), expected[tokens.numpy()], rtol=1e-9)


BUGS = [
    ("scaled = scaled / options.temperature", "pass"),
    ("scaled = restrict(scaled, options.top_k, options.top_p, options.min_p)", "pass"),
    ("(inside.gather(1, offset) / total).log()", "inside.gather(1, offset)"),
    ("logits < ordered[:, -1:]", "logits <= ordered[:, -1:]"),
    ("(before < top_p)", "(before + probs < top_p)"),
    ("fraction * running[:, -1:]", "fraction * running[:, -1:] * 0.99"),
]


@pytest.mark.parametrize(("old", "new"), BUGS)
def test_exact_frequencies(old, new):
    check_exact_frequencies(sampling)
    with pytest.raises(AssertionError):
        check_exact_frequencies(with_bug(sampling, old, new))


def test_chi_square_with_our_noise():
    """200,000 draws; the statistic has 4 degrees of freedom and exceeds 33.4 once in a million."""
    n = 200_000
    noise = torch.from_numpy(uniforms(0, np.arange(n), np.zeros(n, dtype=int), 1)[:, 0])
    tokens, _ = sampling.pick(TINY.expand(n, -1), noise, GenerationOptions())
    counts = np.bincount(tokens.numpy(), minlength=5)
    expected = reference(TINY[0]) * n
    assert ((counts - expected) ** 2 / expected).sum() < 33.4
    flat = np.full(5, n / 5)
    assert ((counts - flat) ** 2 / flat).sum() > 33.4, "the statistic must tell distributions apart"


def check_search(module):
    """The two-level search finds the token of numpy's cumulative sum in float64."""
    noise = np.random.default_rng(0)
    for vocab in (1, 63, 64, 65, 1000, 4096, 50257):
        logits = noise.normal(size=(40, vocab)) * 3
        u = noise.uniform(size=40)
        u[:2] = 2.0**-41, 1 - 2.0**-41
        tokens, logprobs = module.pick(
            torch.from_numpy(logits), torch.from_numpy(u), GenerationOptions()
        )
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        for row in range(40):
            cumulative = probs[row].cumsum()
            expected = min(np.searchsorted(cumulative, u[row], side="right"), vocab - 1)
            near = abs(cumulative[expected] - u[row]) < 1e-12 or expected == tokens[row]
            assert near, (vocab, row, expected, tokens[row])
            assert logprobs[row].item() == pytest.approx(np.log(probs[row, tokens[row]]), abs=1e-9)


def test_search():
    check_search(sampling)
    for old, new in [
        ("torch.searchsorted(ends, target, right=True)", "torch.searchsorted(ends, 0 * target)"),
        (
            "torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)",
            "ends[:, :1] * 0",
        ),
        ("(block * _BLOCK + offset)", "(block + offset)"),
    ]:
        with pytest.raises(AssertionError):
            check_search(with_bug(sampling, old, new))


def check_masked_tokens_are_never_drawn(module):
    """Noise at both ends of its range, in low precision, with all but a few tokens cut off."""
    logits = torch.full((6, 200), -20.0, dtype=torch.bfloat16)
    logits[:, [0, 70, 199]] = 1.0
    u = torch.tensor([2.0**-41, 1 / 3, 2 / 3, 0.5, 0.999999999, 1 - 2.0**-41], dtype=torch.float64)
    for settings in ({"top_k": 3}, {"top_p": 0.99}):
        tokens, logprobs = module.pick(logits, u, GenerationOptions(**settings))
        assert set(tokens.tolist()) <= {0, 70, 199}
        np.testing.assert_allclose(logprobs.numpy(), np.log(1 / 3), rtol=0, atol=1e-6)
    edge, _ = module.pick(
        torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(6, -1), u, GenerationOptions()
    )
    assert set(edge.tolist()) <= {0, 2}


def test_masked_tokens_are_never_drawn():
    check_masked_tokens_are_never_drawn(sampling)
    with pytest.raises(AssertionError):
        check_masked_tokens_are_never_drawn(
            with_bug(
                sampling,
                "fraction * running[:, -1:], right=True",
                "2 * fraction * running[:, -1:], right=False",
            )
        )


def test_ties_at_the_edge_stay_in_together():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert torch.isfinite(sampling.restrict(logits, 2, 1.0)).tolist() == [[True] * 4 + [False]]
    kept = sampling.restrict(logits, 0, 0.8)  # 0.69 + 0.09 < 0.8 <= 0.69 + 0.19
    assert torch.isfinite(kept).tolist() == [[True] * 4 + [False]]


def test_greedy_takes_the_likeliest_with_certainty():
    logits = torch.randn(7, 90, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sampling.pick(
        logits, torch.rand(7).double(), GenerationOptions(temperature=0)
    )
    assert tokens.tolist() == logits.argmax(dim=1).tolist()
    assert logprobs.tolist() == [0.0] * 7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_give_nan_logprobs(temperature):
    logits = torch.zeros(3, 70)
    logits[1, 5] = torch.nan
    options = GenerationOptions(temperature=temperature)
    _, logprobs = sampling.pick(logits, torch.full((3,), 0.5, dtype=torch.float64), options)
    assert logprobs.isnan().tolist() == [False, True, False]


def test_bad_options_are_named_together():
    options = GenerationOptions(max_new_tokens=0, temperature=-1.0, top_k=-2, top_p=0.0, stop=[""])
    with pytest.raises(ConfigError) as error:
        check_options(options)
    for part in (
        "max_new_tokens=0",
        "temperature=-1.0",
        "top_k=-2",
        "top_p=0.0",
        "generation.stop",
    ):
        assert part in str(error.value)
    check_options(GenerationOptions())


@pytest.mark.parametrize(
    "settings",
    [{"min_p": 0.1}, {"min_p": 0.3, "top_k": 20}, {"min_p": 0.02, "temperature": 1.7, "top_p": 0.9},
     {"repetition_penalty": 1.5}, {"repetition_penalty": 0.7, "min_p": 0.05, "temperature": 0.6}],
)  # fmt: skip
def test_min_p_and_repetition_penalty_are_those_of_transformers(settings):
    """The distribution drawn from, read off the log-probabilities, is the one transformers' processors leave."""
    from transformers.generation import logits_process as theirs

    rows, vocab = 3, 40
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, vocab, generator=rng, dtype=torch.float64) * 3
    before = torch.randint(vocab, (rows, 12), generator=rng)
    chain = [
        theirs.RepetitionPenaltyLogitsProcessor(settings.get("repetition_penalty", 1.0)),
        theirs.TemperatureLogitsWarper(settings.get("temperature", 1.0)),
        theirs.TopKLogitsWarper(settings.get("top_k", vocab)),
        theirs.TopPLogitsWarper(settings.get("top_p", 1.0)),
        theirs.MinPLogitsWarper(settings.get("min_p", 0.0)),
    ]
    expected = logits.clone()
    for processor in chain:
        expected = processor(before, expected)
    expected = torch.softmax(expected, dim=-1)
    seen = torch.zeros(rows, vocab, dtype=torch.bool).scatter_(1, before, True)

    def drawn(module):
        n = 4000
        sweep = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        worst = 0.0
        for row in range(rows):
            tokens, logprobs = module.pick(
                logits[row].expand(n, -1),
                sweep,
                GenerationOptions(**settings),
                seen[row].expand(n, -1),
            )
            share = torch.bincount(tokens, minlength=vocab) / n
            worst = max(worst, (share - expected[row]).abs().max().item() - 1.01 / n)
            worst = max(worst, (logprobs.exp() - expected[row][tokens]).abs().max().item() - 1e-9)
        return worst

    assert drawn(sampling) <= 0
    bug = (
        ("+ math.log(min_p)", "+ math.log(min_p) / 2")
        if "min_p" in settings
        else ("scaled > 0", "scaled < 0")
    )
    assert drawn(with_bug(sampling, *bug)) > 0
