"""Writes what each part of the tests came to into docs/test_all.md: `pytest --record-part=NAME`, as `make test-all` does.

A part is a folder of tests, or `.`: the files directly in tests/. A run takes all of a part, the slow tests included, and
rewrites its row alone.
"""

import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version

import pytest

OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
COLUMNS = ("Part", "Result", "Passed", "Failed", "Skipped", "Duration", "Date", "Commit", "Machine", "Notes")  # fmt: skip
HEAD = f"""# The whole test suite, the slow tests included

Written by `make test-all`, or for one part by `make test-all PART=NAME`; not edited by hand. A part is a folder of
`tests/`, or `.` for the files directly in it. Each row says what the last run of that part came to, and at which commit:
parts that have changed since may come to something else.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
"""


def parts(root):
    """Return part -> its files."""
    files = sorted([*root.glob("tests/test_*.py"), *root.glob("tests/*/test_*.py")])
    names = [str(f.parent.relative_to(root / "tests")) for f in files]
    return {
        name: [f for f, n in zip(files, names, strict=True) if n == name]
        for name in sorted(set(names))
    }


class Recording:
    """A plugin of pytest that runs one part and writes its row when all is over."""

    def __init__(self, config, part):
        """Let pytest run all of `part`, and nothing else."""
        self.root, self.part, self.started_s = config.rootpath, part, time.monotonic()
        known = parts(self.root)
        if part not in known:
            raise pytest.UsageError(f"there is no part {part}. There are: {' '.join(known)}")
        if config.option.keyword or config.args != config.getini("testpaths"):
            raise pytest.UsageError("--record-part takes a whole part: leave out files and -k")
        config.args = [str(f) for f in known[part]]
        config.option.markexpr = "slow or not slow"

    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        """Count what pytest has counted, and write."""
        found = {name: terminalreporter.stats.get(name, ()) for name in OUTCOMES}
        bad = [*found["failed"], *found["error"]]
        seconds = int(time.monotonic() - self.started_s)
        notes = sorted({f"failed: `{r.nodeid}`" for r in bad})
        notes += sorted({f"skipped: {_reason(r)}" for r in found["skipped"]})
        notes += [f"{n}: {len(found[n])}" for n in ("xfailed", "xpassed") if found[n]]
        row = {
            "Result": {0: "passed", 1: "**FAILED**"}.get(
                int(exitstatus), f"**NOT FINISHED** (pytest exited with {int(exitstatus)})"
            ),
            "Passed": len(found["passed"]),
            "Failed": len(bad),
            "Skipped": len(found["skipped"]),
            "Duration": f"{seconds // 60} min {seconds % 60} s",
            "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "Commit": _commit(self.root),
            "Machine": f"{platform.system()}, Python {platform.python_version()}, {_torch()}",
            "Notes": "<br>".join(n.replace("|", "\\|") for n in notes),
        }
        write(self.root, {self.part: row})


def write(root, new=()):
    """Rewrite the rows of `new` (part -> column -> value), keep the others; parts without a row were not run."""
    path = root / "docs/test_all.md"
    path.parent.mkdir(exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = dict(re.findall(r"^\| (\S+) (\|.*\|)$", text, re.MULTILINE))
    for part, row in dict(new).items():
        kept[part] = "".join(f"| {row[column]} " for column in COLUMNS[1:]) + "|"
    never = "| not run " + "| " * (len(COLUMNS) - 2) + "|"
    rows = [f"| {part} {kept.get(part, never)}\n" for part in parts(root)]
    path.write_text(HEAD + "".join(rows), encoding="utf-8")


def _commit(root):
    def git(*words):
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown (not a git checkout)"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/test_all.md")
    return f"`{commit}`" + (", with changes that are not committed" if changed else "")


def _torch():
    torch = sys.modules.get("torch")
    if torch is None:
        return f"torch {version('torch')}, not used"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__}, {device}"


def _reason(report):
    place = report.longrepr
    text = place[2] if isinstance(place, tuple) else str(place)
    return " ".join(text.removeprefix("Skipped: ").split())
