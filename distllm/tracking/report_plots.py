"""Draws the report's line plots as SVG that takes its colours and fonts from the page.

matplotlib lays out axes and ticks; the marker colours it is given are replaced by the page's CSS variables, so that
one drawing serves the light and the dark theme. Titles and legends are HTML and live in the template.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PX_PER_UNIT = 1.4
"""CSS pixels per SVG unit at full width: fonts of 8 units show as about 11 px."""
NUM_COLORS = 6
MAX_POINTS = 500
"""More points than this are thinned; the eye cannot tell them apart at a plot's width."""

_MARKERS = {
    **{f"var(--c{i})": f"#0a0b{i:02x}" for i in range(1, NUM_COLORS + 1)},
    "var(--muted)": "#0a0c01",
    "var(--grid)": "#0a0c02",
    "var(--axis)": "#0a0c03",
}
"""CSS colour -> the colour that stands for it while matplotlib draws."""


@dataclass(slots=True, kw_only=True)
class Series:
    """One line of a plot."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: int = 1
    """1 to 6, a colour of the page's palette."""
    smooth: bool = False
    """Draw the raw values faintly and a smoothed line over them."""
    markers: bool = False
    """Mark each value: for what is measured now and then."""
    dashed: bool = False
    low: Sequence[float] | None = None
    """Lower end of an interval at each step, drawn as a band up to `high`."""
    high: Sequence[float] | None = None


@dataclass(slots=True, kw_only=True)
class Plot:
    """A drawn plot."""

    svg: str
    """An `<svg>` element for inlining."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the page's script needs to show values under the pointer: axes in SVG units, data limits, series."""


def draw(
    series: Sequence[Series],
    *,
    name: str,
    width: int,
    height: int,
    levels: dict[str, float] | None = None,
) -> Plot:
    """Draw `series` over the steps.

    Args:
        series: the lines, later ones on top.
        name: unique on the page; keeps the ids inside the SVG apart.
        width: in CSS pixels at full size.
        height: in CSS pixels at full size.
        levels: label -> value of horizontal dashed lines, named at the right edge.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 8,
        "path.simplify": True,
    }
    with mpl.rc_context(style):
        units = width / PX_PER_UNIT, height / PX_PER_UNIT
        figure = Figure(figsize=(units[0] / 72, units[1] / 72))
        figure.patch.set_alpha(0)
        left, right, bottom, top = 34, 92 if levels else 8, 18, 6
        axes = figure.add_axes(
            (
                left / units[0],
                bottom / units[1],
                1 - (left + right) / units[0],
                1 - (bottom + top) / units[1],
            )
        )
        _style(axes)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=max(3, int(units[0] // 70)), integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=max(3, int(units[1] // 32))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        figure.text(
            4 / units[0],
            (bottom - 6.5) / units[1],
            "step",
            va="top",
            fontsize=7,
            color=_MARKERS["var(--muted)"],
        )
        drawn = [_draw_line(axes, one) for one in series]
        _limit(axes, [v for _, values in drawn for v in values], levels)
        if levels:
            _draw_levels(axes, levels, units[0] - left - right, units[1] - bottom - top)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    return Plot(
        svg=_for_page(buffer.getvalue(), name),
        data={
            "box": [left, top, units[0] - right, units[1] - bottom],
            "x": [x0, x1],
            "y": [y0, y1],
            "series": [
                {
                    "label": one.label,
                    "color": one.color,
                    "points": [
                        [_rounded(s), _rounded(v)]
                        for s, v in zip(steps, values, strict=True)
                        if math.isfinite(v)
                    ],
                }
                for one, (steps, values) in zip(series, drawn, strict=True)
            ],
        },
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours under a bell a fiftieth of the curve wide; few values stay as they are."""
    import numpy as np

    raw = np.asarray(values, dtype=float)
    sigma = len(raw) / 50
    if sigma < 0.5:
        return raw.tolist()
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    finite = np.isfinite(raw)
    total = np.convolve(np.where(finite, raw, 0.0), kernel)[reach : reach + len(raw)]
    weight = np.convolve(finite.astype(float), kernel)[reach : reach + len(raw)]
    with np.errstate(invalid="ignore"):
        return np.where(finite, total / weight, np.nan).tolist()


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Keep the lowest and the highest value of each stretch, so that no spike is lost."""
    if len(steps) <= MAX_POINTS:
        return list(steps), list(values)
    size = math.ceil(2 * len(steps) / MAX_POINTS)
    keep: list[int] = []
    for start in range(0, len(steps), size):
        stretch = range(start, min(start + size, len(steps)))
        finite = [i for i in stretch if math.isfinite(values[i])]
        if finite:
            ends = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
            keep += sorted(ends)
        else:
            keep.append(start)
    return [steps[i] for i in keep], [values[i] for i in keep]


def short(value: float) -> str:
    """Write a number in few characters: 12k, 3.4M, 0.025, 1e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.3g}{unit}"
    return f"{value:.0e}" if size < 1e-3 else f"{value:.4g}"


