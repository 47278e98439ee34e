"""Rows and prompts that post-training cannot use: what is wrong, in which file and line."""

import json

import pytest

from distllm.errors import DataError, UserError
from distllm.testing.stages import run_tiny

USER = {"role": "user", "content": "two and two?"}
ANSWER = {"role": "assistant", "content": "four"}
CASES = {
    "equal sides": (
        "dpo",
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "b", "chosen": "same", "rejected": "same"},
        ["rows.jsonl line 3", "'same'"],
    ),
    "empty completion": (
        "sft",
        {"prompt": "a", "completion": "yes"},
        {"prompt": "b", "completion": ""},
        ["rows.jsonl line 3", "completion", "empty"],
    ),
    "ends with the user": (
        "sft",
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER, USER]},
        ["rows.jsonl line 3", "messages", "ends with user"],
    ),
    "prompt longer than the budget": (
        "grpo",
        {"prompt": "short"},
        {"prompt": "long words " * 40},
        ["rows.jsonl line 3", "tokens", "limit of 64"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_bad_row_is_named_with_its_place_and_reason(name, tmp_path, parent):
    stage, good, bad, words = CASES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [good, good, bad] + [good] * 9))
    settings = [f"stage={stage}", "data=file", f"data.path='{path}'", f"model='{parent}'", "generation.max_new_tokens=6"]  # fmt: skip
    if stage == "grpo":
        settings += ["stage.reward=regex", "stage.reward_pattern=a"]
    with pytest.raises(DataError) as caught:
        run_tiny(tmp_path / "run", settings)
    assert isinstance(caught.value, UserError)
    for word in words:
        assert word in str(caught.value), str(caught.value)
