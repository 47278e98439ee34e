"""One loss curve, whatever the engine: every stage under every engine against one process."""

import json
import os
from pathlib import Path

import pytest
from matrix import CELLS, STAGES, TOLERANCE, differences, run

from distllm.testing.gloo import run_on
from distllm.testing.stages import SKILLS, run_tiny, tiny_model

FAST = ("fsdp x2",)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Run every stage on one process; return the arguments of `run` that all cells share."""
    folder = tmp_path_factory.mktemp("matrix")
    parent = tiny_model(folder)
    judged = ["stage=reward", *SKILLS, f"model='{parent}'", "train.max_steps=4", "optim.lr=0.01"]
    run_tiny(folder / "judge", judged)
    shared = {
        "text": str(folder / "text.txt"),
        "parent": str(parent),
        "judge": str(folder / "judge" / "model"),
        "rollouts": str(folder / "rollouts"),
    }
    run(folder=str(folder / "single"), settings=["engine=single"], **shared)
    return folder, shared


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CELLS]
)
def test_ten_steps_equal_those_of_one_process(single, cell):
    folder, shared = single
    num_processes, settings = CELLS[cell]
    here = folder / cell.replace(" ", "-").replace(",", "")
    arguments = {**shared, "folder": str(here), "settings": settings}
    run_on(num_processes, "matrix:run", arguments, path=[Path(__file__).parent], timeout_s=800)
    found = differences(folder / "single", here)
    if os.environ.get("DISTLLM_MATRIX_DIR"):
        kept = Path(os.environ["DISTLLM_MATRIX_DIR"]) / f"{here.name}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"cell": cell, "stages": found}, indent=1) + "\n")
    for stage in STAGES:
        for quantity, limit in TOLERANCE.items():
            assert found[stage][quantity] <= limit, (stage, quantity, found)
        assert found[stage]["samples"] == 1.0, (stage, "greedy responses differ")
