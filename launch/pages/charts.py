"""Line charts as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 220, 58, 12, 12, 30
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")

Points = Sequence[tuple[float, float]]


def line_chart(title: str, series: Mapping[str, Points]) -> str:
    """Draw named series of (step, value) points; series without points are left out.

    Returns an HTML figure, or "" where no series has points.
    """
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_low, x_high = _bounds(xs)
    y_low, y_high = _bounds(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [_grid(x_low, x_high, y_low, y_high)]
    legend: list[str] = []
    for index, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[index % len(COLOURS)]
        spots = [place(x, y) for x, y in sorted(points)]
        path = " ".join(f"{x},{y}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        if len(spots) < 40:
            parts += [f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>' for x, y in spots]
        legend.append(f'<span style="color:{colour}">{escape(name)} {points[-1][1]:.4g}</span>')

    return (
        f"<figure><figcaption>{escape(title)} {' '.join(legend)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 0.5
        return low - margin, high + margin
    return low, high


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Return round values from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.

    There are at most `count` + 1 of them; `whole` allows only integers.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def _grid(x_low: float, x_high: float, y_low: float, y_high: float) -> str:
    bottom = HEIGHT - BOTTOM
    parts: list[str] = []
    for value in ticks(y_low, y_high):
        y = round(bottom - (value - y_low) / (y_high - y_low) * (bottom - TOP), 1)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in ticks(x_low, x_high, whole=True):
        x = round(LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)
        parts.append(f'<text x="{x}" y="{HEIGHT - 16}" text-anchor="middle">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return "".join(parts)
