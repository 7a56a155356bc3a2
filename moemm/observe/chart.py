"""Line charts as inline SVG, coloured by the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 150, 44, 10, 8, 24
MAX_POINTS, DOTS = 160, 16

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """points: (x, y), drawn as a line, also with dots if they are few. level: a dashed line across, and its name.

    band: (x, lowest, highest). xlabel: what x counts.
    """

    title: str
    points: Points
    xlabel: str
    level: tuple[float, str] | None = None
    band: Sequence[tuple[float, float, float]] = ()

    def svg(self) -> str:
        """A figure with its caption; a remark where there is nothing to draw."""
        caption = f"<figcaption>{escape(self.title)}</figcaption>"
        points = thin(self.points)
        if not points:
            return f'<figure>{caption}<p class="soft">nothing recorded</p></figure>'
        frame = _Frame.around([*points, *self._extremes()])
        parts = [frame.axes(self.xlabel)]
        if self.band:
            there = [(x, high) for x, _, high in self.band] + [(x, low) for x, low, _ in reversed(self.band)]
            parts.append(f'<polygon class="band" points="{frame.path(there)}"/>')
        if self.level is not None:
            y = frame.y(self.level[0])
            parts.append(f'<line class="two" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<polyline class="one" points="{frame.path(points)}"/>')
        parts += [frame.dot(x, y) for x, y in points if len(points) <= DOTS]
        label = escape(f"{self.title}: from {points[0][1]:.3g} to {points[-1][1]:.3g}")
        svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        return f"<figure>{caption}{svg}</figure>"

    def _extremes(self) -> list[tuple[float, float]]:
        first = self.points[0][0]
        level = [(first, self.level[0])] if self.level is not None else []
        return level + [(x, y) for x, low, high in self.band for y in (low, high)]


def thin(points: Points) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means over runs of equal length. Points that are no numbers are left out."""
    known = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(known) / MAX_POINTS)
    runs = [known[start : start + size] for start in range(0, len(known), max(size, 1))]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


@dataclass(frozen=True, slots=True)
class _Frame:
    """The ranges that the drawing area shows."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Points) -> _Frame:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        pad = 0.06 * (max(ys) - min(ys)) or max(abs(ys[0]) * 0.1, 1e-3)
        wide = (max(xs) - min(xs)) or 1.0
        return cls(max(xs) - wide, max(xs), min(ys) - pad, max(ys) + pad)

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def dot(self, x: float, y: float) -> str:
        """A point that says its values."""
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}"'
        return f'<circle class="dot" {place} r="3"><title>{x:g}: {y:.4g}</title></circle>'

    def axes(self, xlabel: str) -> str:
        """Lines and numbers at three heights, and both ends of x."""
        base = HEIGHT - BOTTOM
        heights = [self.low + (self.high - self.low) * share for share in (0.06, 0.5, 0.94)]
        digits = max(0, min(4, 1 - math.floor(math.log10(self.high - self.low))))
        lines = [
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(h):.1f}" y2="{self.y(h):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{self.y(h) + 4:.1f}" text-anchor="end">{h:.{digits}f}</text>'
            for h in heights
        ]
        ends = (
            f'<text x="{LEFT}" y="{base + 17}">{self.left:g}</text>'
            f'<text x="{WIDTH - RIGHT}" y="{base + 17}" text-anchor="end">{self.right:g}</text>'
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{base + 17}" text-anchor="middle">{escape(xlabel)}</text>'
        )
        return "".join(lines) + ends
