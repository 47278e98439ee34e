"""The preference losses on the enumerated world: their gradients against finite differences of each paper's equation.

The equations are written in numpy, from the papers, on log-probabilities that `World` computes; nothing is shared with the
objectives but the table of logits.
"""

import numpy as np
import pytest
from checklist import noticed
from oracle import END, PROMPT, RESPONSES, ROWS, VOCAB, Table, World, row_of

from distllm import registry
from distllm.data.datasets import PairExample, UnpairedExample
from distllm.objectives import dpo, kto, orpo, simpo
from distllm.testing.tiny import single_engine

PICKED = [(3, 9), (0, 14), (12, 5), (7, 1), (13, 2)]
"""(chosen, rejected) of `RESPONSES`: equal and different lengths, ended and cut."""
STEP = 1e-6
CLOSE = {"rtol": 0, "atol": 2e-9}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Logits(World):
    """A world whose table may be moved."""

    def __init__(self, logits):
        self.logits = logits

    def total(self, response):
        return self.logprobs(response).sum()

    def mean(self, response):
        return self.logprobs(response).mean()


def dpo_sigmoid(now, ref, w, y, beta=0.5, e=0.0):
    h = beta * (now.total(w) - ref.total(w) - now.total(y) + ref.total(y))
    return -(1 - e) * np.log(sigmoid(h)) - e * np.log(sigmoid(-h))


def dpo_robust(now, ref, w, y, beta=0.5, e=0.1):
    right, wrong = dpo_sigmoid(now, ref, w, y, beta), dpo_sigmoid(now, ref, y, w, beta)
    return ((1 - e) * right - e * wrong) / (1 - 2 * e)


def dpo_hinge(now, ref, w, y, beta=0.5):
    return max(0.0, 1 - beta * (now.total(w) - ref.total(w) - now.total(y) + ref.total(y)))


def dpo_ipo(now, ref, w, y, beta=0.5):
    return (now.mean(w) - ref.mean(w) - now.mean(y) + ref.mean(y) - 1 / (2 * beta)) ** 2


def simpo_loss(now, ref, w, y, beta=2.0, gamma=1.0):
    return -np.log(sigmoid(beta * now.mean(w) - beta * now.mean(y) - gamma))


def orpo_odds(now, ref, w, y):
    def log_odds(text):
        p = np.exp(now.mean(text))
        return np.log(p / (1 - p))

    return -np.log(sigmoid(log_odds(w) - log_odds(y)))


PAIR_LOSSES = {
    "sigmoid": ("dpo", {"beta": 0.5}, dpo_sigmoid),
    "smoothed": (
        "dpo",
        {"beta": 0.5, "label_smoothing": 0.2},
        lambda *a: dpo_sigmoid(*a, e=0.2),
    ),
    "robust": ("dpo", {"beta": 0.5, "loss": "robust", "label_smoothing": 0.1}, dpo_robust),
    "hinge": ("dpo", {"beta": 0.5, "loss": "hinge"}, dpo_hinge),
    "ipo": ("dpo", {"beta": 0.5, "loss": "ipo"}, dpo_ipo),
    "simpo": ("simpo", {}, simpo_loss),
    "orpo": ("orpo", {"sft_coef": 0.0, "odds_coef": 1.0}, orpo_odds),
}
BUGS = {
    "sigmoid": (dpo, "logits = options.beta * (chosen - rejected)", "logits = options.beta * chosen"),
    "smoothed": (dpo, "sides.confidences * (1 - noise) +", "sides.confidences +"),
    "robust": (dpo, "/ (1 - 2 * noise)", "/ 1"),
    "hinge": (dpo, "F.relu(1 - logits)", "F.relu(2 - logits)"),
    "ipo": (dpo, "1 / (2 * options.beta)", "1 / options.beta"),
    "simpo": (simpo, " - self.options.margin", ""),
    "orpo": (orpo, " - (_log_complement(chosen) - _log_complement(rejected))", ""),
}  # fmt: skip


def finite_difference(loss, table):
    """Differentiate `loss(Logits)` at every logit that a response meets, by central differences."""
    logits = table.table.detach().numpy().copy()
    found = np.zeros((ROWS, VOCAB))
    for row in {row_of(r[:t]) for r in RESPONSES for t in range(len(r))}:
        for column in range(VOCAB):
            ends = []
            for step in (STEP, -STEP):
                moved = logits.copy()
                moved[row, column] += step
                ends.append(loss(Logits(moved)))
            found[row, column] = (ends[0] - ends[1]) / (2 * STEP)
    return found


