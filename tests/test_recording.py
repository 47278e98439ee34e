"""`make test-all` writes commit, date and result of each part of the tests into a row of its own; with pytest itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from recording import COLUMNS, parts

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
    pytest.skip("no such   machine|tool")
"""


@pytest.fixture
def project(tmp_path):
    """Return a project of two folders of tests, with the hooks of this one."""
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\ntestpaths = ['tests']\naddopts = \"-m 'not slow'\"\nmarkers = ['slow: x']\n"
    )
    hooks = (ROOT / "tests/conftest.py").read_text()
    for part, good in (("good", True), ("bad", False)):
        (tmp_path / "tests" / part).mkdir(parents=True)
        (tmp_path / f"tests/{part}/test_{part}.py").write_text(TESTS.format(good=good))
    (tmp_path / "tests/test_top.py").write_text("def test_fine(): pass\n")
    path = f"import sys\nsys.path[:0] = ['{ROOT}/tests', '{ROOT}']\n"
    (tmp_path / "tests/conftest.py").write_text(path + hooks)
    return tmp_path


def run(project, *words):
    """Run pytest, with no other plugin than that for time limits."""
    command = [sys.executable, "-m", "pytest", "-p", "pytest_timeout", *words]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


def rows(project):
    """Return part -> column -> value of the table."""
    text = (project / "docs/test_all.md").read_text()
    lines = [re.split(r"(?<!\\)\|", x)[1:-1] for x in text.splitlines() if x.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[0] == list(COLUMNS)
    return {line[0]: dict(zip(COLUMNS, line, strict=True)) for line in cells[1:]}


def test_each_run_writes_its_own_row(project):
    assert run(project, "--record-part=bad").returncode == 1
    first = rows(project)
    assert list(first) == [".", "bad", "good"]
    assert first["good"]["Result"] == first["."]["Result"] == "not run"
    assert first["bad"]["Result"] == "**FAILED**"
    assert [first["bad"][c] for c in ("Passed", "Failed", "Skipped")] == ["2", "1", "1"]
    assert "failed: `tests/bad/test_bad.py::test_bad`" in first["bad"]["Notes"]
    assert r"skipped: no such machine\|tool" in first["bad"]["Notes"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", first["bad"]["Date"])
    assert first["bad"]["Commit"] == "unknown (not a git checkout)"

    for command in (
        "init -q .",
        "add tests",
        "-c user.name=a -c user.email=a@b commit -q -m 'Add tests'",
    ):
        subprocess.run(f"git {command}", shell=True, cwd=project, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True
    ).stdout
    for part in ("good", "."):
        done = run(project, f"--record-part={part}")
        assert done.returncode == 0, done.stdout
    second = rows(project)
    assert second["bad"] == first["bad"]
    assert second["good"]["Result"] == second["."]["Result"] == "passed"
    assert [second["good"][c] for c in ("Passed", "Failed", "Skipped")] == ["3", "0", "1"]
    assert second["."]["Passed"] == "1"
    assert second["good"]["Commit"] == f"`{head[:12]}`"

    (project / "tests/good/test_good.py").unlink()
    (project / "tests/test_top.py").write_text("import nowhere\n")
    assert run(project, "--record-part=.").returncode == 2
    third = rows(project)
    assert list(third) == [".", "bad"]
    assert third["."]["Result"] == "**NOT FINISHED** (pytest exited with 2)"
    assert third["."]["Commit"].endswith("with changes that are not committed")


@pytest.mark.parametrize("more", [["tests/good/test_good.py"], ["-k", "good"]])
def test_less_than_a_part_is_not_recorded(project, more):
    done = run(project, "--record-part=good", *more)
    assert done.returncode == 4 and "takes a whole part" in done.stderr
    assert not (project / "docs/test_all.md").exists()


def test_an_unknown_part(project):
    done = run(project, "--record-part=god")
    assert done.returncode == 4 and "there is no part god. There are: . bad good" in done.stderr


def test_patience_stretches_the_time_of_every_test(project, monkeypatch):
    slow = "import time, pytest\n@pytest.mark.timeout(1)\ndef test_slow(): time.sleep(1.5)\n"
    (project / "tests/test_top.py").write_text(slow)
    assert run(project, "tests/test_top.py").returncode == 1
    monkeypatch.setenv("DISTLLM_TEST_PATIENCE", "9")
    assert run(project, "tests/test_top.py").returncode == 0


def test_make_test_all_runs_every_part_and_the_table_shows_them():
    dry = ["make", "-n", "test-all"]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.search(r"for part in (.*); do", done.stdout).group(1).split()
    assert sorted(listed) == list(parts(ROOT)) == list(rows(ROOT))
    one = subprocess.run([*dry, "PART=engines"], cwd=ROOT, capture_output=True, text=True)
    assert "for part in engines; do" in one.stdout
