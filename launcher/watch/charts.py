"""Curves as SVG: a page that a person can mail must carry no megabytes of script and load nothing.

Colours are classes (`c0` … `c5`), which the page's style sheet gives for light and dark. Each point has a tooltip.
"""

import math
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

NUM_COLOURS = 6
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 520, 240, 68, 38, 10, 14
_MOST_POINTS, _MOST_TOOLTIPS = 1000, 200


@dataclass(frozen=True)
class Line:
    """One series of a chart; a pale one stands behind the others."""

    name: str
    colour: int
    points: list[Point]
    pale: bool = False


@dataclass(frozen=True)
class Axes:
    """The plotted ranges and how they map to the picture."""

    left: float
    right: float
    low: float
    high: float
    logarithmic: bool

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, value, high = map(math.log10 if self.logarithmic else float, (self.low, value, self.high))
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)


def fit_axes(ys: list[float], left: float, right: float, logarithmic: bool) -> Axes:
    """Fit the ranges to what is drawn, which may be one value.

    A linear axis begins at zero unless its values lie close together; the steps do, but for a run that began late.
    """
    if left < 0.2 * right or left == right > 0:
        left = 0
    right = max(right, left + 1)
    low, high = min(ys), max(ys)
    if logarithmic:
        return Axes(left, right, low / 1.2, high * 1.2, True)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    margin = (high - low or abs(high) or 1) * 0.05
    return Axes(left, right, low - margin if low else 0.0, high + margin, False)


def svg(axes: Axes, lines: list[Line], is_share: bool = False) -> str:
    """Draw lines over the step."""
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for value in _log_ticks(axes.low, axes.high) if axes.logarithmic else ticks(axes.low, axes.high):
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y + 4:.1f}">{_shown(value, is_share)}</text>')
    for value in ticks(axes.left, axes.right, smallest=1):
        parts.append(f'<text class="x" x="{axes.x(value):.1f}" y="{_HEIGHT - 22}">{label(value)}</text>')
    parts.append(f'<text class="x" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 5}">step</text>')
    parts += [_drawn(axes, line, is_share) for line in sorted(lines, key=lambda line: not line.pale)]
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 5, smallest: float = 0.0) -> list[float]:
    """Return round numbers inside a range, about `count` of them and at least `smallest` apart."""
    raw = max((high - low) / count, smallest)
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in ((1, 2, 5, 10) if smallest else (1, 2, 2.5, 5, 10)) if m * size >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten, or 1, 2 and 5 of them, or what is round in a narrow range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [m * 10.0**p for p in powers for m in factors if low <= m * 10.0**p <= high]
        if len(found) > 1:
            return found
    return ticks(low, high)


def label(value: float) -> str:
    """Return a round number as people write it: 0.0001, 1,200, 10k, 2M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:,.6g}M"
    if size >= 10_000:
        return f"{value / 1000:.6g}k"
    return f"{value:,.6g}" if size >= 1e-4 or not value else f"{value:.3g}".replace("e-0", "e-")


def _shown(value: float, is_share: bool) -> str:
    return f"{label(100 * value)} %" if is_share else label(value)


def _drawn(axes: Axes, line: Line, is_share: bool) -> str:
    points = _thinned(line.points)
    places = [(axes.x(x), axes.y(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    # few points (evaluations) get dots, so that a single one is seen at all
    dots = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>' for x, y in places if len(places) < 40)
    every = math.ceil(len(points) / _MOST_TOOLTIPS)
    hints = "".join(
        f'<circle class="hint" cx="{x:.1f}" cy="{y:.1f}" r="7"><title>{escape(line.name)}: '
        f"{_exact(value, is_share)} at step {step:,}</title></circle>"
        for (x, y), (step, value) in list(zip(places, points, strict=True))[::-every]
    )
    kind = f"c{line.colour}{' pale' if line.pale else ''}"
    return f'<g class="{kind}"><polyline points="{path}"/>{dots}{hints}</g>'


def _exact(value: float, is_share: bool) -> str:
    return f"{value:.2%}" if is_share else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _thinned(points: list[Point]) -> list[Point]:
    """Return at most a thousand points or so: the lowest and the highest of each stretch, so that no spike is lost."""
    width = math.ceil(2 * len(points) / _MOST_POINTS)
    if width <= 2:
        return points
    stretches = [points[i : i + width] for i in range(0, len(points), width)]
    by_height = [(min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])) for part in stretches]
    return [point for pair in by_height for point in sorted(dict.fromkeys(pair))]
