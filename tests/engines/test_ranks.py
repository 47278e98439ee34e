"""Two processes against one: the law of the step, sampling, and what ranks tell each other."""

from pathlib import Path

import pytest

from distllm.testing.gloo import run_on

TESTS = Path(__file__).resolve().parents[1]
PATHS = [TESTS / "engines", TESTS / "train", TESTS]
LAYOUTS = ["ddp", "fsdp", "no_sync", "hsdp", "tp"]


@pytest.fixture(scope="module")
def ranks():
    """One launch for all checks."""
    return run_on(2, "on_ranks:checks", path=PATHS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_those_of_one_process(ranks, layout):
    for rank in ranks:
        right = {k: v for k, v in rank["law"][layout].items() if k.endswith("right")}
        assert len(right) >= 2
        assert max(right.values()) < 1e-10, right


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_norm_is_that_of_the_whole(ranks, layout):
    for rank in ranks:
        norms = {k: v for k, v in rank["law"][layout].items() if k.endswith("norm")}
        assert max(norms.values()) < 1e-10, norms
        # torch adds 1e-6 to the norm before it divides by it
        clipped = {k: v for k, v in rank["law"][layout].items() if k.endswith("clipped")}
        assert max(clipped.values()) < 1e-5, clipped


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp"])
def test_a_mean_of_means_over_ranks_would_be_noticed(ranks, layout):
    wrong = {k: v for k, v in ranks[0]["law"][layout].items() if k.endswith("own weights")}
    assert min(wrong.values()) > 1e-4, wrong


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_item_39_a_rollout_gathers_the_weights_once_whatever_its_length(ranks, layout):
    for rank in ranks:
        found = rank["sampling"][layout]
        few, many, through_the_wrapper = found["counts"]
        assert few == many > 0
        few_with_bug, many_with_bug = found["with a message per forward"]
        assert few_with_bug < many_with_bug, "the count would notice the bug"
        assert found["weights"] and found["greedy"] and found["on meta again"]
        if layout == "fsdp":
            assert many == 3  # two blocks, and what lies around them
            assert through_the_wrapper == 5 * 3  # what a forward per token would cost


def test_messages(ranks):
    for number, rank in enumerate(ranks):
        found = rank["messages"]
        assert found["tensors"] == [{"t0": [0, 1, 2], "n": 0}, {"t1": [0, 1, 2, 3], "n": 1}]
        assert found["order"] == ["t0t1t2t3t4t5"] * 2  # checkpoints are divided by it
        assert found["json"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 70}]
        assert found["any"] == [True, False]
        assert found["sum"] == {"a": 3.0}
        assert found["main"] == {"from": 0}
        kind = "DataError" if number == 1 else "OtherRankError"
        assert found["error"][0] == kind
        assert "line 7 is broken" in found["error"][1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_obey_the_law_too():
    for rank in run_on(2, "on_ranks:compiled", path=PATHS, timeout_s=800):
        for name, found in rank.items():
            assert found["sft right"] < 1e-10, name