def _draw_line(axes: Any, series: Series) -> tuple[list[float], list[float]]:
    """Draw one series and return the points of its main line."""
    color = _MARKERS[f"var(--c{(series.color - 1) % NUM_COLORS + 1})"]
    values = [v if math.isfinite(v) else math.nan for v in series.values]
    steps = list(series.steps)
    if series.low is not None and series.high is not None:
        axes.fill_between(steps, series.low, series.high, color=color, alpha=0.15, linewidth=0)
    if series.smooth and len(values) >= 30:
        axes.plot(*thinned(steps, values), color=color, alpha=0.28, linewidth=0.8)
        values = smoothed(values)
    points = thinned(steps, values)
    marker = {"marker": "o", "markersize": 3.2, "markeredgewidth": 0} if series.markers else {}
    if len(values) == 1:
        marker = {"marker": "o", "markersize": 4, "markeredgewidth": 0}
    dashes = {"dashes": (4, 2)} if series.dashed else {}
    axes.plot(*points, color=color, linewidth=1.5, solid_joinstyle="round", **marker, **dashes)
    return points


def _limit(axes: Any, values: list[float], levels: dict[str, float] | None) -> None:
    """Leave some air; a flat curve gets a scale that does not blow up rounding noise."""
    finite = [v for v in [*values, *(levels or {}).values()] if math.isfinite(v)]
    axes.margins(x=0.01)
    if not finite:
        return
    low, high = min(finite), max(finite)
    low, high = min(low, axes.dataLim.y0), max(high, axes.dataLim.y1)
    scale = max(abs(low), abs(high)) or 1.0
    air = max(0.06 * (high - low), 1e-3 * scale) if high > low else 0.05 * scale
    axes.set_ylim(low - air, high + air)


def _draw_levels(axes: Any, levels: dict[str, float], width: float, height: float) -> None:
    """Draw dashed lines and write their names beside the plot, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 10 / height  # of the axes' height
    spot = -1.0
    for label, value in sorted(levels.items(), key=lambda item: item[1]):
        axes.axhline(value, color=_MARKERS["var(--muted)"], linewidth=0.9, dashes=(4, 3), zorder=1)
        at = (value - low) / (high - low)
        spot = max(at, spot + gap)
        axes.plot(
            [1, 1 + 8 / width],
            [at, spot],
            transform=axes.transAxes,
            clip_on=False,
            color=_MARKERS["var(--muted)"],
            linewidth=0.6,
        )
        axes.text(
            1 + 11 / width,
            spot,
            f"{label} {value:.2f}",
            transform=axes.transAxes,
            va="center",
            fontsize=7.5,
            color=_MARKERS["var(--muted)"],
            parse_math=False,
        )


def _style(axes: Any) -> None:
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MARKERS["var(--axis)"])
    axes.spines["bottom"].set_linewidth(0.8)
    axes.grid(axis="y", color=_MARKERS["var(--grid)"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4, labelsize=8, labelcolor=_MARKERS["var(--muted)"])


def _for_page(svg: str, name: str) -> str:
    """Strip what belongs to a file of its own, keep ids apart, and hand the colours to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", "", svg, flags=re.S
    )
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1
    )
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(
        r'(?<= )(?:d|x|y|transform)="[^"]*"',  # coordinates, but not the texts between the tags
        lambda found: re.sub(r"(\d\.\d\d)\d+", r"\1", found[0]),
        svg,
    )
    svg = re.sub(r">\s+<", "><", svg)
    for css, marker in _MARKERS.items():
        svg = svg.replace(marker, css)
    return svg


def _rounded(value: float) -> float:
    return float(f"{value:.5g}") if value != int(value) else int(value)
