"""The report's figures, drawn into memory: equal input gives equal bytes."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nashswarm.bitmap import BitMap

FAMILIES: Mapping[str, tuple[str, str, str]] = {  # prefix -> title, colour, marker
    "paper-": ("paper's, nn.Linear only", "#b5482f", "X"),
    "uniform": ("paper's codecs, all weights", "#e39a2d", "P"),
    "rtn": ("round to nearest", "#8a8f98", "s"),
    "gptq": ("GPTQ", "#5b4b9a", "D"),
    "market-coded": ("market, coded", "#0b6e63", "o"),
    "market-tiles": ("market, tiles", "#3f8fd2", "^"),
    "": ("other", "#3d3d3d", "v"),
}
TOOLS: Mapping[str, tuple[str, str, str]] = {  # the same of other people's tools, in the figure that holds them
    "hqq": ("HQQ", "#e39a2d", "s"),
    "quanto": ("optimum-quanto", "#8a8f98", "P"),
    "auto_round": ("AutoRound", "#b5482f", "X"),
    "gptqmodel": ("GPTQModel", "#5b4b9a", "D"),
    "llama_cpp": ("llama.cpp, imatrix", "#c86fa0", "v"),
}
OTHER_TOOL = ("", "#3d3d3d", "v")
PARTS: Mapping[str, str] = {
    "codes": "#0b6e63",
    "map": "#b5482f",
    "scales": "#e39a2d",
    "zeros": "#f1cf7a",
    "tables": "#5b4b9a",
    "vectors": "#3f8fd2",
    "source": "#9aa5b1",
    "headers": "#3d3d3d",
}
JOINED = {"rtn": 0.9, "gptq": 0.9, "market-coded": 1.6, "market-tiles": 1.6}  # families that budgets or widths span
SPARE_COLOURS = ("#c86fa0", "#6a994e", "#a07855", "#77a6a0")
TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32)
WIDTH = 4.9  # inches; a phone shows it at 0.6 of its size
INK, FAINT = "#1d2329", "#d9dde2"
EVEN = 0.21  # luminance of a ground on which letters of INK and white ones stand out alike, 3.9 to 1
CONTRAST = 4.5  # of letters on white
NEAR = (  # offsets in points of a label from its point, and which end of it that is; the first that has room is taken
    *((7, 4, "left"), (-7, 4, "right"), (7, -11, "left"), (-7, -11, "right")),
    *((0, 9, "center"), (0, -16, "center"), (9, -3, "left"), (-9, -3, "right"), (-3, -18, "right"), (3, 14, "left")),
)
FAR = tuple(  # the same with a line to the point, where points are crowded
    (across, up, "left" if across > 0 else "right")
    for reach in (16, 26, 38, 54)
    for up in (-3, 9, -15, 22, -28, 36, -42)
    for across in (reach, -reach)
)


@dataclass(frozen=True, slots=True)
class Point:
    """One method in a figure."""

    method: str
    bits: float
    value: float
    interval: tuple[float, float] | None = None
    claimed: float | None = None  # bits by the paper's accounting
    tool: str | None = None  # of others, by the name of its file


def family(method: str) -> str:
    """The key in FAMILIES that a method belongs to."""
    if method.startswith("nash"):
        return "uniform"
    return next(prefix for prefix in FAMILIES if method.startswith(prefix))


def style(point: Point) -> tuple[str, str, str]:
    """Title, colour and marker of a point."""
    if point.tool is None:
        return FAMILIES[family(point.method)]
    title, colour, marker = TOOLS.get(point.tool, OTHER_TOOL)
    return title or point.tool, colour, marker


def frontier(points: Sequence[Point], label: str, dpi: int) -> bytes:
    """Cost against true bits per weight, both logarithmic, as PNG. What is not above 0 lies on the lower edge.

    Arguments: `label`, of the vertical axis.
    """
    canvas = _canvas(5.0, dpi)
    figure = canvas.figure
    axes = figure.add_subplot()
    floor, ceiling = _span(points)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    for prefix in (p for p in FAMILIES if any(_prefix(x) == p for x in points)):
        _draw_family(axes, [x for x in points if _prefix(x) == prefix], JOINED.get(prefix), floor)
    for tool in dict.fromkeys(x.tool for x in points if x.tool is not None):
        _draw_family(axes, [x for x in points if x.tool == tool], None, floor)
    _draw_claims(axes, [p for p in points if p.claimed and p.value > 0])
    axes.set_ylim(floor, ceiling)
    _dress(axes, [b for p in points for b in (p.bits, p.claimed) if b], label)
    if points:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    canvas.draw()
    figure.set_layout_engine("none")
    _label(axes, canvas, points, floor)
    return _png(canvas, dpi)


Curve = Sequence[tuple[float, float]]  # (horizontal, vertical), by rising horizontal


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a forest plot: a difference with its interval. Neighbours of the same group stand together."""

    group: str
    name: str
    value: float
    interval: tuple[float, float]
    resolved: bool  # whether the interval excludes 0


