"""Writes what a run of the tests came to into a tracked file: `pytest --record FILE`, as `make test-all` does."""

import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed", "deselected")


class Recording:
    """A plugin of pytest that writes the file when all is over."""

    def __init__(self, path):
        """Write to `path`, relative to where pytest was started."""
        self.path, self.started_s = Path(path).absolute(), time.monotonic()

    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        """Count what pytest has counted, and write."""
        stats = terminalreporter.stats
        text = page(
            exit_status=int(exitstatus),
            counts={name: len(stats.get(name, ())) for name in OUTCOMES},
            reasons=sorted({_reason(r) for r in stats.get("skipped", ())}),
            duration_s=time.monotonic() - self.started_s,
            arguments=terminalreporter.config.invocation_params.args,
        )
        self.path.write_text(text, encoding="utf-8")


def page(*, exit_status, counts, reasons, duration_s, arguments):
    """Return the file's content."""
    result = {0: "passed", 1: "FAILED"}.get(
        exit_status, f"NOT FINISHED (pytest exited with {exit_status})"
    )
    shown = [w for w in arguments if not w.startswith("--record")]
    rows = {
        "Commit": _commit(),
        "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "Result": f"**{result}**",
        **{name.capitalize(): n for name, n in counts.items() if n or name in ("passed", "failed")},
        "Duration": f"{int(duration_s) // 60} min {int(duration_s) % 60} s",
        "Tests": f"`pytest {' '.join(map(_quoted, shown))}`",
        "Machine": f"{platform.system()}, Python {platform.python_version()}, {_torch()}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    listed = "\n".join(f"- {reason}" for reason in reasons)
    skips = f"\nSkipped because:\n\n{listed}\n" if reasons else ""
    return (
        "# The whole test suite, the slow tests included\n\n"
        "Written by `make test-all`; not edited by hand.\n\n"
        f"| | |\n|---|---|\n{table}\n{skips}"
    )


def _commit():
    def git(*words):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    if not commit:
        return "unknown (not a git checkout)"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/test_all.md")
    return f"`{commit}`" + (", with changes that are not committed" if changed else "")


def _torch():
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__}, {device}"


def _reason(report):
    place = report.longrepr
    text = place[2] if isinstance(place, tuple) else str(place)
    return " ".join(text.removeprefix("Skipped: ").split())


def _quoted(word):
    return f'"{word}"' if " " in word else word
