"""PPO's quartet with its weights cut: gathered once per rollout, nobody left waiting, prompts and rewards paired."""

from pathlib import Path

import on_rollouts
import pytest

from distllm.testing.gloo import run_on

HERE = Path(__file__).parent
PATHS = [HERE, HERE.parent / "train"]
CUT = {
    "fsdp": {"engine": "fsdp"},
    "zero 3": {"engine": "deepspeed", "zero_stage": 3, "config": str(HERE / "small_parts.json")},
}


@pytest.fixture(scope="module")
def single():
    return on_rollouts.run("single")


@pytest.mark.parametrize("cut", ["fsdp", pytest.param("zero 3", marks=pytest.mark.slow)])
def test_the_quartet_is_cut_and_rollouts_are_those_of_one_process(single, cut):
    ranks = run_on(2, "on_rollouts:run", CUT[cut], path=PATHS)
    for found in ranks:
        short, long = found
        # The number of messages does not depend on how many tokens are sampled.
        assert 0 < short["calls"] == long["calls"]
    for number, expected in enumerate(single):
        lengths = {len(response) for _, _, response, *_ in expected["kept"]}
        assert len(lengths) > 1  # some end early
        for index, prompt, response, score, _ in expected["kept"]:
            assert prompt == on_rollouts.PROMPTS[index]
            assert score == on_rollouts.judge(prompt, response)
        # Each rank keeps its own part of the rollouts, or all: together they are those of one process.
        found = {repr(k[:4]): k for rank in ranks for k in rank[number]["kept"]}
        assert found.keys() == {repr(k[:4]) for k in expected["kept"]}
        for kept in expected["kept"]:
            assert found[repr(kept[:4])][4] == pytest.approx(kept[4], rel=1e-4, abs=1e-5)
