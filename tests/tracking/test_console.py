"""Progress, tables and log lines, in a real terminal (a pseudo-terminal) and in a pipe."""

import logging
import os
import pty
import subprocess
import sys
import textwrap

import pytest

from distllm.tracking import progress as progress_module
from distllm.tracking.console import print_table, setup_logging
from distllm.tracking.progress import duration


def run(script, terminal=False):
    """Run `script` in a process of its own; return what it wrote to stdout and stderr together."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    if not terminal:
        del environment["COLUMNS"]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.decode()
    main, secondary = pty.openpty()
    child = subprocess.Popen(command, stdout=secondary, stderr=secondary, env=environment)
    os.close(secondary)
    output = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the child has closed its end
            break
        if not part:
            break
        output += part
    os.close(main)
    assert child.wait() == 0, output
    return output.decode()


WORK = """
    import logging, time
    from distllm.tracking.console import setup_logging
    from distllm.tracking.progress import progress
    setup_logging(None)
    with progress(200, "pretrain [x]", start=100, is_main={is_main}) as bar:
        for i in range(100):
            bar.advance(loss=4.5, tokens_per_s=12345.6)
            if i == 50:
                logging.getLogger("distllm").info("saved [bold]step 50")
                time.sleep(0.4)
"""


def test_pipe_gets_few_plain_lines_with_eta():
    lines = run(WORK.format(is_main=True)).splitlines()
    assert (
        len(lines) == 3
    )  # the first unit, the log line, the end; the rest came within five seconds
    assert lines[0].startswith("pretrain [x]  101/200 (50%)  ETA ")
    assert lines[0].endswith("loss 4.5  tokens_per_s 12,346")
    assert lines[1] == "saved [bold]step 50"
    assert lines[2].startswith("pretrain [x]  200/200 (100%)  took ")


def test_terminal_gets_a_bar_and_log_lines_stay_whole():
    output = run(WORK.format(is_main=True), terminal=True)
    assert "\x1b[" in output and "━" in output
    assert "200/200" in output and "ETA" in output and "loss 4.5" in output
    # The bar's line is erased before the log line is written in its place.
    assert "\r\x1b[2Ksaved [bold]step 50\r\n" in output


def test_other_ranks_show_nothing():
    assert run(WORK.format(is_main=False)).splitlines() == ["saved [bold]step 50"]


def test_plain_lines_come_every_few_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress_module.progress(1000, "work", start=400) as bar:
        for _ in range(100):
            now[0] += 0.5
            bar.advance()
            expected = (1000 - bar.done) * 0.5  # half a second a unit, whatever was done before
            assert bar.eta_s == pytest.approx(expected)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11  # 50 s: one line at 0.5 s, then one every 5 s, and the last
    assert lines[1] == "work  411/1000 (41%)  ETA 4m 54s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (3599.7, "1h 00m"), (90000, "1d 01h")],
)
def test_duration_reads_well(seconds, text):
    assert duration(seconds) == text


def test_table_in_a_pipe_is_plain_and_never_cut(capsys):
    note = "a note that is much longer than eighty columns " * 4
    print_table(
        "Stages [x]", ["stage", "after", "note"], [["sft", 0.41357, note], ["ppo", 12, None]]
    )
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = [line.split() for line in out.splitlines()]
    assert ["Stages", "[x]"] in lines
    assert ["sft", "0.4136", *note.split()] in lines
    column = next(line for line in out.splitlines() if "after" in line)
    column = column[: column.index("after") + 5]
    row = next(line for line in out.splitlines() if line.strip().startswith("ppo"))
    assert row.rstrip() == row[: len(column)].rstrip()
    assert row.rstrip().endswith("12")  # numbers are aligned right, under the end of their title
    assert len(row.rstrip()) == len(column)


def test_log_lines_go_to_the_file_of_the_rank(tmp_path, capsys):
    logger = logging.getLogger("distllm")
    setup_logging(tmp_path / "first", rank=3)
    logger.debug("only in the file")
    logger.info("main rank says this")
    logger.warning("look out")
    err = capsys.readouterr().err
    assert err == "[rank 3] warning: look out\n"
    text = (tmp_path / "first" / "logs" / "rank_3.log").read_text()
    assert [line.split(maxsplit=3)[2:] for line in text.splitlines()] == [
        ["DEBUG", "only in the file"],
        ["INFO", "main rank says this"],
        ["WARNING", "look out"],
    ]
    setup_logging(tmp_path / "second")
    logger.info("elsewhere")
    setup_logging(None)
    assert capsys.readouterr().err == "elsewhere\n"
    assert "elsewhere" not in (tmp_path / "first" / "logs" / "rank_3.log").read_text()
    assert "elsewhere" in (tmp_path / "second" / "logs" / "rank_0.log").read_text()


@pytest.fixture(autouse=True)
def fresh_console():
    """The shared console remembers the stderr of its first use; tests replace stderr."""
    from distllm.tracking.console import stderr_console

    stderr_console.cache_clear()
    yield
    stderr_console.cache_clear()
    logger = logging.getLogger("distllm")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
