"""The formulas of `distllm plan` against published runs."""

import importlib.util
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distllm.config import step_time

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_published.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("plan_published", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_published"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(script):
    return script.compare(script.RUNS)


def test_the_numbers_in_the_code_are_those_of_the_fit(found):
    assert asdict(step_time.Efficiency()) == pytest.approx(found["efficiency"], rel=0.01)


def test_most_step_times_are_within_a_fifth_and_most_memory_within_a_tenth(found):
    time, memory = found["summary"]["step time"], found["summary"]["memory"]
    assert time["runs"] >= 15 and memory["runs"] >= 10
    assert sum(row["calibrates"] for row in found["rows"]) == 5
    assert time["within"] / time["runs"] > 0.8 and time["median_error"] < 0.1
    assert memory["within"] / memory["runs"] > 0.6 and memory["median_error"] < 0.1


def test_the_shapes_have_the_published_numbers_of_parameters(found):
    for name, error in found["parameter_errors"].items():
        assert abs(error) < 0.06, name


def test_what_the_fit_never_saw_decides(script):
    """Worse numbers for attention show in the runs that were not fitted."""
    runs = [replace(run, tokens_per_s=(run.tokens_per_s or 0) * 2) if run.calibrates else run
            for run in script.RUNS]  # fmt: skip
    time = script.compare(runs)["summary"]["step time"]
    assert time["within"] / time["runs"] < 0.5


def test_the_page_is_the_one_that_the_script_writes(script, found):
    page = (script.ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert page.count("\n| ") == script.markdown(found).count("\n| ")
