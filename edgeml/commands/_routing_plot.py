"""Hit rate against capacity as a picture: one self-contained SVG, drawn by hand so that the runtime needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["plot"]

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 700, 48, 360
#: Policy -> colour and dashes: told apart without colour too.
STYLES = {
    "belady": ("#222222", "7 4"),
    "lookahead-16": ("#0072b2", "2 3"),
    "pager": ("#d55e00", ""),
    "lru": ("#009e73", "10 3 2 3"),
    "lfu": ("#cc79a7", "4 2"),
}
MARKED = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

Curves = Mapping[str, Sequence[Sequence[float]]]


def plot(curves: Curves, title: str, note: str) -> str:
    """An SVG document of `curves`, policy -> [[capacity ratio, hit rate], ...]; ratios on a logarithmic axis."""
    ratios = [ratio for curve in curves.values() for ratio, _ in curve]
    low, high = min(ratios), max(max(ratios), 1.01 * min(ratios))

    def across(ratio: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(ratio / low) / math.log(high / low)

    def down(rate: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * rate

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 24, title, size=15),
    ]
    for tenth in range(0, 11, 2):
        parts += [_line(LEFT, down(tenth / 10), RIGHT, down(tenth / 10)), _text(LEFT - 8, down(tenth / 10) + 4, f"{10 * tenth} %", "end")]
    for mark in MARKED:
        if low <= mark <= high:
            parts += [_line(across(mark), TOP, across(mark), BOTTOM), _text(across(mark), BOTTOM + 18, f"{mark:g}", "middle")]
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 36, "experts held, in units of those one token uses", "middle"))
    for number, (name, curve) in enumerate(curves.items()):
        colour, dashes = STYLES.get(name, ("#666666", ""))
        points = " ".join(f"{across(ratio):.1f},{down(rate):.1f}" for ratio, rate in curve)
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{points}" fill="none" {stroke}/>')
        y = BOTTOM - 18 - 17 * (len(curves) - 1 - number)
        parts.append(f'<rect x="{RIGHT - 158}" y="{y - 12}" width="154" height="17" fill="#ffffff" fill-opacity="0.85"/>')
        parts.append(f'<line x1="{RIGHT - 150}" y1="{y - 4}" x2="{RIGHT - 116}" y2="{y - 4}" {stroke}/>')
        parts.append(_text(RIGHT - 108, y, name))
    return "\n".join([*parts, _text(LEFT, HEIGHT - 8, note, size=11), "</svg>"]) + "\n"


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
