"""What the user reads in the terminal beside the progress line: log lines and tables.

Other folders write `logging.getLogger("distllm").info(...)`; `setup_logging` decides where that goes. Log lines
and progress go to stderr, tables to stdout, so that a verb's output can be piped.
"""

import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_FILE_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


def setup_logging(run_dir: Path | None, rank: int = 0, verbose: bool = False) -> None:
    """Send log lines to the terminal and to `run_dir/logs/rank_N.log`; replaces an earlier set-up.

    Args:
        run_dir: the run directory; None writes no file.
        rank: rank of this process; ranks other than 0 show only warnings in the terminal.
        verbose: also show DEBUG lines in the terminal. The file gets them always.
    """
    logger = logging.getLogger("distllm")
    for handler in [h for h in logger.handlers if getattr(h, "_distllm", False)]:
        logger.removeHandler(handler)
        handler.close()
    terminal = _TerminalHandler(rank)
    terminal.setLevel(logging.WARNING if rank else logging.DEBUG if verbose else logging.INFO)
    handlers: list[logging.Handler] = [terminal]
    if run_dir is not None:
        folder = Path(run_dir) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank_{rank}.log", encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter(_FILE_FORMAT))
        handlers.append(file)
    for handler in handlers:
        handler._distllm = True  # type: ignore[attr-defined]
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table to stdout; numbers are aligned right. Without a terminal it is plain text of full width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        all(_is_number(row[i]) for row in cells if i < len(row) and row[i]) and bool(cells)
        for i in range(len(columns))
    ]
    console = Console()
    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*[Text(cell) for cell in row])
    if not console.is_terminal:  # a pipe has no width to fit into
        console.width = max(80, console.measure(table, options=_unbounded(console)).maximum)
    console.print(table)


@functools.cache
def stderr_console() -> "Console":
    """Return the one console that the progress line and log lines share, so that they do not overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


class _TerminalHandler(logging.Handler):
    """Prints the message alone; warnings and errors are marked, other ranks named."""

    _MARKS = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "red")}

    def __init__(self, rank: int):
        super().__init__()
        self.prefix = f"[rank {rank}] " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record above a progress line that may be shown."""
        from rich.text import Text

        try:
            mark, style = self._MARKS.get(min(record.levelno, logging.ERROR), ("", ""))
            text = Text(self.prefix + mark, style=style) + Text(self.format(record))
            stderr_console().print(text, soft_wrap=True)
        except Exception:
            self.handleError(record)


def _unbounded(console: "Console") -> Any:
    return console.options.update(width=10_000, max_width=10_000)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%").replace(",", ""))
    except ValueError:
        return False
    return True
