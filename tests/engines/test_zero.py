"""DeepSpeed on two processes against one process, at every stage; whole training runs are in the matrix."""

import json
import math
from pathlib import Path

import on_zero
import pytest

from distllm.testing.gloo import run_on

pytest.importorskip("deepspeed")

TESTS = Path(__file__).resolve().parents[1]
FAST = {"zero 3": {"zero_stage": 3}, "zero 2": {"zero_stage": 2}}
OTHERS = {
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 2, offload": {"zero_stage": 2, "offload_optimizer": True},
    "zero 3, offload": {"zero_stage": 3, "offload_optimizer": True, "offload_param": True},
    "zero 3, checkpointed": {"zero_stage": 3, "activation_checkpointing": "full"},
}
EQUAL = ("learning", "resuming", "skipping", "quartet")
"""Checks whose results must be those of one process."""


@pytest.fixture(scope="module")
def single():
    """Return what one process finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS / "train")
        return json.loads(json.dumps(on_zero.run("single", [[{}, None]])))[0]


def launch(variants, timeout_s):
    """Run variants (options, checks), all in one launch of two processes; return what each rank found."""
    # At the usual sizes no weight of these models would ever be cut, and all gradients would travel in one bucket.
    file = str(TESTS / "engines" / "small_parts.json")
    made = [[{"config": file, **changes}, checks] for changes, checks in variants]
    arguments = {"engine": "deepspeed", "variants": made}
    paths = [TESTS / "engines", TESTS / "train", TESTS]
    return run_on(2, "on_zero:run", arguments, path=paths, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def found():
    """Return variant -> check -> what rank 0 found; `rank 1` -> the same of rank 1."""
    variants = [(FAST["zero 3"], [*on_zero.CHECKS, "controls"])]
    variants += [(FAST["zero 2"], ["learning", "resuming", "skipping"])]
    ranks = launch(variants, 280)
    return dict(zip(FAST, ranks[0], strict=True)) | {"rank 1": ranks[1][0]}


@pytest.fixture(scope="module")
def found_slowly():
    checks = [c for c in on_zero.CHECKS if c != "sampling"]
    ranks = launch([(changes, checks) for changes in OTHERS.values()], 900)
    return dict(zip(OTHERS, ranks[0], strict=True))


def worst(a, b, path=""):
    """Return (largest difference, where): of numbers relative, infinite where anything else differs."""
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return max((worst(a[k], b[k], f"{path}/{k}") for k in a), default=(0.0, path))
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return max((worst(x, y, f"{path}/{i}") for i, (x, y) in pairs), default=(0.0, path))
    if isinstance(a, float) and isinstance(b, float) and math.isfinite(a) and math.isfinite(b):
        return abs(a - b) / max(abs(a), 1.0), path
    return (0.0 if a == b or (a != a and b != b) else math.inf), path


@pytest.mark.parametrize("check", EQUAL)
def test_stage_3_equals_one_process(single, found, check):
    difference, where = worst(single[check], found["zero 3"][check])
    assert difference < 1e-5, where


@pytest.mark.parametrize("check", ["learning", "resuming", "skipping"])
def test_stage_2_equals_one_process(single, found, check):
    difference, where = worst(single[check], found["zero 2"][check])
    assert difference < 1e-5, where


def test_a_resumed_run_goes_on_as_if_undisturbed(found):
    for variant in FAST:
        resuming = found[variant]["resuming"]
        assert resuming["resumed"] == resuming["undisturbed"]
        assert resuming["kept"] and resuming["steps"] == [2.0]


def test_steps_that_are_not_finite_leave_everything_alone(found):
    for variant in FAST:
        assert found[variant]["skipping"][:4] == [True, True, True, True]


def test_a_rollout_gathers_once_whatever_its_length(single, found):
    """And ranks may have different amounts to do."""
    assert found["zero 3"]["sampling"]["rollouts"] == single["sampling"]["rollouts"]
    assert found["rank 1"]["sampling"]["rollouts"] == single["sampling"]["rollouts"][:1]
    short, long = found["zero 3"]["sampling"]["counts"]
    num_weights = len(found["zero 3"]["learning"]["policy-token"]["weights"])
    assert 0 < short == long <= num_weights
    assert found["rank 1"]["sampling"]["counts"] == [short, long]
    difference, where = worst(single["sampling"]["learned"], found["zero 3"]["sampling"]["learned"])
    assert difference < 1e-5, where


def test_bf16_learns_the_same_with_fp32_master_weights(single, found):
    assert found["zero 3"]["lowered"]["master"] == ["torch.float32"]
    for ours, theirs in zip(
        found["zero 3"]["lowered"]["losses"], single["lowered"]["losses"], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=3e-3)


def test_the_bugs_that_this_would_find(single, found):
    controls, right = found["zero 3"]["controls"], single["learning"]["sft"]
    mean = controls["mean over ranks"]
    assert mean["norms"][0] == pytest.approx(right["norms"][0] / 2, rel=1e-4)
    decay = controls["decay by the shapes of parts"]
    assert worst(right["weights"], decay["weights"])[0] > 1e-5
    left = controls["a gradient left behind"]
    assert abs(left["norms"][0] / right["norms"][0] - 1) > 0.1


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("check", [*EQUAL, "lowered"])
@pytest.mark.parametrize("variant", OTHERS)
def test_other_stages_equal_one_process(single, found_slowly, variant, check):
    difference, where = worst(single[check], found_slowly[variant][check])
    assert difference < (3e-3 if check == "lowered" else 1e-5), where