def gradient_of(objective, examples, policy, reference):
    """Return the gradient that an engine would apply for one batch."""
    engine, frozen = single_engine(policy), single_engine(reference, trained=False)
    batch = objective.collate(examples)
    objective.prepare(engine, frozen, [examples], [batch])
    engine.forward_backward(objective, [batch], objective.weights(batch))
    return policy.table.grad.numpy().copy()


def make_objective(name, options, policy):
    cls = registry.get("objective", name)
    return cls(cls.Options(**options), END, policy.join)


def pairs():
    return [
        PairExample(list(PROMPT), list(RESPONSES[w]), list(RESPONSES[y]), "", i)
        for i, (w, y) in enumerate(PICKED)
    ]


def check_pairs(name):
    stage, options, equation = PAIR_LOSSES[name]
    policy, reference = Table(seed=1), Table(seed=2)
    found = gradient_of(make_objective(stage, options, policy), pairs(), policy, reference)
    ref = Logits(reference.table.detach().numpy())
    stated = finite_difference(
        lambda now: np.mean([equation(now, ref, RESPONSES[w], RESPONSES[y]) for w, y in PICKED]),
        policy,
    )
    np.testing.assert_allclose(found, stated, **CLOSE)
    assert np.abs(stated).max() > 1e-2


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_pairs_gradient_is_that_of_the_papers_equation(name):
    check_pairs(name)
    noticed(lambda: check_pairs(name), *BUGS[name])


def test_orpo_imitates_the_chosen_answers_besides():
    policy, reference = Table(seed=1), Table(seed=2)
    options = {"sft_coef": 1.0, "odds_coef": 0.1}
    found = gradient_of(make_objective("orpo", options, policy), pairs(), policy, reference)

    def whole(now):
        chosen = [RESPONSES[w] for w, _ in PICKED]
        odds = np.mean([orpo_odds(now, None, RESPONSES[w], RESPONSES[y]) for w, y in PICKED])
        return 0.1 * odds - sum(map(now.total, chosen)) / sum(map(len, chosen))

    np.testing.assert_allclose(found, finite_difference(whole, policy), **CLOSE)


def check_kto(seed):
    """Ethayarajh et al. 2024, equation 8; z is a number, not a function of the policy. `seed` moves z above or to 0."""
    policy, reference = Table(seed=seed), Table(seed=2)
    texts = [(RESPONSES[i], i % 2 == 0, RESPONSES[14 - i]) for i in (0, 3, 6, 9, 12)]
    examples = [
        UnpairedExample(list(PROMPT), list(text), good, i, list(other))
        for i, (text, good, other) in enumerate(texts)
    ]
    options = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    found = gradient_of(make_objective("kto", options, policy), examples, policy, reference)
    ref, start = World(reference), Logits(policy.table.detach().numpy())
    gaps = [start.total(o) - np.sum(ref.logprobs(o)) for *_, o in texts]
    z = max(0.0, float(np.mean(gaps)))

    def loss(now):
        total = 0.0
        for text, good, _ in texts:
            r = now.total(text) - np.sum(ref.logprobs(text))
            total += 1.5 * (1 - sigmoid(0.5 * (r - z))) if good else 0.8 * (1 - sigmoid(0.5 * (z - r)))  # fmt: skip
        return total / len(texts)

    np.testing.assert_allclose(found, finite_difference(loss, policy), **CLOSE)
    return z


def test_ktos_gradient_is_that_of_the_papers_equation():
    baselines = [check_kto(seed) for seed in range(8)]
    assert 0.0 in baselines and max(baselines) > 0.01
    lead = "torch.where(good, ratios - baseline, baseline - ratios)"
    noticed(
        lambda: [check_kto(seed) for seed in range(8)],
        kto,
        lead,
        "torch.where(good, ratios, -ratios)",
    )


def test_equal_answers_of_policy_and_reference_still_teach():
    """At the start h = 0: the loss is log 2 and the gradient -beta / 2 (d log pi(w) - d log pi(l))."""
    policy = Table(seed=1)
    found = gradient_of(
        make_objective("dpo", {"beta": 0.5}, policy), pairs(), policy, Table(seed=1)
    )
    world = World(policy)
    stated = -0.25 * np.mean(
        [world.score_function(RESPONSES[w]) - world.score_function(RESPONSES[y]) for w, y in PICKED], axis=0
    )  # fmt: skip
    np.testing.assert_allclose(found, stated, rtol=0, atol=1e-12)
