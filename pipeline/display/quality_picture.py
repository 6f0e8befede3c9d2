"""A picture of quality against size: perplexity of a run's models over their bytes, as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from rich import filesize

from pipeline.display.printing import printable

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 180, 30, 60
_NUM_TICKS = 5


@dataclass(frozen=True)
class Point:
    """A model. kind: "source", "this" (the one that the picture is about) or "other"."""

    name: str
    num_bytes: int
    perplexity: float
    kind: str


_STYLES: Mapping[str, str] = {
    "source": 'fill="#555555" r="6"', "this": 'fill="#d95f02" r="8"', "other": 'fill="#7aa6c2" r="5"',
}  # fmt: skip


def quality_picture(points: Sequence[Point]) -> str:
    """An SVG with a point for each model; bytes to the right, perplexity upwards on a logarithmic scale, less being better.

    points: at least one; perplexities are positive.
    """
    sizes, logs = [one.num_bytes for one in points], [math.log(one.perplexity) for one in points]
    least_x, most_x = _widened(min(sizes), max(sizes))
    least_y, most_y = _widened(min(logs), max(logs))

    def x(num_bytes: float) -> float:
        return _LEFT + (num_bytes - least_x) / (most_x - least_x) * (_WIDTH - _LEFT - _RIGHT)

    def y(log: float) -> float:
        return _HEIGHT - _BOTTOM - (log - least_y) / (most_y - least_y) * (_HEIGHT - _TOP - _BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for step in range(_NUM_TICKS):
        size = least_x + (most_x - least_x) * step / (_NUM_TICKS - 1)
        log = least_y + (most_y - least_y) * step / (_NUM_TICKS - 1)
        lines += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(log):.1f}" y2="{y(log):.1f}" stroke="#dddddd"/>',
            f'<text x="{_LEFT - 8}" y="{y(log) + 4:.1f}" text-anchor="end">{math.exp(log):.4g}</text>',
            f'<text x="{x(size):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{filesize.decimal(round(size))}</text>',
        ]
    lines += [
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">bytes of weights</text>',
        f'<text x="{_LEFT}" y="18">perplexity on held-out text (less is better)</text>',
    ]
    for one, log in zip(points, logs, strict=True):
        place = f'cx="{x(one.num_bytes):.1f}" cy="{y(log):.1f}"'
        label = escape(printable(one.name))
        weight = ' font-weight="bold"' if one.kind == "this" else ""
        lines += [
            f"<circle {place} {_STYLES[one.kind]}><title>{label}: {one.perplexity:.4g}</title></circle>",
            f'<text x="{x(one.num_bytes) + 10:.1f}" y="{y(log) + 4:.1f}"{weight}>{label}</text>',
        ]
    return "\n".join((*lines, "</svg>", ""))


def _widened(least: float, most: float) -> tuple[float, float]:
    """A range with some room at both ends; never empty."""
    room = 0.08 * (most - least) or 0.08 * abs(most) or 1.0
    return least - room, most + room
