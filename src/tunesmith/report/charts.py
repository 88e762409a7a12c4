"""Curves of what a stage has logged, drawn as SVG and told in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.engine.figures import number
from tunesmith.report.pieces import text_of
from tunesmith.report.reading import finite_or_nan, is_number

__all__ = ["charts"]

POINTS_DRAWN = 1000
"""A longer curve is drawn by the lowest and highest point of each stretch."""

Point = tuple[float, float]

_SERIES = {
    "Loss": {"train": "loss", "eval": "eval_loss"},
    "Reward margin": {"train": "rewards/margins", "eval": "eval_rewards/margins"},
    "Reward accuracy": {"train": "rewards/accuracies", "eval": "eval_rewards/accuracies"},
    "Learning rate": {"learning rate": "learning_rate"},
    "Gradient norm": {"gradient norm": "grad_norm"},
}
_FOLDED = ("Learning rate", "Gradient norm")


def charts(log: Sequence[Mapping[str, Any]], identifier: str) -> str:
    """Return the curves of a log as HTML; ids in it begin with `identifier`."""
    shown: list[str] = []
    folded: list[str] = []
    for title, keys in _SERIES.items():
        curves = {label: _curve(log, key) for label, key in keys.items()}
        curves = {label: curve for label, curve in curves.items() if curve}
        if curves:
            name = f"{identifier}-{title.replace(' ', '-').lower()}"
            target = folded if title in _FOLDED else shown
            target.append(_chart(title, curves, name))
    if not shown and not folded:
        return "<p>The log holds no loss.</p>"
    parts = f"<div class=charts>{''.join(shown)}</div>" if shown else ""
    if folded:
        parts += (
            "<details><summary>Learning rate and gradient norm</summary>"
            f"<div class=charts>{''.join(folded)}</div></details>"
        )
    return parts


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """Return (step, value) in order; a value that is not finite is NaN."""
    points = []
    for at, row in enumerate(log, 1):
        if is_number(row.get(key)):
            step = finite_or_nan(row["step"]) if is_number(row.get("step")) else float(at)
            if math.isfinite(step):
                points.append((step, finite_or_nan(row[key])))
    return points


_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 10, 42


def _chart(title: str, curves: Mapping[str, Sequence[Point]], identifier: str) -> str:
    """Return a line chart as a figure with a caption that says in words what it shows."""
    finite = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    words = "; ".join(_in_words(label, curve) for label, curve in curves.items())
    if not finite:
        return f"<figure><figcaption><h3>{title}</h3><p>{text_of(words)}</p></figcaption></figure>"
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_ticks, y_ticks = _ticks(min(xs), max(xs), whole=True), _ticks(min(ys), max(ys))
    x_low, x_high = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
    y_low, y_high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    shapes = []
    right, foot = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick, text in zip(y_ticks, _tick_texts(y_ticks), strict=True):
        y = place(x_low, tick)[1]
        shapes.append(f'<path class=grid d="M{_LEFT} {y:.1f}H{right}"/>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class=end>{text}</text>')
    for tick, text in zip(x_ticks, _tick_texts(x_ticks), strict=True):
        x = place(tick, y_low)[0]
        shapes.append(f'<path class=axis d="M{x:.1f} {foot}v4"/>')
        shapes.append(f'<text x="{x:.1f}" y="{foot + 19}" class=middle>{text}</text>')
    shapes.append(f'<path class=axis d="M{_LEFT} {_TOP}V{foot}H{right}"/>')
    middle = (_LEFT + right) / 2
    shapes.append(f'<text x="{middle}" y="{_HEIGHT - 4}" class=middle>step</text>')
    for label, curve in curves.items():
        kind = "eval" if label == "eval" else "train"
        placed = [place(x, y) if math.isfinite(y) else None for x, y in _thinned(curve)]
        shapes.append(f'<path class="line {kind}" d="{_path(placed)}"/>')
        # few points get a dot each: a single one would be no line at all
        if len(curve) <= 30:
            dots = (point for point in placed if point is not None)
            shapes += (f'<circle class={kind} cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in dots)
    legend = "".join(
        f"<li class={'eval' if label == 'eval' else 'train'}>{label}</li>" for label in curves
    )
    return (
        f"<figure><figcaption><h3>{title}</h3>"
        f"<ul class=legend>{legend}</ul></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="{identifier}-title" aria-describedby="{identifier}-words">'
        f'<title id="{identifier}-title">{title} by step</title>{"".join(shapes)}</svg>'
        f'<p id="{identifier}-words" class=words>{text_of(words)}</p></figure>'
    )


def _in_words(label: str, curve: Sequence[Point]) -> str:
    finite = [(x, y) for x, y in curve if math.isfinite(y)]
    lost = len(curve) - len(finite)
    parts = []
    if finite:
        (first_x, first), (last_x, last) = finite[0], finite[-1]
        parts.append(f"{label} {number(first)} at step {number(int(first_x))}")
        if len(finite) > 1:
            parts.append(f"{number(last)} at step {number(int(last_x))}")
            parts.append(f"lowest {number(min(y for _, y in finite))}")
            parts.append(f"highest {number(max(y for _, y in finite))}")
    if lost:
        step = next(int(x) for x, y in curve if not math.isfinite(y))
        times = "once" if lost == 1 else f"{lost:,} times"
        lead = "" if finite else f"{label} "
        parts.append(f"{lead}not a finite number {times}, first at step {number(step)}")
    return ", ".join(parts)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return about five round values that enclose low and high; if `whole`, integers within."""
    if high - low <= max(
        1e-12 * max(abs(low), abs(high)), 1e-100
    ):  # a flat curve, or a single point
        if whole:
            return [low]
        around = abs(low) / 10 if abs(low) > 1e-90 else 1.0
        low, high = low - around, high + around
    raw = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((size * factor for factor in (1, 2, 2.5, 5) if size * factor >= raw), 10 * size)
    if whole:
        step = max(1.0, float(round(step)))
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step), math.ceil(high / step)
    return [at * step for at in range(first, last + 1)] or [low]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Return the ticks as text, with as many digits as tell them apart."""
    texts = [number(tick) for tick in ticks]
    return texts if len(set(texts)) == len(texts) else [f"{tick:.15g}" for tick in ticks]


def _thinned(curve: Sequence[Point]) -> Sequence[Point]:
    if len(curve) <= POINTS_DRAWN:
        return curve
    kept: list[Point] = []
    stretch = math.ceil(2 * len(curve) / POINTS_DRAWN)
    for at in range(0, len(curve), stretch):
        part = [point for point in curve[at : at + stretch] if math.isfinite(point[1])]
        if not part:
            kept.append(curve[at])
            continue
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _path(points: Iterable[tuple[float, float] | None]) -> str:
    """Return an SVG path through the points; None lifts the pen."""
    parts, down = [], False
    for point in points:
        if point is not None:
            parts.append(f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        down = point is not None
    return "".join(parts)
