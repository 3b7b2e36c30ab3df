"""The report's figures, drawn into memory: equal input gives equal bytes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FAMILIES: Mapping[str, tuple[str, str, str]] = {  # prefix -> title, colour, marker
    "paper-": ("paper's, nn.Linear only", "#b5482f", "X"),
    "uniform": ("paper's codecs, all weights", "#e39a2d", "P"),
    "rtn": ("round to nearest", "#8a8f98", "s"),
    "gptq": ("GPTQ", "#5b4b9a", "D"),
    "market-coded": ("market, coded", "#0b6e63", "o"),
    "market-tiles": ("market, tiles", "#3f8fd2", "^"),
    "": ("other", "#3d3d3d", "v"),
}
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
SPARE_COLOURS = ("#c86fa0", "#6a994e", "#a07855", "#77a6a0")
TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32)
WIDTH = 4.9  # inches; a phone shows it at 0.6 of its size
INK, FAINT = "#1d2329", "#d9dde2"
OFFSETS = (  # of a label from its point, and which end of it that is; the first that has room is taken
    *((7, 4, "left"), (-7, 4, "right"), (7, -11, "left"), (-7, -11, "right")),
    *((0, 9, "center"), (0, -16, "center"), (9, -3, "left"), (-9, -3, "right"), (-3, -18, "right"), (3, 14, "left")),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One method in a figure."""

    method: str
    bits: float
    value: float
    interval: tuple[float, float] | None = None
    claimed: float | None = None  # bits by the paper's accounting


def family(method: str) -> str:
    """The key in FAMILIES that a method belongs to."""
    if method.startswith("nash"):
        return "uniform"
    return next(prefix for prefix in FAMILIES if method.startswith(prefix))


def frontier(points: Sequence[Point], label: str, dpi: int) -> bytes:
    """Cost against true bits per weight, both logarithmic, as PNG. What is not above 0 lies on the lower edge.

    Arguments: `label`, of the vertical axis.
    """
    canvas = _canvas(4.5, dpi)
    figure = canvas.figure
    axes = figure.add_subplot()
    floor, ceiling = _span(points)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    for prefix in (p for p in FAMILIES if any(family(x.method) == p for x in points)):
        _draw_family(axes, [x for x in points if family(x.method) == prefix], prefix, floor)
    _draw_claims(axes, [p for p in points if p.claimed and p.value > 0])
    axes.set_ylim(floor, ceiling)
    _dress(axes, [b for p in points for b in (p.bits, p.claimed) if b], label)
    if points:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    canvas.draw()
    figure.set_layout_engine("none")
    _label(axes, canvas, points, floor)
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


def _draw_family(axes: Any, points: Sequence[Point], prefix: str, floor: float) -> None:
    title, colour, marker = FAMILIES[prefix]
    points = sorted(points, key=lambda p: (p.bits, p.method))
    above = [p for p in points if p.value > 0]
    below = [p for p in points if p.value <= 0]
    line = "-" if prefix.startswith("market") else "none"
    axes.plot(
        [p.bits for p in above],
        [p.value for p in above],
        linestyle=line,
        linewidth=1.4,
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

    least, most = min(bits, default=1.0) / 1.3, max(bits, default=8.0) * 1.25
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
    lines = _along_lines(points, pixels)
    lines += [axes.transData.transform((p.claimed, p.value)) for p in points if p.claimed and p.value > 0]
    taken: list[Any] = []
    frame = axes.get_window_extent(canvas.get_renderer())
    for point in sorted(points, key=lambda p: (p.bits, p.method)):
        name = point.method.removeprefix("market-") + ("" if point.value > 0 else " (≤ 0)")
        others = [xy for m, xy in pixels.items() if m != point.method] + lines
        for dx, dy, side in OFFSETS:
            text = axes.annotate(
                name,
                places[point.method],
                (dx, dy),
                textcoords="offset points",
                ha=side,
                fontsize=8.5,
                color=FAMILIES[family(point.method)][1],
            )
            box = text.get_window_extent(canvas.get_renderer())
            covered = any(box.overlaps(t) for t in taken) or any(box.padded(2).contains(*xy) for xy in others)
            if not covered and box.x0 >= frame.x0 and box.x1 <= frame.x1 + 12 and box.y0 >= frame.y0:
                taken.append(box)
                break
            text.remove()


def _along_lines(points: Sequence[Point], pixels: Mapping[str, Any]) -> list[Any]:
    """Places on the lines that join a market's points, for labels to keep clear of."""
    found: list[Any] = []
    for prefix in (p for p in FAMILIES if p.startswith("market")):
        joined = sorted((p.bits, p.method) for p in points if family(p.method) == prefix and p.value > 0)
        ends = [pixels[method] for _, method in joined]
        for start, end in itertools.pairwise(ends):
            found += [start + (end - start) * step / 12 for step in range(1, 12)]
    return found


def _png(canvas: Any, dpi: int) -> bytes:
    buffer = io.BytesIO()
    canvas.figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
