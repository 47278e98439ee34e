"""`distllm list matrix` shows what is on record, and the record is of the cells that there are."""

from distllm.cli import list_
from distllm.testing.matrix import CELLS, read_record


def test_the_record_is_whole_and_everything_on_it_was_learned():
    rows = read_record()
    assert [row["key"] for row in rows] == list(CELLS)
    assert [row["key"] for row in rows if not row["learned"]] == []
    for row in rows:
        assert (
            row["target"] == CELLS[row["key"]].target and row["metric"] == CELLS[row["key"]].metric
        )


def test_the_table_has_a_row_per_architecture(capsys):
    assert list_.run(["matrix"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | pretrain | SFT | reward | RL |" and len(lines) == 2 + 5
    assert lines[2].startswith("| encoder | mlm: loss ") and "bandit: exact_match" in lines[2]
