"""The page of a report: its sections, from the header to the lock."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.engine.figures import duration, figure, number, summary
from tunesmith.engine.store import SAMPLES
from tunesmith.recipe import Recipe
from tunesmith.report.charts import charts
from tunesmith.report.pieces import identifier_of, notes_list, table, text_of
from tunesmith.report.reading import DROPPED_SHOWN, ReadRun, ReadStage, mapping, shortened
from tunesmith.report.style import DOCUMENT, STYLE

__all__ = ["page"]

SAMPLES_SHOWN = 20


def page(run: ReadRun) -> str:
    """Return the whole page of a run."""
    model = run.recipe.model if run.recipe else run.name
    done = sum(stage.record is not None for stage in run.stages)
    count = len(run.stages) + len(run.ahead)
    known = [stage.seconds for stage in run.stages if math.isfinite(stage.seconds)]
    state = f"{done} of {count} stages finished"
    if known:
        state += f" in {duration(sum(known))}"
    chain = "".join(f"<li>{text_of(step.label)}</li>" for step in (run.recipe or _NO_RECIPE).steps)
    parts = [
        f"<header><p class=kicker>tunesmith run <b>{text_of(run.name)}</b></p>",
        f"<h1>{text_of(model)}</h1>",
        f'<ol class=chain aria-label="Steps of the run">{chain}</ol>' if chain else "",
        f"<p>{state}</p></header>",
        notes_list(run.notes),
        "<main>",
        _stage_table(run),
        _samples(run),
        *(_stage_section(stage) for stage in run.stages),
        _recipe(run),
        _lock(run),
        "</main>",
    ]
    body = "\n".join(part for part in parts if part)
    return DOCUMENT.format(title=f"tunesmith: {text_of(model)}", style=STYLE, body=body)


_NO_RECIPE = Recipe("")


def _stage_table(run: ReadRun) -> str:
    if not run.stages and not run.ahead:
        return ""
    rows = []
    for stage in run.stages:
        record = stage.record or {}
        what = " ".join(str(record[key]) for key in ("verb", "plugin") if record.get(key))
        metrics = "".join(
            f"<li>{text_of(name).replace('/', '/<wbr>')} <b>{text_of(value)}</b></li>"
            for name, value in summary(stage.metrics, most=5).items()
        )
        link = f'<a href="#{identifier_of(stage.name)}">{text_of(stage.name)}</a>'
        time = "" if stage.record is None else duration(stage.seconds)
        rows.append(
            (
                f"{link}<small>{text_of(what)}</small>",
                f"{time}<small>{text_of(stage.state)}</small>",
                f"<ul class=metrics>{metrics}</ul>",
            )
        )
    rows += [(text_of(name), "<small>nothing kept yet</small>", "") for name in run.ahead]
    return (
        "<section><h2>Stages</h2>"
        + table("Stages in order", ("Stage", "Time", "Main metrics"), rows)
        + "</section>"
    )


def _samples(run: ReadRun) -> str:
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
                f"{name} {number(value)}" for name, value in mapping(row.get("scores")).items()
            )
            answer = text_of(shortened(row.get("completion", "")))
            note = f"<small>{text_of(scores)}</small>" if scores else ""
            said.setdefault(prompt, {})[stage.name] = answer + note
            if row.get("reference") is not None:
                references[prompt] = text_of(shortened(row["reference"]))
    heads = ["Prompt", *(["Reference"] if references else []), *(stage.name for stage in stages)]
    rows = [
        (
            text_of(shortened(prompt)),
            *([references.get(prompt, "")] if references else []),
            *(answers.get(stage.name, "") for stage in stages),
        )
        for prompt, answers in list(said.items())[:SAMPLES_SHOWN]
    ]
    more = len(said) - len(rows)
    return (
        "<section><h2>Samples</h2>"
        + table("Answers by stage", heads, rows)
        + (f"<p>and {more} more in {SAMPLES} of these stages</p>" if more else "")
        + "</section>"
    )


def _stage_section(stage: ReadStage) -> str:
    parts = [
        f'<section id="{identifier_of(stage.name)}"><h2>{text_of(stage.name)}</h2>',
        notes_list(stage.notes),
        charts(stage.log, identifier_of(stage.name)) if stage.log else "",
        _dropped(stage),
        _stage_details(stage),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _dropped(stage: ReadStage) -> str:
    total = stage.reasons.total()
    if not total:
        return ""
    shown = len(stage.dropped)
    common = stage.reasons.most_common(DROPPED_SHOWN)
    counts = [(text_of(reason), f"{count:,}") for reason, count in common]
    others = total - sum(count for _, count in common)
    if others:
        counts.append(("other reasons", f"{others:,}"))
    rows = [(text_of(where), text_of(reason)) for where, reason in stage.dropped]
    more = (
        f"<p>{total - shown:,} more in stages/{text_of(stage.name)}/dropped.jsonl</p>"
        if total > shown
        else ""
    )
    heading = f"<h3>Dropped rows: {total:,}</h3>"
    by_reason = table("Dropped rows by reason", ("Reason", "Rows"), counts)
    first = table("First dropped rows", ("Row", "Reason"), rows)
    return f"{heading}{by_reason}<details><summary>Which</summary>{first}{more}</details>"


def _stage_details(stage: ReadStage) -> str:
    if stage.record is None:
        return ""
    ran = [*_options("", stage.record.get("options"))]
    for step, said in mapping(stage.record.get("setup")).items():
        ran += _options(f"{step}: ", mapping(said).get("options"))
    measured = [
        (text_of(name), text_of(figure(name, value))) for name, value in stage.metrics.items()
    ]
    rest = [
        (text_of(key), text_of(value))
        for key, value in stage.record.items()
        if key not in ("metrics", "options", "setup", "name")
    ]
    tables = (
        ("Options as they acted", ("Option", "Value"), ran),
        ("All metrics", ("Metric", "Value"), measured),
        (f"What else {stage.name} has kept", ("Name", "Value"), rest),
    )
    listing = "".join(table(*each) for each in tables if each[2])
    return f"<details><summary>Options and all metrics</summary>{listing}</details>"


def _options(before: str, options: Any) -> Iterator[tuple[str, str]]:
    """Yield each option with its value; one that nothing was decided for is left out."""
    for name, value in mapping(options).items():
        if value is not None:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield text_of(f"{before}{name}"), text_of(shown)


def _recipe(run: ReadRun) -> str:
    if run.recipe_text is None:
        return ""
    return (
        "<section><h2>Recipe</h2>"
        f'<pre tabindex="0" aria-label="recipe.yaml">{text_of(run.recipe_text)}</pre></section>'
    )


def _lock(run: ReadRun) -> str:
    if run.lock is None:
        return ""
    rows = [(text_of(name), text_of(value)) for name, value in _flat(run.lock)]
    listing = table("Contents of lock.json", ("Name", "Value"), rows)
    return (
        "<section><h2>Lock</h2><details><summary>Versions, hashes and plugins of this run"
        f"</summary>{listing}</details></section>"
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
