"""write_report: a run directory as one HTML file that needs nothing else to be read.

What is missing or broken is said in the report; a half-finished run has one too.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import attrs

from tunesmith.engine.durable import write_text
from tunesmith.errors import RunError
from tunesmith.recipe import VERBS, Recipe
from tunesmith.report.console import duration, main_metrics, number

__all__ = ["write_report"]

SAMPLES_SHOWN = 20
DROPPED_SHOWN = 20
BROKEN_NAMED = 5
TEXT_SHOWN = 400
"""Characters of a row's text that are shown."""
POINTS_DRAWN = 1000
"""A longer curve is drawn by the lowest and highest point of each stretch."""

Point = tuple[float, float]


def write_report(run_directory: Path) -> Path:
    """Write `report.html` into a run directory from what lies there, and return its path.

    Errors: `RunError` if there is no such directory, or it cannot be written.
    """
    run_directory = Path(run_directory)
    if not run_directory.is_dir():
        raise RunError(f"{run_directory}: no such run directory; give the directory of a run")
    page = _page(_read_run(run_directory))
    target = run_directory / "report.html"
    # a lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark
    write_text(target, page.encode("utf-8", "replace").decode())
    return target


# What lies in the directory


@attrs.define
class _Stage:
    """One stage as its directory tells it."""

    name: str
    record: Mapping[str, Any] | None = None
    """stage.json; None while the stage is not finished."""
    log: list[Mapping[str, Any]] = attrs.field(factory=list)
    reasons: Counter[str] = attrs.field(factory=Counter)
    dropped: list[tuple[str, str]] = attrs.field(factory=list)
    """Place and reason of the first dropped rows."""
    samples: list[Mapping[str, Any]] = attrs.field(factory=list)
    """Answers that a metric has kept: prompt, completion, reference and scores."""
    notes: list[str] = attrs.field(factory=list)
    """What is missing or broken."""

    @property
    def seconds(self) -> float:
        value = (self.record or {}).get("seconds")
        return _finite(value) if _is_number(value) else math.nan

    @property
    def metrics(self) -> Mapping[str, Any]:
        return _mapping((self.record or {}).get("metrics"))

    @property
    def state(self) -> str:
        if self.record is None:
            return "not finished"
        finished = self.record.get("finished")
        return f"finished {_minute(finished)}" if finished else "finished"


@attrs.define
class _Run:
    """A run directory, read."""

    name: str
    recipe_text: str | None
    recipe: Recipe | None
    lock: Mapping[str, Any] | None
    stages: list[_Stage]
    ahead: list[str]
    """Names of the recipe's steps that have no directory yet."""
    notes: list[str]


def _read_run(directory: Path) -> _Run:
    notes: list[str] = []
    recipe_text = _read_text(directory / "recipe.yaml", "recipe.yaml", notes)
    recipe = None
    if recipe_text is not None:
        try:
            # the newline makes it text, never the name of a file
            recipe = Recipe.from_yaml(recipe_text + "\n")
        except (ValueError, TypeError, RecursionError) as error:
            notes.append(f"recipe.yaml cannot be read as a recipe: {error}")
    lock = _read_mapping(directory / "lock.json", "lock.json", notes)
    kept = directory / "stages"
    folders = [path for path in kept.iterdir() if path.is_dir()] if kept.is_dir() else []
    stages = [_read_stage(path) for path in sorted(folders, key=lambda path: _order(path.name))]
    if not stages:
        notes.append("no stage has left anything yet")
    seen = {_order(stage.name)[0] for stage in stages}
    steps = recipe.steps if recipe else ()
    ahead = [
        f"{at:02d}-{step.label}"
        for at, step in enumerate(steps, 1)
        # the others only say how a model is loaded
        if at not in seen and VERBS[step.verb].leaves_stage
    ]
    return _Run(directory.resolve().name, recipe_text, recipe, lock, stages, ahead, notes)


def _read_stage(directory: Path) -> _Stage:
    stage = _Stage(directory.name)
    where = f"stages/{directory.name}"
    record = _read_mapping(directory / "stage.json", f"{where}/stage.json", stage.notes)
    stage.record = record
    stage.log = list(_read_lines(directory / "log.jsonl", f"{where}/log.jsonl", stage.notes))
    dropped = _read_lines(directory / "dropped.jsonl", f"{where}/dropped.jsonl", stage.notes)
    for row in dropped:
        reason = _shortened(row.get("reason", "no reason given"))
        stage.reasons[reason] += 1
        if len(stage.dropped) < DROPPED_SHOWN:
            stage.dropped.append((_shortened(row.get("where", "")), reason))
    samples = _read_lines(directory / "samples.jsonl", f"{where}/samples.jsonl", stage.notes)
    stage.samples = list(samples)
    return stage


