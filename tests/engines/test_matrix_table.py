"""The README's table of the engines shows the worst of what stands on record, which holds every cell and keeps the bounds."""

import re
from pathlib import Path

from matrix import CELLS

ROOT = Path(__file__).parents[2]
NUMBER = r"(\d+e[-+]\d+)"
BOUNDS = (1e-5, 1e-5, 1e-4)


def test_the_readme_shows_the_worst_of_each_row():
    record = (ROOT / "docs/engine_matrix.md").read_text(encoding="utf-8")
    cells = re.findall(
        r"^\| ((?:ddp|fsdp|hsdp|tp|dp|zero|accelerate) [^|]*) \| (.*) \|$", record, re.M
    )
    assert [name for name, _ in cells] == list(CELLS)
    worst = {}
    for name, row in cells:
        stages = [[float(x) for x in cell.split(" / ")] for cell in row.split(" | ")]
        assert len(stages) == 5, name
        worst[name] = tuple(max(column) for column in zip(*stages, strict=True))
        assert all(w <= bound for w, bound in zip(worst[name], BOUNDS, strict=True)), name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(rf"^\| ([^|]+) \| {NUMBER} \| {NUMBER} \| {NUMBER} \|$", readme, re.M)
    assert {name: tuple(map(float, rest)) for name, *rest in shown} == worst
