"""`--record` writes commit, date and result of a run of the tests, as `make test-all` does; with pytest itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

def test_good():
    pass

def test_bad():
    assert {good}

@pytest.mark.slow
def test_slow():
    pass

def test_elsewhere():
    pytest.skip("no such   machine")
"""


@pytest.mark.parametrize("good", [True, False])
def test_what_pytest_counts_is_written(tmp_path, good):
    (tmp_path / "test_some.py").write_text(TESTS.format(good=good))
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\naddopts = \"-m 'not slow'\"\nmarkers = ['slow: x']\n"
    )
    hooks = (ROOT / "tests/conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path[:0] = ['{ROOT}/tests']\n{hooks}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--record=all.md"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if good else 1), done.stdout
    text = (tmp_path / "all.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", text, re.MULTILINE))
    assert rows["Passed"] == ("2" if good else "1")
    assert rows["Failed"] == ("0" if good else "1")
    assert (rows["Skipped"], rows["Deselected"]) == ("1", "1")
    assert rows["Result"] == ("**passed**" if good else "**FAILED**")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", rows["Date"])
    assert "- no such machine" in text
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert rows["Commit"].startswith(f"`{head.stdout.strip()}`")


def test_make_test_all_runs_everything_and_records():
    text = (ROOT / "Makefile").read_text()
    assert '-m pytest -m "slow or not slow" --record=docs/test_all.md' in text
