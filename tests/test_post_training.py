"""The guide to post-training: its commands run, its rows are what it says they are, and what it lists exists."""

import json
import re
import shlex
from pathlib import Path

import pytest

from distllm import registry
from distllm.cli.main import main
from distllm.data.intake import Intake
from distllm.data.options import DataOptions
from distllm.data.rows import forms
from distllm.testing.stages import SKILLS, TINY
from distllm.tracking.advice import RULES

GUIDE = (Path(__file__).parents[1] / "docs/post_training.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\{.*\})` \| (.+) \|$", GUIDE, re.MULTILINE)
TOY = [*TINY, *(s for s in SKILLS if s != "data=skills"), "train.max_steps=2"]


def table_of(heading):
    """Return what stands in the first column of the tables below a heading, between backticks."""
    part = GUIDE.partition(heading)[2].partition("\n## ")[0]
    return {n for cell in re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE) for n in re.findall(r"`([a-z_]+)`", cell)}  # fmt: skip


@pytest.mark.parametrize(("row", "title"), ROWS)
def test_each_row_is_taken_for_what_the_guide_says(row, title, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(row + "\n")
    intake = Intake(str(file), "data.path", DataOptions(name="file", path=str(file)))
    (record,) = intake
    (decision,) = intake.decisions.values()
    assert (decision.form.title, intake.bad) == (title, [])
    assert isinstance(record, decision.form.record)
    assert set(json.loads(row)) >= set(decision.form.columns)


def test_every_kind_of_record_has_a_row():
    assert {form.record for form in forms()} == {
        f.record for f in forms() if f.title in {title for _, title in ROWS}
    }


def test_every_algorithm_reward_and_advice_is_listed():
    assert table_of("## Reinforcement learning") == set(registry.names("algorithm"))
    assert table_of("## Rewards and environments") == set(registry.names("reward")) - {"function"}
    assert table_of("## What to watch") == {rule.name for rule in RULES}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    """In order, in one empty directory that holds the guide's reward function."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n# my_rewards.py\n(.*?)```", GUIDE, re.DOTALL)
    Path("my_rewards.py").write_text(code)
    (block,) = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines():
        verb, *arguments = shlex.split(line)[1:]
        small = {"train": TOY, "evaluate": ["data.num_heldout=8", "train.num_eval_samples=8", "train.seq_len=64"]}  # fmt: skip
        given = [*arguments, *small.get(verb, [])]
        if "calculator" in line:
            given = [a for a in given if not a.startswith("data.tasks")]
        code = main([verb, *given])
        output = capsys.readouterr()
        assert code == 0, f"{line}\n{output.out}\n{output.err}"
    assert Path("runs/report.html").exists()
    assert Path("runs/reliability.svg").exists()