def _order(name: str) -> tuple[float, str]:
    digits = re.match(r"\d+", name)
    return (int(digits[0]) if digits else math.inf, name)


def _read_text(path: Path, name: str, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{name} is not there")
    except OSError as error:
        notes.append(f"{name} cannot be read: {error.strerror}")
    return None


def _read_mapping(path: Path, name: str, notes: list[str]) -> Mapping[str, Any] | None:
    text = _read_text(path, name, notes)
    if text is None:
        return None
    row = _parsed(text)
    if row is None:
        notes.append(f"{name} is not a JSON object and is left out")
    return row


def _read_lines(path: Path, name: str, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the JSON objects of a file that may not exist; broken lines are noted by number."""
    broken = []
    try:
        with path.open("rb") as lines:
            for at, line in enumerate(lines, 1):
                row = _parsed(line)
                if row is not None:
                    yield row
                elif line.strip():
                    broken.append(at)
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{name} cannot be read: {error.strerror}")
    if broken:
        count = len(broken)
        named = ", ".join(map(str, broken[:BROKEN_NAMED]))
        more = f" and {count - BROKEN_NAMED} more" if count > BROKEN_NAMED else ""
        what = "line is not a JSON object" if count == 1 else "lines are not JSON objects"
        are = "is" if count == 1 else "are"
        notes.append(f"{name}: {count} {what} and {are} left out: line {named}{more}")


def _parsed(text: str | bytes) -> Mapping[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError too
        return None
    return row if isinstance(row, dict) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _minute(moment: object) -> str:
    """Return an ISO time to the minute, with its offset; anything else as it stands."""
    try:
        parsed = datetime.fromisoformat(str(moment))
    except ValueError:
        return str(moment)
    zone = parsed.strftime("%z")
    return parsed.strftime("%Y-%m-%d %H:%M ") + (zone if zone.strip("+-0") else "UTC" * bool(zone))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> float:
    """Return a number as a float; NaN if it is infinite, or too large to be drawn or meant."""
    return float(value) if abs(value) < 1e100 else math.nan


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"


# The page


def _page(run: _Run) -> str:
    model = run.recipe.model if run.recipe else run.name
    done = sum(stage.record is not None for stage in run.stages)
    count = len(run.stages) + len(run.ahead)
    known = [stage.seconds for stage in run.stages if math.isfinite(stage.seconds)]
    state = f"{done} of {count} stages finished"
    if known:
        state += f" in {duration(sum(known))}"
    chain = "".join(f"<li>{_text(step.label)}</li>" for step in (run.recipe or _NO_RECIPE).steps)
    parts = [
        f"<header><p class=kicker>tunesmith run <b>{_text(run.name)}</b></p>",
        f"<h1>{_text(model)}</h1>",
        f'<ol class=chain aria-label="Steps of the run">{chain}</ol>' if chain else "",
        f"<p>{state}</p></header>",
        _notes(run.notes),
        "<main>",
        _stage_table(run),
        _samples(run),
        *(_stage_section(stage) for stage in run.stages),
        _recipe(run),
        _lock(run),
        "</main>",
    ]
    body = "\n".join(part for part in parts if part)
    return _DOCUMENT.format(title=f"tunesmith: {_text(model)}", style=_STYLE, body=body)


_NO_RECIPE = Recipe("")


def _text(value: object) -> str:
    """Return a value as HTML text, also fit for a quoted attribute."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value)))


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return f'<ul class=notes aria-label="Missing or broken">{items}</ul>'


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are HTML, and the first of each row is its header."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class=scroll tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _stage_table(run: _Run) -> str:
    if not run.stages and not run.ahead:
        return ""
    rows = []
    for stage in run.stages:
        record = stage.record or {}
        what = " ".join(str(record[key]) for key in ("verb", "plugin") if record.get(key))
        metrics = "".join(
            f"<li>{_text(name).replace('/', '/<wbr>')} <b>{_text(number(value))}</b></li>"
            for name, value in main_metrics(stage.metrics).items()
        )
        link = f'<a href="#{_identifier(stage.name)}">{_text(stage.name)}</a>'
        time = "" if stage.record is None else duration(stage.seconds)
        rows.append(
            (
                f"{link}<small>{_text(what)}</small>",
                f"{time}<small>{_text(stage.state)}</small>",
                f"<ul class=metrics>{metrics}</ul>",
            )
        )
    rows += [(_text(name), "<small>nothing kept yet</small>", "") for name in run.ahead]
    return (
        "<section><h2>Stages</h2>"
        + _table("Stages in order", ("Stage", "Time", "Main metrics"), rows)
        + "</section>"
    )


def _samples(run: _Run) -> str:
    """Return the answers that stages have kept, those to one prompt beside each other."""
    stages = [stage for stage in run.stages if stage.samples]
    if not stages:
        return ""
    said: dict[str, dict[str, str]] = {}
    references: dict[str, str] = {}
    for stage in stages:
        for row in stage.samples:
            prompt = str(row.get("prompt", ""))
            scores = ", ".join(
                f"{name} {number(value)}" for name, value in _mapping(row.get("scores")).items()
            )
            answer = _text(_shortened(row.get("completion", "")))
            note = f"<small>{_text(scores)}</small>" if scores else ""
            said.setdefault(prompt, {})[stage.name] = answer + note
            if row.get("reference") is not None:
                references[prompt] = _text(_shortened(row["reference"]))
    heads = ["Prompt", *(["Reference"] if references else []), *(stage.name for stage in stages)]
    rows = [
        (
            _text(_shortened(prompt)),
            *([references.get(prompt, "")] if references else []),
            *(answers.get(stage.name, "") for stage in stages),
        )
        for prompt, answers in list(said.items())[:SAMPLES_SHOWN]
    ]
    more = len(said) - len(rows)
    return (
        "<section><h2>Samples</h2>"
        + _table("Answers by stage", heads, rows)
        + (f"<p>and {more} more in samples.jsonl of these stages</p>" if more else "")
        + "</section>"
    )


def _stage_section(stage: _Stage) -> str:
    parts = [
        f'<section id="{_identifier(stage.name)}"><h2>{_text(stage.name)}</h2>',
        _notes(stage.notes),
        _charts(stage),
        _dropped(stage),
        _stage_details(stage),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _identifier(name: str) -> str:
    return "stage-" + re.sub(r"[^0-9A-Za-z-]", "_", name)


def _dropped(stage: _Stage) -> str:
    total = stage.reasons.total()
    if not total:
        return ""
    shown = len(stage.dropped)
    common = stage.reasons.most_common(DROPPED_SHOWN)
    counts = [(_text(reason), f"{count:,}") for reason, count in common]
    others = total - sum(count for _, count in common)
    if others:
        counts.append(("other reasons", f"{others:,}"))
    rows = [(_text(where), _text(reason)) for where, reason in stage.dropped]
    more = (
        f"<p>{total - shown:,} more in stages/{_text(stage.name)}/dropped.jsonl</p>"
        if total > shown
        else ""
    )
    heading = f"<h3>Dropped rows: {total:,}</h3>"
    by_reason = _table("Dropped rows by reason", ("Reason", "Rows"), counts)
    first = _table("First dropped rows", ("Row", "Reason"), rows)
    return f"{heading}{by_reason}<details><summary>Which</summary>{first}{more}</details>"


def _stage_details(stage: _Stage) -> str:
    if stage.record is None:
        return ""
    rows = [
        (_text(key), _text(value))
        for key, value in stage.record.items()
        if key not in ("metrics", "options", "name")
    ]
    for key in ("options", "metrics"):
        for name, value in _mapping(stage.record.get(key)).items():
            shown = number(value) if key == "metrics" else json.dumps(value, ensure_ascii=False)
            rows.append((_text(f"{key}: {name}"), _text(shown)))
    table = _table(f"All that {stage.name} has kept", ("Name", "Value"), rows)
    return f"<details><summary>Options and all metrics</summary>{table}</details>"


def _recipe(run: _Run) -> str:
    if run.recipe_text is None:
        return ""
    return (
        "<section><h2>Recipe</h2>"
        f'<pre tabindex="0" aria-label="recipe.yaml">{_text(run.recipe_text)}</pre></section>'
    )


def _lock(run: _Run) -> str:
    if run.lock is None:
        return ""
    rows = [(_text(name), _text(value)) for name, value in _flat(run.lock)]
    table = _table("Contents of lock.json", ("Name", "Value"), rows)
    return (
        "<section><h2>Lock</h2><details><summary>Versions, hashes and plugins of this run"
        f"</summary>{table}</details></section>"
    )


def _flat(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every leaf of nested mappings with its path, such as ("versions / torch", "2.9")."""
    # a loop and not a recursion: the depth is the file's
    ahead = [*value.items()][::-1]
    while ahead:
        name, item = ahead.pop()
        if isinstance(item, dict) and item:
            ahead += [(f"{name} / {key}", inner) for key, inner in item.items()][::-1]
        else:
            yield name, item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)


# Charts

_SERIES = {
    "Loss": {"train": "loss", "eval": "eval_loss"},
    "Reward margin": {"train": "rewards/margins", "eval": "eval_rewards/margins"},
    "Reward accuracy": {"train": "rewards/accuracies", "eval": "eval_rewards/accuracies"},
    "Learning rate": {"learning rate": "learning_rate"},
    "Gradient norm": {"gradient norm": "grad_norm"},
}
_FOLDED = ("Learning rate", "Gradient norm")


def _charts(stage: _Stage) -> str:
    if not stage.log:
        return ""
    shown: list[str] = []
    folded: list[str] = []
    for title, keys in _SERIES.items():
        curves = {label: _curve(stage.log, key) for label, key in keys.items()}
        curves = {label: curve for label, curve in curves.items() if curve}
        if curves:
            identifier = f"{_identifier(stage.name)}-{title.replace(' ', '-').lower()}"
            target = folded if title in _FOLDED else shown
            target.append(_chart(title, curves, identifier))
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
        if _is_number(row.get(key)):
            step = _finite(row["step"]) if _is_number(row.get("step")) else float(at)
            if math.isfinite(step):
                points.append((step, _finite(row[key])))
    return points


_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 10, 42


def _chart(title: str, curves: Mapping[str, Sequence[Point]], identifier: str) -> str:
    """Return a line chart as a figure with a caption that says in words what it shows."""
    finite = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    words = "; ".join(_in_words(label, curve) for label, curve in curves.items())
    if not finite:
        return f"<figure><figcaption><h3>{title}</h3><p>{_text(words)}</p></figcaption></figure>"
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
        f'<p id="{identifier}-words" class=words>{_text(words)}</p></figure>'
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


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { --back: #fff; --ink: #1c1f23; --soft: #5a626c; --rule: #dde1e6; --panel: #f5f6f8;
  --train: #1f6fb4; --eval: #b4531f; --note: #fff4d6; --note-ink: #5c4300; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181c; --ink: #e6e8eb; --soft: #a3abb5; --rule: #343a42; --panel: #1e2329;
    --train: #6db3f2; --eval: #f2a36d; --note: #3a3016; --note-ink: #f5dfa6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--back);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
.kicker { margin: 0; color: var(--soft); }
a { color: var(--train); }
.chain { list-style: none; display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .75rem;
  padding: 0; }
.chain li { padding: .1rem .6rem; border: 1px solid var(--rule); border-radius: 1rem;
  background: var(--panel); }
.chain li + li::before { content: "\\2192\\00a0"; color: var(--soft); }
.notes { margin: 1rem 0; padding: .6rem 1rem .6rem 2rem; border-radius: .4rem;
  background: var(--note); color: var(--note-ink); }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; min-width: min(100%, 36rem);
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding-bottom: .25rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0;
  border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-size: .875rem; overflow-wrap: normal; }
tbody th { font-weight: 600; }
tr > :last-child { padding-right: 0; }
th small, td small { display: block; color: var(--soft); font-weight: 400; }
td small { min-width: 5.5rem; }
th a, .metrics { overflow-wrap: break-word; }
.metrics { min-width: 8.5rem; list-style: none; margin: 0; padding: 0; }
.charts { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; }
figcaption h3 { margin: 0; }
.legend { list-style: none; display: flex; gap: 1rem; margin: 0; padding: 0;
  font-size: .875rem; }
.legend li::before { content: ""; display: inline-block; width: 1.5rem; margin-right: .4rem;
  border-top: 3px solid var(--train); vertical-align: middle; }
.legend .eval::before { border-top: 3px dashed var(--eval); }
.words { margin: .25rem 0 0; color: var(--soft); font-size: .875rem; }
svg { display: block; width: 100%; height: auto; margin-top: .25rem; }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); fill: none; }
svg .line { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
svg .line.train { stroke: var(--train); }
svg .line.eval { stroke: var(--eval); stroke-dasharray: 5 3; }
svg circle.train { fill: var(--train); } svg circle.eval { fill: var(--eval); }
summary { cursor: pointer; padding: .3rem 0; color: var(--train); }
pre { overflow-x: auto; margin: 0; padding: .75rem 1rem; border-radius: .4rem;
  background: var(--panel); font: .875rem/1.5 ui-monospace, monospace; }
"""
