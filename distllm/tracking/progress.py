"""The progress line of long work: a bar in a terminal, now and then a plain line elsewhere."""

import time
from typing import Any, Self

from distllm.tracking.console import stderr_console

PLAIN_LINE_EVERY_S = 5.0


def progress(total: int, description: str, *, start: int = 0, is_main: bool = True) -> "Progress":
    """Show how far work of `total` units has come; use as a context manager and call `advance`.

    Args:
        total: number of units (optimizer steps, prompts, documents, ...).
        description: what is being done, in a few words.
        start: units done before, by the run that is resumed; they do not count for the speed.
        is_main: False shows nothing (ranks other than the main one).
    """
    if not is_main:
        return Progress(total, description, start)
    if stderr_console().is_terminal:
        return _Bar(total, description, start)
    return _Lines(total, description, start)


class Progress:
    """Counts units and shows nothing. The base of what shows something."""

    def __init__(self, total: int, description: str, start: int = 0):
        self.total, self.description = total, description
        self.done = self._start = start
        self.shown: dict[str, Any] = {}
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def advance(self, n: int = 1, **shown: Any) -> None:
        """Count `n` more units as done; `shown` replaces the values of the same name beside the bar."""
        self.done += n
        self.shown.update(shown)

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the mean speed so far; None before the first unit is done."""
        fresh = self.done - self._start
        if fresh <= 0:
            return None
        return (time.monotonic() - self._since) / fresh * max(0, self.total - self.done)

    def _values(self) -> str:
        return "  ".join(f"{name} {_format(value)}" for name, value in self.shown.items())


class _Lines(Progress):
    """Prints a line at most every `PLAIN_LINE_EVERY_S`, and one at the end."""

    _last_line = float("-inf")

    def advance(self, n: int = 1, **shown: Any) -> None:
        """Count, and print when it is time."""
        super().advance(n, **shown)
        if time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._print()

    def __exit__(self, *exc_info: object) -> None:
        self._print()

    def _print(self) -> None:
        self._last_line = time.monotonic()
        share = 100 * self.done / self.total if self.total else 100.0
        if self.done >= self.total:
            clock = f"took {duration(time.monotonic() - self._since)}"
        else:
            clock = "ETA " + ("?" if self.eta_s is None else duration(self.eta_s))
        line = f"{self.description}  {self.done}/{self.total} ({share:.0f}%)  {clock}"
        values = self._values()
        stderr_console().print(
            f"{line}  {values}" if values else line, markup=False, highlight=False, soft_wrap=True
        )


class _Bar(Progress):
    """A bar that stays on the last line of the terminal."""

    def __enter__(self) -> Self:
        from rich import progress as rich_progress

        super().__enter__()
        self._display = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("ETA {task.fields[eta]}", style="cyan"),
            rich_progress.TextColumn("{task.fields[values]}", markup=False),
            console=stderr_console(),
            refresh_per_second=4,  # each refresh takes time from the cores that train
        )
        self._task = self._display.add_task(
            self.description, total=self.total, completed=self.done, eta="?", values=""
        )
        self._display.start()
        return self

    def advance(self, n: int = 1, **shown: Any) -> None:
        """Count and move the bar."""
        super().advance(n, **shown)
        eta = "?" if self.eta_s is None else duration(self.eta_s)
        self._display.update(self._task, completed=self.done, eta=eta, values=self._values())

    def __exit__(self, *exc_info: object) -> None:
        self._display.stop()


def duration(seconds: float) -> str:
    """Write a length of time for people: `8s`, `3m 05s`, `2h 07m`, `1d 04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
