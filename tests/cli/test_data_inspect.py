"""`distllm data inspect`: what a file is taken for, in this process."""

import json

from distllm.cli.main import main


def inspect(capsys, *arguments):
    capsys.readouterr()
    code = main(["data", "inspect", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_decision_is_printed(tmp_path, capsys):
    good = {"prompt": "which?", "chosen": "this", "rejected": "that", "score": 1}
    same = good | {"rejected": "this"}
    file = write(tmp_path / "a.jsonl", good, same, same, {"prompt": "q"})
    code, out, _ = inspect(capsys, f"path={file}")
    assert code == 0
    assert "1 usable, 3 unusable" in out
    assert "preference pairs, because of the columns chosen, rejected" in out
    assert "prompt, chosen, rejected, score" in out
    assert "pairs (stage=reward" in out
    assert "prompt: user: which?" in out
    assert f"{file} line 2 and 1 more: chosen and rejected are the same: 'this'" in out
    assert "line 4: column chosen, rejected is missing, which line 1 has" in out
    assert "confidence" not in out  # a default is not shown


def test_unknown_columns_come_with_a_proposal(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", {"question": "q", "response": "a"})
    code, out, _ = inspect(capsys, f"path={file}")
    assert code == 2
    wanted = "data.columns={prompt:question,completion:response}"
    assert wanted in out
    code, out, _ = inspect(capsys, f"path={file}", wanted, "count=0")
    assert code == 0
    assert "question is prompt; response is completion" in out


def test_a_mixture_is_shown_part_by_part(tmp_path, capsys):
    one = write(tmp_path / "a.jsonl", {"text": "t"}, {"text": "u"})
    two = write(tmp_path / "b.jsonl", {"text": "t"})
    mix = f"data.mix=[{{path: '{one}', weight: 2, limit: 1}},{{path: '{two}', weight: 1}}]"
    code, out, _ = inspect(capsys, mix)
    assert code == 0
    assert f"{one}, weight 2\n  records   1 usable" in out
    assert f"{two}, weight 1" in out


def test_what_cannot_be_inspected(tmp_path, capsys):
    code, _, err = inspect(capsys)
    assert (code, "needs path=FILE" in err) == (2, True)
    code, _, err = inspect(capsys, f"path={tmp_path / 'gone.jsonl'}")
    assert (code, "does not exist" in err) == (2, True)


def test_prompts_without_answers_are_no_dialogues(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", {"prompt": "q"}, {"prompt": "r"})
    _, out, _ = inspect(capsys, f"path={file}")
    assert "prompts (stage=ppo" in out
    assert "dialogues" not in out
    file = write(tmp_path / "b.jsonl", {"prompt": "q", "answer": "a"})
    assert "dialogues (stage=sft)" in inspect(capsys, f"path={file}")[1]


def test_parts_of_different_kinds_cannot_be_mixed(tmp_path, capsys):
    one = write(tmp_path / "a.jsonl", {"text": "t"})
    two = write(tmp_path / "b.jsonl", {"prompt": "q"})
    code, _, err = inspect(capsys, f"data.mix=[{{path: '{one}'}},{{path: '{two}'}}]")
    assert code == 2
    assert f"documents ({one} line 1); prompts ({two} line 1)" in err


def test_another_separator_is_said(tmp_path, capsys):
    file = tmp_path / "a.csv"
    file.write_text("prompt;completion\na;b\n")
    code, _, err = inspect(capsys, f"path={file}")
    assert (code, "as if ';' stood between columns" in err) == (2, True)
    file.write_text("text\na;b\n")  # one column is a table too
    assert inspect(capsys, f"path={file}")[0] == 0


def test_counts_cannot_be_negative(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", {"text": "t"})
    code, _, err = inspect(capsys, f"path={file}", "count=-1")
    assert (code, "count=-1 must be at least 0" in err) == (2, True)


def test_stats_and_show_read_the_path_and_refuse_what_they_do_not_read(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", *({"text": f"text {n} of this file"} for n in range(9)))
    assert main(["data", "show", f"path={file}", "count=1", "arch.vocab_size=300"]) == 0
    assert "of this file" in capsys.readouterr().out
    assert main(["data", "stats", f"path={file}", "count=1"]) == 2
    assert "`distllm data stats` does not read count=" in capsys.readouterr().err
