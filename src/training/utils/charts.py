"""Curves and histograms as SVG inside a page: its text is the page's text, its colours the page's variables.

A chart is drawn about as wide as a phone and scaled by the page, so that its letters keep a size that can be read. Long
series are drawn by the means of bins with the range inside each behind them: a spike of one step in thirty thousand
is still seen.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 5.0, 2.9
"""Inches of 72 units: 360 of them across, which is a phone's column."""
BINS = 150
"""A series of more than twice so many steps is drawn by bins."""
MARKED = 40
"""A series of at most so many steps has a mark at each."""
COLOURS = 7
"""Of runs or sides; the page defines them as --c0, --c1, …"""
BARS = 30
TINY = 1e-3
HUGE = 1e9
"""Ticks below the one, and from the other on, have powers of ten."""
MOST_DIGITS = 17
CLIPPED_FROM = 200
"""From so many values on, a histogram's first and last bar hold the outermost half percent."""
# matplotlib wants colours, the page has variables: each stands for one, and is replaced in the text.
_INK, _GRID = "#010101", "#020202"
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {
    f"#0{n}0{n}0f": f"var(--c{n})" for n in range(COLOURS)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "firesteel",  # the same run, the same page
    "font.size": 10.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart: values by step."""

    label: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    colour: int
    dashed: bool = False

    @property
    def finite(self) -> Curve:
        """Without the steps that have no number."""
        kept = np.isfinite(self.values)
        return Curve(self.label, self.steps[kept], self.values[kept], self.colour, self.dashed)

    @property
    def is_binned(self) -> bool:
        """Whether it is too long to be drawn step by step."""
        return len(self.steps) > 2 * BINS


@dataclass(frozen=True)
class Binned:
    """A long series, shortened."""

    steps: NDArray[np.float64]
    means: NDArray[np.float64]
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]

    @classmethod
    def of(cls, curve: Curve) -> Binned:
        """`BINS` bins of neighbouring steps, of one size but for rounding."""
        edges = np.linspace(0, len(curve.steps), BINS + 1).astype(int)
        parts = [(curve.steps[a:b], curve.values[a:b]) for a, b in pairwise(edges)]
        rows = [(steps.mean(), part.mean(), part.min(), part.max()) for steps, part in parts]
        return cls(*np.array(rows).T)


@dataclass(frozen=True)
class Bars:
    """One set of values of a histogram."""

    label: str
    values: NDArray[np.float64]
    colour: int


def draw_curves(name: str, curves: Sequence[Curve], level: float | None = None) -> str:
    """An SVG of curves over steps. `name` is no other chart's of the page, `level` a value worth comparing with."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes) -> None:
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (1, 3)), alpha=0.7)
        for curve in curves:
            _draw_curve(axes, curve.finite)
        _pad_single_step(axes, curves)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))

    return _drawn(name, draw)


def draw_histogram(name: str, bars: Sequence[Bars]) -> str:
    """An SVG of how values are distributed, all sets over the same bins; 0 is marked.

    Of many values, what lies outside the middle 99 % is counted in the first and the last bin: one pair in ten thousand
    would make all others one bar.
    """
    everything = np.concatenate([part.values for part in bars])
    outside = 0.005 if len(everything) >= CLIPPED_FROM else 0.0
    low, high = np.quantile(everything, [outside, 1 - outside])
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BARS + 1)
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes) -> None:
        if low < 0 < high:
            axes.axvline(0, color=_INK, linewidth=0.8, linestyle=(0, (1, 3)), alpha=0.7)
        for part in bars:
            counts, _ = np.histogram(part.values.clip(low, high), edges)
            colour = _colour(part.colour)
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(counts, edges, color=colour, linewidth=1.6)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))

    return _drawn(name, draw)


def _colour(number: int) -> str:
    number %= COLOURS
    return f"#0{number}0{number}0f"


def _draw_curve(axes: Axes, curve: Curve) -> None:
    colour, style = _colour(curve.colour), (0, (5, 2)) if curve.dashed else "solid"
    if curve.is_binned:
        binned = Binned.of(curve)
        axes.fill_between(binned.steps, binned.lows, binned.highs, color=colour, alpha=0.18, linewidth=0)
        axes.plot(binned.steps, binned.means, color=colour, linewidth=1.6, linestyle=style)
        return
    marker = "o" if len(curve.steps) <= MARKED else None
    width = 1.6 if len(curve.steps) <= 4 * MARKED else 1.0
    face = "none" if curve.dashed else colour
    axes.plot(
        curve.steps,
        curve.values,
        color=colour,
        linewidth=width,
        linestyle=style,
        marker=marker,
        markersize=4.5 if curve.dashed else 3,
        markerfacecolor=face,
    )


def _pad_single_step(axes: Axes, curves: Sequence[Curve]) -> None:
    """A series of one step has no width of its own."""
    steps = np.concatenate([curve.steps for curve in curves])
    if len(steps) and steps.min() == steps.max():
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _drawn(name: str, draw: Callable[[Axes], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="none")
        axes = figure.add_axes((0.145, 0.165, 0.835, 0.8), facecolor="none")
        draw(axes)
        axes.grid(axis="y", color=_GRID, linewidth=0.6, alpha=0.6)
        axes.set_axisbelow(True)
        _label_ticks(axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return _for_a_page(written.getvalue(), name)


def _label_ticks(axes: Axes) -> None:
    """Numbers as short as they can be and still differ: matplotlib's own offsets and powers are hard to read small."""
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        low, high = sorted(limits)
        ticks = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
        axis.set_ticks(ticks, labels=tick_labels(ticks))
        axis.set_view_interval(low, high, ignore=True)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Of the ticks of one axis: with as few digits as say each of them.

    With powers of ten where all are tiny, or one is huge.
    """
    largest = max((abs(tick) for tick in ticks), default=0.0)
    apart = min((b - a for a, b in pairwise(ticks)), default=largest or 1.0)
    form = "e" if 0 < largest < TINY or largest >= HUGE else "f"
    forms = (f",.{digits}{form}" for digits in range(MOST_DIGITS))
    exact = (
        f for f in forms if all(abs(float(f"{t:{f}}".replace(",", "")) - t) < apart / 100 for t in ticks)
    )
    chosen = next(exact, f".{MOST_DIGITS}{form}")
    return [_shown(tick, chosen) for tick in ticks]


def _shown(tick: float, form: str) -> str:
    text = f"{tick:{form}}" if tick else "0"
    mantissa, _, exponent = text.partition("e")
    return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", "\N{MINUS SIGN}")


def _for_a_page(svg: str, name: str) -> str:
    """What belongs into a page: no prologue, address, font or size, and names that no other chart has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