LESS, MORE, UNSURE = "#0b6e63", "#b5482f", "#6b7280"  # also told by side of 0, and by a hollow mark
ROW = 0.185  # inches from line to line


def forest(rows: Sequence[Row], dpi: int) -> bytes:
    """Differences with intervals, one line each below its group's title, as PNG; both sides of 0 are logarithmic."""
    places, titles, y = [], {}, -1.0
    for i, row in enumerate(rows):
        if i == 0 or row.group != rows[i - 1].group:
            y += 1.35
            titles[y] = row.group
        y += 1
        places.append(y)
    canvas = _canvas(ROW * (y + 2) + 0.8, dpi)
    axes = canvas.figure.add_subplot()
    within = _signed_scale(axes, [v for row in rows for v in (row.value, *row.interval)])
    axes.axvspan(-within, within, color="#f1f3f5", zorder=0)
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for row, place in zip(rows, places, strict=True):
        _draw_difference(axes, row, place)
    axes.set_ylim(y + 0.8, -0.3)
    axes.set_yticks(places, [row.name for row in rows])
    for place, title in titles.items():
        across = axes.get_yaxis_transform()
        axes.text(-0.015, place, title, transform=across, ha="right", va="center", fontsize=9, color=INK, weight="bold")
    words = "difference in the rise in loss, nats per token\n\u2190 the method loses less      it loses more \u2192"
    canvas.figure.supxlabel(words, fontsize=10, color=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    _plain(axes)
    axes.tick_params(axis="y", labelsize=8.5, length=0)
    axes.spines["left"].set_visible(False)
    return _png(canvas, dpi)


def _signed_scale(axes: Any, values: Sequence[float]) -> float:
    """Make the horizontal axis logarithmic on both sides of a linear strip; returns half of the strip's width."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    most = max(map(abs, values), default=1.0) or 1.0
    within = 10.0 ** max(-2, math.floor(math.log10(most)) - 2)  # differences below hundredths are read off the table
    axes.set_xscale("symlog", linthresh=within, linscale=0.5)
    left, right = (max([within, *(sign * v * 1.6 for v in values)]) for sign in (-1, 1))
    axes.set_xlim(-left, right)
    powers = [within * 10.0**i for i in range(6)]
    axes.xaxis.set_major_locator(
        FixedLocator([-p for p in powers if p <= left] + [0.0] + [p for p in powers if p <= right])
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    return within


def _draw_difference(axes: Any, row: Row, place: float) -> None:
    colour = UNSURE if not row.resolved else LESS if row.value < 0 else MORE
    axes.plot(row.interval, [place] * 2, color=colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
    face = colour if row.resolved else "white"
    axes.plot([row.value], [place], "o", markersize=4.5, color=colour, markerfacecolor=face, zorder=3)
    if not row.resolved:
        end, away, side = (row.interval[0], -6, "right") if row.value > 0 else (row.interval[1], 6, "left")
        place_ = {"xytext": (away, 0), "textcoords": "offset points", "ha": side, "va": "center_baseline"}
        axes.annotate("not resolved", (end, place), fontsize=8.5, color=colour, **place_)


STYLES = (  # colour and marker of each kind of matrix, in their order; colours of Okabe and Ito, darkened
    *(("#0b6e63", "o"), ("#b5482f", "s"), ("#5b4b9a", "D"), ("#3f8fd2", "^"), ("#b87a14", "P"), ("#3d3d3d", "X")),
    *(("#a8508a", "v"), ("#6a994e", "<"), ("#a07855", ">"), ("#6b7280", "*"), ("#77a6a0", "h")),
)


def demand(whole: Mapping[str, Curve], kinds: Mapping[str, Curve], codec: str, dpi: int) -> bytes:
    """True bits per weight against the market's price, as PNG: whole files above, kinds of matrix below.

    Arguments: `whole`, codec -> points (nats per byte, bits); `kinds`, kind of matrix -> the same, of `codec`.
    """
    panels = [("whole file", {FAMILIES[family(name)]: points for name, points in whole.items()})]
    if kinds:
        styles = itertools.cycle(STYLES)
        panels.append((f"{codec}, by kind of matrix", {(k, *next(styles)): points for k, points in kinds.items()}))
    canvas = _canvas(2.7 * len(panels) + 0.5, dpi)
    found = canvas.figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[2, 3][: len(panels)])
    for axes, (title, curves) in zip(found[:, 0], panels, strict=True):
        _draw_curves(axes, title, curves)
    found[0, 0].legend(frameon=False, fontsize=9, loc="upper right")  # demand falls: that corner is free
    if kinds:
        canvas.figure.legend(
            *found[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
        )
    found[-1, 0].set_xlabel("price of a byte, billionths of a nat per token", color=INK)
    return _png(canvas, dpi)


def _draw_curves(axes: Any, title: str, curves: Mapping[tuple[str, str, str], Curve]) -> None:
    """Arguments: `curves`, (name, colour, marker) -> points."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for (name, colour, marker), points in curves.items():
        prices, bits = [1e9 * price for price, _ in points], [each for _, each in points]
        axes.plot(prices, bits, color=colour, marker=marker, markersize=5.5, linewidth=1.3, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_ylabel("true bits per weight", color=INK)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    _plain(axes)


@dataclass(frozen=True, slots=True)
class Pace:
    """How many times as fast as the reference; neighbours of the same group are of the same work."""

    group: str
    name: str
    value: float
    interval: tuple[float, float]  # quartiles
    limit: bool = False  # no contestant, but what there is to reach


LANE = 0.1  # inches from one contestant to the next


def paces(found: Sequence[Pace], dpi: int) -> bytes:
    """Ratios with quartiles, a band for each piece of work and a mark for each contestant, as PNG; logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    names = list(dict.fromkeys(p.name for p in found if not p.limit))
    styles = dict(zip(names, itertools.cycle(STYLES), strict=False))
    groups = list(dict.fromkeys(p.group for p in found))
    band = len(names) + 2.0
    legend = 0.2 * -(-(len(names) + 1) // 2)
    canvas = _canvas(LANE * band * len(groups) + 0.9 + legend, dpi)
    axes = canvas.figure.add_subplot()
    for i, group in enumerate(groups):
        axes.axhspan(i * band, (i + 1) * band, color="#f1f3f5" if i % 2 else "white", zorder=0)
        for pace in (p for p in found if p.group == group):
            if pace.limit:
                ends = [i * band + 0.4, (i + 1) * band - 0.4]
                axes.plot([pace.value] * 2, ends, "--", color=INK, linewidth=1.0, zorder=1, label="only reading")
                continue
            place, (colour, marker) = i * band + names.index(pace.name) + 1.5, styles[pace.name]
            axes.plot(pace.interval, [place] * 2, color=colour, linewidth=1.4, solid_capstyle="butt", zorder=2)
            axes.plot([pace.value], [place], marker, markersize=4.5, color=colour, label=pace.name, zorder=3)
    axes.axvline(1, color=INK, linewidth=0.9, zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(band * len(groups), 0)
    axes.set_yticks([(i + 0.5) * band for i in range(len(groups))], [g.replace(", ", ",\n") for g in groups])
    axes.set_xlabel("times as fast as dense float32", color=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    _plain(axes)
    axes.tick_params(axis="y", labelsize=8.5, length=0)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    canvas.figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    return _png(canvas, dpi)


def growth(panels: Mapping[str, Mapping[str, Curve]], dpi: int) -> bytes:
    """What grows with a model's parameters, as PNG; logarithmic.

    Arguments: `panels`, label of a vertical axis -> name of a line, the same in all -> points (parameters, amount).
    """
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    canvas = _canvas(2.5 * len(panels) + 0.6, dpi)
    found = canvas.figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, curves) in zip(found, panels.items(), strict=True):
        for (name, points), (colour, marker) in zip(curves.items(), itertools.cycle(STYLES), strict=False):
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=5.5, linewidth=1.3, label=name
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, form in (
            (axes.xaxis, EngFormatter(sep="")),
            (axes.yaxis, FuncFormatter(lambda value, _: f"{value:g}")),
        ):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(form)
        axes.set_ylabel(label, color=INK)
        axes.grid(color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        _plain(axes)
    found[-1].set_xlabel("parameters of the model", color=INK)
    lines = found[0].get_legend_handles_labels()
    canvas.figure.legend(*lines, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _png(canvas, dpi)


def stacked(parts: Mapping[str, Mapping[str, float]], dpi: int) -> bytes:
    """Bits per weight by part of the file, one bar for each method, as PNG.

    Arguments: `parts`, method -> part -> bits.
    """
    canvas = _canvas(1.5 + 0.29 * len(parts), dpi)
    figure = canvas.figure
    axes = figure.add_subplot()
    names = part_names(parts)
    spare = iter(SPARE_COLOURS * len(names))
    starts = dict.fromkeys(parts, 0.0)
    for name in names:
        widths = [parts[m].get(name, 0.0) for m in parts]
        axes.barh(list(parts), widths, left=list(starts.values()), color=PARTS.get(name) or next(spare), label=name)
        starts = {m: s + w for (m, s), w in zip(starts.items(), widths, strict=True)}
    for row, total in enumerate(starts.values()):
        axes.annotate(f"{total:.2f}", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.1 * max(starts.values(), default=1.0))
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlabel("true bits per weight, all stored bytes", color=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=min(4, len(names) or 1), frameon=False, fontsize=9.5)
    return _png(canvas, dpi)


def part_names(parts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The parts that occur, known ones in PARTS' order first."""
    found = {name for of_method in parts.values() for name in of_method}
    return [n for n in PARTS if n in found] + sorted(found - set(PARTS))


def bit_map(
    of: BitMap,
    title: str,
    limits: tuple[float, float],
    dpi: int,
    label: str = "true bits per weight",
    scale: str = "YlGnBu",
) -> bytes:
    """An amount of every matrix, as PNG: what lies in no layer in a strip of its own, below it a row for each layer.

    Arguments: `limits`, amounts at the ends of the colour scale, so that maps of several methods can be compared; what
    lies beyond has the colour of the end. `label` says what is shown; `scale` is the name of matplotlib's colours.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    row = 0.225 if len(of.layers) <= 24 else 0.175
    heights = [0.3] * bool(of.outside) + [row * len(of.layers)] * bool(of.layers) + [0.11]
    canvas = _canvas(sum(heights) + 1.0 + 0.2 * len(heights), dpi)
    canvas.figure.suptitle(title, fontsize=10.5, color=INK)
    panels = iter(canvas.figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    colours = ScalarMappable(Normalize(*limits), colormaps[scale])
    if of.outside:
        axes = next(panels)
        _draw_cells(axes, [list(of.outside.values())], colours, [f"{name}  {b:.2f}" for name, b in of.outside.items()])
        axes.set_yticks([0.5], [""])
    if of.layers:
        axes = next(panels)
        values = [[of.cells.get((layer, column)) for column in of.columns] for layer in of.layers]
        _draw_cells(axes, values, colours)
        axes.set_xticks([i + 0.5 for i in range(len(of.columns))], of.columns)
        axes.set_yticks([i + 0.5 for i in range(len(of.layers))], [str(layer) for layer in of.layers])
        axes.set_ylabel("layer", color=INK)
    beyond = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = beyond[min(of.values()) < limits[0], max(of.values()) > limits[1]]
    bar = canvas.figure.colorbar(colours, cax=next(panels), orientation="horizontal", extend=extend)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8.5, colors=INK, length=3)
    bar.set_label(label, color=INK, fontsize=9.5)
    return _png(canvas, dpi)


def _draw_cells(
    axes: Any, values: Sequence[Sequence[float | None]], colours: Any, words: Sequence[str] | None = None
) -> None:
    """A grid of coloured cells, the first row on top, each with its number or its words; None leaves a hole."""
    from matplotlib.patches import Rectangle

    size = 8.5 if len(values) <= 24 else 7.5
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value is None:
                continue
            colour = colours.to_rgba(value)
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1))
            ink = INK if _luminance(colour) > EVEN else "white"
            text = words[x] if words else f"{value:.2f}"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center_baseline", fontsize=size, color=ink)
    axes.set_xlim(0, max(len(line) for line in values))
    axes.set_ylim(len(values), 0)
    axes.tick_params(labelsize=8.5, colors=INK, length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour, WCAG 2: what decides whether dark or white letters can be read on it."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# --- pieces --------------------------------------------------------------------------------------------------------


def _canvas(height: float, dpi: int) -> Any:
    """An empty figure that no window and no global state knows; matplotlib takes a second to import."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(WIDTH, height), dpi=dpi, layout="constrained", facecolor="white"))


def _span(points: Sequence[Point]) -> tuple[float, float]:
    """Lower and upper edge of the vertical axis: whole room for what is above 0."""
    values = [p.value for p in points if p.value > 0]
    highs = [p.interval[1] for p in points if p.interval and p.interval[1] > 0]
    lows = [p.interval[0] for p in points if p.interval and p.interval[0] > 0]
    least, most = min(values + lows, default=1e-3), max(values + highs, default=1e-2)
    least = max(least, min(values, default=least) / 10)
    return least / 2.2, most * 2.2


def _prefix(point: Point) -> str | None:
    """The family of a method of this project."""
    return family(point.method) if point.tool is None else None


def _draw_family(axes: Any, points: Sequence[Point], width: float | None, floor: float) -> None:
    """Points of one style. Arguments: `width` of the line that joins them; None: there is none."""
    title, colour, marker = style(points[0])
    points = sorted(points, key=lambda p: (p.bits, p.method))
    above = [p for p in points if p.value > 0]
    below = [p for p in points if p.value <= 0]
    axes.plot(
        [p.bits for p in above],
        [p.value for p in above],
        linestyle="none" if width is None else "-",
        linewidth=width or 0.0,
        color=colour,
        marker=marker,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        label=title,
        zorder=3,
    )
    edge = [floor * 1.12] * len(below)
    axes.plot([p.bits for p in below], edge, "v", color=colour, markersize=6.5, fillstyle="none", zorder=3)
    for point in points:
        if point.interval and point.interval[1] > floor:
            low, high = (max(v, floor) for v in point.interval)
            axes.vlines(point.bits, low, high, color=colour, linewidth=1.1, alpha=0.75, zorder=2)


def _draw_claims(axes: Any, points: Sequence[Point]) -> None:
    """What the paper's accounting would have, and how far the file is from it."""
    for point in points:
        colour, marker = FAMILIES[family(point.method)][1:]
        ends = [point.claimed, point.bits]
        axes.plot(ends, [point.value] * 2, ":", color=colour, linewidth=1.0, alpha=0.55, zorder=1)
        axes.plot(ends[:1], [point.value], marker, color=colour, markersize=6, markerfacecolor="white", zorder=2)


def _dress(axes: Any, bits: Sequence[float], label: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    least, most = min(bits, default=1.0), max(bits, default=8.0)
    least, most = least / max(1.15, (most / least) ** 0.25), most * 1.25  # a name's width to the left of the smallest
    axes.set_xlim(least, most)
    ticks = [t for t in TICKS if least <= t <= most]
    if most / least > 5:  # no room for halves
        ticks = [t for t in ticks if t in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    lower, upper = axes.get_ylim()
    if upper / lower < 500:  # few powers of ten lie within: name 2 and 5 times them, too
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10f}".rstrip("0").rstrip(".")))
    axes.set_xlabel("true bits per weight, whole model, every byte counted", color=INK)
    axes.set_ylabel(label, color=INK)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=9.5, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#8a8f98")


def _label(axes: Any, canvas: Any, points: Sequence[Point], floor: float) -> None:
    """Names beside the points, where they cover neither each other nor a point; left out where there is no room."""
    places = {p.method: (p.bits, p.value if p.value > 0 else floor * 1.12) for p in points}
    pixels = {m: axes.transData.transform(place) for m, place in places.items()}
    claims = {p: axes.transData.transform((p.claimed, p.value)) for p in points if p.claimed and p.value > 0}
    marks = [*pixels.values(), *claims.values()]
    lines = _along_lines(points, pixels)
    lines += [xy for p, claim in claims.items() for xy in _steps(claim, pixels[p.method])]
    taken: list[Any] = []
    for point in sorted(points, key=lambda p: (p.bits, p.method)):
        name = point.method.removeprefix("market-") + ("" if point.value > 0 else " (≤ 0)")
        own = pixels[point.method]
        others = [xy for xy in marks if xy is not own]
        colour = style(point)[1]
        for offset, across in [*((o, False) for o in NEAR + FAR), *((o, True) for o in FAR)]:
            leader = offset in FAR
            text = _name(axes, name, places[point.method], offset, colour, leader)
            box, line = _extent(text, canvas), _leader(text, canvas, own) if leader else []
            if _has_room(box, axes, canvas, taken, others, lines) and not _crosses(
                line, taken, others if across else others + lines
            ):
                taken.append(box)
                lines += line
                break
            text.remove()


def _name(
    axes: Any, name: str, place: tuple[float, float], offset: tuple[int, int, str], colour: str, leader: bool
) -> Any:
    arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 1, "shrinkB": 4}
    return axes.annotate(
        name,
        place,
        offset[:2],
        textcoords="offset points",
        ha=offset[2],
        fontsize=8.5,
        color=_legible(colour),
        arrowprops={**arrow, "relpos": (0.0 if offset[2] == "left" else 1.0, 0.5)} if leader else None,
    )


def _legible(colour: str) -> tuple[float, ...]:
    """A colour darkened until letters in it have a contrast of 4.5 to 1 on white (WCAG 2, level AA)."""
    from matplotlib.colors import to_rgb

    rgb: tuple[float, ...] = to_rgb(colour)
    while 1.05 / (_luminance(rgb) + 0.05) < CONTRAST:
        rgb = tuple(0.95 * c for c in rgb)
    return rgb


def _extent(text: Any, canvas: Any) -> Any:
    """The letters' box in pixels, without the line that leads to the point."""
    from matplotlib.text import Text

    text.update_positions(canvas.get_renderer())
    return Text.get_window_extent(text, canvas.get_renderer())


def _leader(text: Any, canvas: Any, point: Any) -> list[Any]:
    """Places on the line from a label to its point."""
    box = _extent(text, canvas)
    end = ((box.x0 if text.get_horizontalalignment() == "left" else box.x1), (box.y0 + box.y1) / 2)
    return _steps(point, end)[1:]


def _has_room(
    box: Any, axes: Any, canvas: Any, taken: Sequence[Any], marks: Sequence[Any], lines: Sequence[Any]
) -> bool:
    """Whether a label lies inside and covers neither another label nor a mark nor a line."""
    frame, room = axes.get_window_extent(canvas.get_renderer()), canvas.figure.dpi / 72
    inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1 + 8
    covers = any(box.padded(gap * room).contains(*xy) for gap, places in ((4, marks), (1, lines)) for xy in places)
    return inside and not covers and not any(box.overlaps(t) for t in taken)


def _crosses(line: Sequence[Any], taken: Sequence[Any], marks: Sequence[Any]) -> bool:
    """Whether a label's line runs through another label or close to a mark."""
    through = any(box.padded(1).contains(*xy) for box in taken for xy in line)
    return through or any(abs(xy[0] - m[0]) + abs(xy[1] - m[1]) < 9 for xy in line for m in marks)


def _steps(start: Any, end: Any) -> list[Any]:
    """Places on a line, every few pixels, its ends aside."""
    count = max(2, round(max(abs(start - end)) / 5))
    return [start + (end - start) * step / count for step in range(1, count)]


def _along_lines(points: Sequence[Point], pixels: Mapping[str, Any]) -> list[Any]:
    """Places on the lines that join a family's points, for labels to keep clear of."""
    found: list[Any] = []
    for prefix in JOINED:
        joined = sorted((p.bits, p.method) for p in points if _prefix(p) == prefix and p.value > 0)
        ends = [pixels[method] for _, method in joined]
        for start, end in itertools.pairwise(ends):
            found += _steps(start, end)
    return found


def _png(canvas: Any, dpi: int) -> bytes:
    buffer = io.BytesIO()
    canvas.figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
