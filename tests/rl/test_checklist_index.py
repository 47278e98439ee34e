"""Every item of the checklist has a test that bears its number and shows that it would notice the bug."""

import ast
from pathlib import Path

from checklist import NUMBERS

TESTS = Path(__file__).resolve().parents[1]
SHOWS_A_BUG = (
    "holds_and_notices", "noticed", "held_and_noticed", "with_bug", "planted", "refused", "broken", "raises",
    "the count would notice the bug",
)  # fmt: skip
"""What a test calls, or says, that runs its check on broken code."""


def numbered():
    """Return number -> [(file, name, source)] of all tests named after an item."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "def test_item_" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_item_"):
                number = int(node.name.split("_")[2])
                source = ast.get_source_segment(text, node)
                found.setdefault(number, []).append((path.name, node.name, source))
    return found


def test_every_item_has_its_test():
    found = numbered()
    assert set(found) == set(NUMBERS)


def test_every_item_shows_that_it_would_notice():
    for number, tests in numbered().items():
        sources = "".join(source for _, _, source in tests)
        assert any(word in sources for word in SHOWS_A_BUG), f"item {number}: {tests[0][1]}"
