"""The parity table is of the cases that there are, keeps the limits that its text states, and can be measured anew."""

import re
from pathlib import Path

from distllm.testing import parity_table
from distllm.testing.pairs import BF16_ROOM, CASES, GRADIENT_TOLERANCE, TOLERANCE

ROOT = Path(__file__).parents[2]


def rows(text):
    """Return the cells of each row of the table in a text, without its head."""
    table = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table[1:]]


def test_the_table_on_record_is_whole_and_keeps_the_limits():
    found = rows((ROOT / "docs/parity.md").read_text(encoding="utf-8"))
    assert [cells[0] for cells in found] == list(CASES)
    for cells in found:
        name, logits, packed, gradients, largest, mean, greedy, export = cells
        assert max(float(logits), float(packed)) <= TOLERANCE, name
        assert float(gradients) <= GRADIENT_TOLERANCE, name
        assert max(float(largest.split()[0]), float(mean)) <= BF16_ROOM, name
        assert greedy in ("8 of 8", "no decoder") and export == "equal", name


def test_the_readme_shows_the_same_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    record = {
        cells[0]: cells for cells in rows((ROOT / "docs/parity.md").read_text(encoding="utf-8"))
    }
    shown = re.findall(r"^\| (\w+) \| (\S+e-\d+) \| (\S+e-\d+) \| ([\d.]+) \|", readme, re.M)
    assert [line[0] for line in shown] == list(CASES)
    for name, logits, gradients, mean in shown:
        assert (logits, gradients, mean) == (record[name][1], record[name][3], record[name][5])


def test_a_row_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(parity_table, "BF16_ROWS", 4)
    cells = parity_table.row("bert", tmp_path)
    assert cells[0] == "bert" and cells[-2:] == ["no decoder", "equal"]
    assert 0 < float(cells[1]) <= TOLERANCE and 0 < float(cells[3]) <= GRADIENT_TOLERANCE
