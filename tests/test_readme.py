"""Every command of the README runs, at toy size where it trains."""

import re
import shlex
from pathlib import Path

import pytest

from distllm.cli import plan
from distllm.cli.main import main
from distllm.testing.stages import SKILLS, TINY

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("distllm ")
]
TOY = {
    "train": [*TINY, *(s for s in SKILLS if s != "data=skills"), "train.max_steps=2"],
    "pipeline": ["arch.d_model=16", "arch.n_layers=1", "arch.d_ff=32", "hardware.threads=1"],
    "evaluate": [
        "train.num_eval_samples=4",
        "data.num_heldout=8",
        "train.seq_len=64",
        "hardware.threads=1",
    ],
}


def test_there_is_a_command_for_every_stage():
    shown = {word for command in COMMANDS for word in command}
    assert {f"stage={s}" for s in ("pretrain", "sft", "reward", "ppo", "grpo")} <= shown


@pytest.mark.timeout(280)
def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """In order, in one empty directory: later commands use what earlier ones made."""
    monkeypatch.chdir(tmp_path)
    for verb, *arguments in COMMANDS:
        code = main([verb, *arguments, *TOY.get(verb, [])])
        output = capsys.readouterr()
        assert code == 0, f"distllm {verb} {' '.join(arguments)}\n{output.out}\n{output.err}"
    assert (tmp_path / "runs/report.html").exists()
    assert (tmp_path / "runs/exported/model.safetensors").exists()


def test_every_plan_of_the_text_and_of_the_help_is_one(capsys):
    told = re.findall(r"`distllm (plan [^`]+)`", README)
    told += re.findall(r"^  distllm (plan .*hardware=.*)$", plan.HELP, re.MULTILINE)
    assert len(told) >= 3
    for words in told:
        assert main(shlex.split(words)) == 0, words
        assert "step" in capsys.readouterr().out
