"""The same recorded rollouts give the same gradient for any micro-batches, packing, padding side and number of ranks."""

import pytest
import rl_on_ranks
from recorded import NAMES, case, gradients, largest_difference, padded_left, recorded

LAYOUTS = {
    "two": ([4, 4], {}),
    "one by one": ([1] * 8, {}),
    "uneven": ([5, 2, 1], {}),
    "packed": ([8], {"pack": True}),
    "packed in parts": ([5, 3], {"pack": True}),
    "padded left": ([8], {"change": padded_left}),
    "padded left in parts": ([3, 5], {"change": padded_left}),
}
CLOSE = 1e-10


def under(name, split, pack=False, **how):
    model, objective = case(name, pack=pack)
    return gradients(model, objective, recorded(), split, **how)


@pytest.mark.parametrize("name", NAMES)
def test_no_layout_changes_the_gradient(name):
    expected, losses = under(name, [8])
    assert max(g.abs().max() for g in expected.values()) > 1e-4
    for label, (split, how) in LAYOUTS.items():
        found, others = under(name, split, **how)
        assert largest_difference(expected, found) < CLOSE, label
        assert others == pytest.approx(losses, abs=1e-12), label


def test_packing_saves_columns():
    _, objective = case("grpo", pack=True)
    packed = objective.collate(recorded())
    _, objective = case("grpo")
    assert packed.input_ids.numel() < 0.8 * objective.collate(recorded()).input_ids.numel()


@pytest.mark.parametrize("name", ["grpo", "rloo", "value"])
def test_a_mean_of_means_would_be_noticed(name):
    expected, _ = under(name, [8])
    model, objective = case(name)
    from distllm.types import sum_by_key

    found = None
    for part in (recorded()[:5], recorded()[5:]):
        batch = objective.collate(part)
        own = {k: 2 * v for k, v in sum_by_key([objective.weights(batch)]).items()}
        found, _ = gradients(model, objective, part, [len(part)], totals=own)
    assert largest_difference(expected, found) > 1e-3


def test_ranks_change_no_gradient(on_two_ranks):
    """Two processes that hold uneven shares: the gradient after the reduction is that of one process."""
    for rank in on_two_ranks:
        assert set(rank["gradients"]) == set(NAMES)
        for name, difference in rank["gradients"].items():
            assert difference < CLOSE, name
        assert rank["own totals"] > 1e-3, "each rank's own mean would be noticed"


@pytest.mark.parametrize("name", ["grpo", "ppo", "remax", "dapo"])
def test_ranks_change_nothing_in_the_loop(on_two_ranks, name):
    """Sampling, scoring, baselines, whitening and updates of two processes are those of one."""
    alone = rl_on_ranks.loop(name)
    for rank in on_two_ranks:
        found = rank["loops"][name]
        assert [row[:3] for row in found["seen"]] == [row[:3] for row in alone["seen"]]
        for mine, theirs in zip(found["seen"], alone["seen"], strict=True):
            assert mine[3] == pytest.approx(theirs[3], abs=1e-5)
        assert found["metrics"] == pytest.approx(alone["metrics"], abs=1e-4)
        assert found["weights"][2] == pytest.approx(alone["weights"][2], abs=1e-3)
    first, second = (rank["loops"][name]["batches"] for rank in on_two_ranks)
    assert [count for count, _ in first] == [count for count, _ in second]
