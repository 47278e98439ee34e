"""Two processes against one: the law of the step, and what ranks tell each other."""

from pathlib import Path

import pytest

from distllm.testing.gloo import run_on

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ranks():
    """One launch for all checks."""
    return run_on(2, "on_ranks:checks", path=[TESTS / "engines", TESTS / "train"])


def test_gradients_equal_those_of_one_process(ranks):
    for rank in ranks:
        right = {k: v for k, v in rank["law"].items() if k.endswith("right")}
        assert len(right) == 5
        assert max(right.values()) < 1e-10, right


def test_a_mean_of_means_over_ranks_would_be_noticed(ranks):
    wrong = {k: v for k, v in ranks[0]["law"].items() if k.endswith("own weights")}
    assert min(wrong.values()) > 1e-4, wrong


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
