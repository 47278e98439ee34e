"""Worked solutions: learned from as a whole, compared by what stands behind the marker."""

import json

import pytest

from distllm.data.options import DataOptions
from distllm.data.source import final_answer, open_source
from distllm.errors import DataError
from distllm.train.evaluate import Answers
from distllm.types import Prompt

ROWS = [
    {"question": f"{n} + 1?", "answer": f"{n} plus 1 is {n + 1}.\n#### {n + 1}"} for n in range(9)
]


def opened(tmp_path, rows, **columns):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(name="file", path=str(file), columns=columns, answer_after="####")
    return open_source(options, 0)


def test_a_solution_is_learned_whole_and_asked_for_its_end(tmp_path):
    source = opened(tmp_path, ROWS, prompt="question", completion="answer")
    dialogue, prompt = source.dialogues("train")[0], source.prompts("train")[0]
    n = int(dialogue.messages[0]["content"].split()[0])
    assert dialogue.messages[-1]["content"] == ROWS[n]["answer"]
    assert (prompt.messages, prompt.answer) == (dialogue.messages[:-1], str(n + 1))
    assert source.checkable
    said = source.texts()
    assert said is not None and ROWS[n]["question"] in said and ROWS[n]["answer"] in said


def test_a_solution_without_an_end_is_named(tmp_path):
    rows = [*ROWS, {"question": "?", "answer": "no idea"}]
    with pytest.raises(DataError, match=r"line 10: answer holds nothing behind '####'"):
        opened(tmp_path, rows, prompt="question", completion="answer").dialogues("train")


@pytest.mark.parametrize(
    ("text", "right"),
    [("so 3\n#### 4", True), ("#### 3, no: #### 4 ", True), ("4", True), ("4\n#### 5", False)],
)
def test_responses_are_compared_by_their_end(text, right):
    class Example:
        prompt = Prompt(messages=[], answer="4")

    assert Answers([Example()], [], [text], "####").correct == [right]
    assert final_answer(text, "") == text
