"""Writes the report: one HTML file that needs no network, from what runs left in their directories.

What is read is in `report_data.py`, which plots are shown in `report_panels.py`, how they are drawn in
`report_plots.py`, the tables in `report_tables.py`, and the page itself in `page/`. Needs matplotlib and Jinja2, not torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distllm.errors import ConfigError
from distllm.tracking import report_tables as tables
from distllm.tracking.advice import Advice
from distllm.tracking.progress import duration
from distllm.tracking.report_data import RunData, StageData, load_runs, number
from distllm.tracking.report_panels import Member, Panels, make_panels, verdict
from distllm.tracking.report_plots import NUM_COLORS, short

MAX_CONFIG = 20_000


@dataclass(slots=True, kw_only=True)
class Section:
    """One stage on the page, with every run that has it."""

    title: str
    anchor: str
    panels: Panels
    verdicts: list[tuple[str, str]]
    """(run, sentence)."""
    runs: list["StageOfRun"] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class StageOfRun:
    """The tables of one stage of one run."""

    run: str
    color: int
    facts: list[tuple[str, str]]
    measurements: list[tuple[str, tables.Measured, tables.Measured]]
    parts: list[tuple[str, tables.Measured, tables.Measured]]
    samples: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]
    advice: list[Advice]
    config: str


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of one or several runs and return its path.

    Args:
        runs: pipeline directories or train run directories; the same stage of several runs shares its plots.
        out: the HTML file to write.

    Raises:
        DataError: a directory holds no run.
        ConfigError: matplotlib or Jinja2 is not installed.
    """
    for module in ("matplotlib", "jinja2"):
        if find_spec(module) is None:
            raise ConfigError(
                f"The report needs {module}, which is not installed. Type: pip install {module}"
            )
    loaded = load_runs(runs)
    html = _render(loaded)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".tmp")
    aside.write_text(html, encoding="utf-8")
    aside.replace(out)
    return out


def _render(runs: list[RunData]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["thousands"] = lambda value: f"{value:,}"
    return page.get_template("report.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        several=len(runs) > 1,
        runs=[_overview(number_, run) for number_, run in enumerate(runs, 1)],
        sections=_sections(runs),
        lineages=[(run.name, tables.lineage_rows(run)) for run in runs],
        versions=tables.versions(runs),
        num_open=tables.NUM_SAMPLES_OPEN,
        css=_page_file("report.css"),
        script=_page_file("report.js") + _page_file("samples.js"),
    )


def _overview(number_: int, run: RunData) -> dict[str, Any]:
    """Return what the head of the page says about a run."""
    table = tables.stage_table(run)
    judged = [row for row in table if row["ok"] is not None]
    rounds = max((stage.round for stage in run.stages), default=1)
    sizes = [number(stage.result.get("num_parameters")) for stage in run.stages]
    size = next((s for s in reversed(sizes) if s), None)
    chips = [
        ("Total time", duration(run.wall_s) if run.wall_s is not None else ""),
        ("Stages", str(len(run.stages)) if len(run.stages) > 1 else ""),
        ("Rounds", str(rounds) if rounds > 1 else ""),
        ("Parameters", short(size) if size else ""),
        ("Seed", tables.value_text(run.seed)),
        ("Bars met", f"{sum(row['ok'] for row in judged)} of {len(judged)}" if judged else ""),
    ]
    return {
        "name": run.name,
        "color": (number_ - 1) % NUM_COLORS + 1,
        "chips": [(label, shown) for label, shown in chips if shown],
        "table": table,
        "times": _times(run),
    }


def _times(run: RunData) -> list[dict[str, Any]]:
    """Return the share of each stage in the time of a run; empty if it has only one."""
    clocks = [(stage, number(stage.result.get("wall_s"))) for stage in run.stages]
    known = [(stage, wall_s) for stage, wall_s in clocks if wall_s]
    total = sum(wall_s for _, wall_s in known)
    if len(known) < 2:
        return []
    names = list(dict.fromkeys(stage.name for stage, _ in known))
    return [
        {
            "name": tables.stage_title(stage),
            "share": round(100 * wall_s / total, 2),
            "time": duration(wall_s),
            "color": names.index(stage.name) % NUM_COLORS + 1,
        }
        for stage, wall_s in known
    ]


def _sections(runs: list[RunData]) -> list[Section]:
    """Group the stages of all runs by name and round, in the order in which they appear."""
    groups: dict[tuple[str, int, int], list[Member]] = {}
    for number_, run in enumerate(runs, 1):
        seen: dict[tuple[str, int], int] = {}
        for stage in run.stages:
            key = (stage.name, stage.round)
            seen[key] = (
                seen.get(key, 0) + 1
            )  # the same stage twice in one run: sections of their own
            groups.setdefault((*key, seen[key]), []).append((number_, run, stage))
    sections = []
    for index, ((_, _, repeat), members) in enumerate(groups.items()):
        title = tables.stage_title(members[0][2]) + (f" ({repeat})" if repeat > 1 else "")
        anchor = f"s{index}-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        verdicts = [
            (run.name, verdict(run, stage)) for _, run, stage in members if stage.kind == "pretrain"
        ]
        sections.append(
            Section(
                title=title,
                anchor=anchor,
                panels=make_panels(members, f"s{index}", len(runs)),
                verdicts=[(name, sentence) for name, sentence in verdicts if sentence],
                runs=[_stage_of_run(number_, run, stage) for number_, run, stage in members],
            )
        )
    return sections


def _stage_of_run(number_: int, run: RunData, stage: StageData) -> StageOfRun:
    return StageOfRun(
        run=run.name,
        color=(number_ - 1) % NUM_COLORS + 1,
        facts=tables.facts(stage),
        measurements=tables.measurements(stage),
        parts=tables.measurements(stage, parts=True),
        samples=tables.sample_rows(stage),
        pairs=tables.pair_rows(stage),
        rollouts=tables.rollout_rows(stage),
        advice=stage.advice,
        config=stage.config[:MAX_CONFIG],
    )


def _page_file(name: str) -> str:
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")
