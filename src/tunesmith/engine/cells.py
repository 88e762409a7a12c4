"""How a recipe, a plan and a result look in a notebook's cell: HTML that needs nothing else.

Colours are those of the notebook, in the light and in the dark; all text is escaped.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from tunesmith.engine.figures import duration, summary
from tunesmith.recipe import Recipe

if TYPE_CHECKING:
    from tunesmith.engine.plan import Plan
    from tunesmith.engine.result import RunResult

__all__ = [
    "framed",
    "in_notebook",
    "plan_html",
    "recipe_html",
    "result_html",
    "result_text",
    "show_once",
    "text_of",
]

SHOWN = 200
"""Characters of an option's value that are shown."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows HTML.

    Ask before libraries are imported whose bars ask for widgets that nothing here needs.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is None:
        return False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        import tqdm.auto  # noqa: F401  # it warns when it is first imported
    return True


def text_of(value: object) -> str:
    """Return a value as HTML text."""
    shown = (each if each.isprintable() or each == "\n" else "\ufffd" for each in str(value))
    return escape("".join(shown))


def framed(body: str) -> str:
    """Return HTML in a frame of its own, whose style reaches nothing else."""
    return f"<div class=tunesmith><style>{_STYLE}</style>{body}</div>"


def recipe_html(recipe: Recipe) -> str:
    """Return the steps of a recipe."""
    head = f"<b>{text_of(recipe.model)}</b>"
    if not recipe.steps:
        return framed(f"<p>{head}: no steps yet</p>")
    rows = "".join(_row(step.label, _options(step.options, step.data)) for step in recipe.steps)
    return framed(f"<p>{head}</p><table>{rows}</table>")


def plan_html(plan: Plan) -> str:
    """Return a plan: what is printed of it, as a table."""
    from tunesmith.engine.explain import facts_of, facts_of_step

    head = "".join(_row(name, text_of(text)) for name, text in facts_of(plan))
    parts = [f"<table>{head}</table>"]
    for step in plan.steps:
        said = ""
        rows = ""
        for name, text in facts_of_step(step):
            rows += _row("" if name == said else name, text_of(text))
            said = name
        options = _options(step.step.options, None)
        parts.append(f"<p><b>{text_of(step.name)}</b> {options}</p>")
        parts.append(f"<table>{rows}</table>" if rows else "")
    parts += [f"<p>note: {text_of(note)}</p>" for note in plan.notes]
    if plan.problems:
        items = "".join(f"<li>{text_of(problem)}</li>" for problem in plan.problems)
        count = len(plan.problems)
        title = "1 problem" if count == 1 else f"{count} problems"
        parts.append(f"<div class=bad><b>{title}</b><ol>{items}</ol></div>")
    else:
        parts.append("<p>no problems found</p>")
    return framed("".join(parts))


def result_html(result: RunResult) -> str:
    """Return what a run has made: its stages with their figures, adapters, model."""
    rows = ""
    for stage in result.stages:
        told = ", ".join(f"{name} {value}" for name, value in summary(stage.metrics).items())
        time = duration(stage.seconds)
        rows += f"<tr><th>{text_of(stage.name)}</th><td>{time}</td><td>{text_of(told)}</td></tr>"
    made = "".join(
        _row(name, text_of(path))
        for name, path in (
            *((f"adapter {name}", path) for name, path in result.adapters.items()),
            ("model", result.model_path),
            ("report", result.path / "report.html"),
        )
        if path is not None
    )
    return framed(
        f"<p><b>{text_of(result.path)}</b>{text_of(_ahead(result))}</p>"
        f"<table>{rows}</table><table>{made}</table>"
    )


def result_text(result: RunResult) -> str:
    """Return the same as plain text."""
    lines = [f"RunResult {result.path}{_ahead(result)}"]
    width = max((len(stage.name) for stage in result.stages), default=0)
    for stage in result.stages:
        told = "  ".join(f"{name} {value}" for name, value in summary(stage.metrics).items())
        lines.append(f"  {stage.name:<{width}}  {duration(stage.seconds)}  {told}".rstrip())
    lines += [f"  adapter {name}: {path}" for name, path in result.adapters.items()]
    if result.model_path is not None:
        lines.append(f"  model: {result.model_path}")
    return "\n".join(lines)


def _ahead(result: RunResult) -> str:
    ahead = result.standing.ahead
    return f", still to be done: {', '.join(map(str, ahead))}" if ahead else ""


_last_shown: tuple[int, int] | None = None


def show_once(plan: Plan) -> None:
    """Show a plan in the cell at work, which does not show it again as its last value."""
    global _last_shown
    from IPython import get_ipython
    from IPython.display import display

    display({"text/html": plan_html(plan), "text/plain": str(plan)}, raw=True)
    _last_shown = (id(plan), get_ipython().execution_count)


def was_shown(plan: Plan) -> bool:
    """Whether `show_once` has shown a plan in the cell at work."""
    if not in_notebook() or _last_shown is None:
        return False
    return _last_shown == (id(plan), sys.modules["IPython"].get_ipython().execution_count)


def _options(options: Mapping[str, Any], data: Any) -> str:
    said: list[str] = []
    if data is not None:
        said.append(_shortened(_described(data)))
    said += [f"{name}={_shortened(repr(value))}" for name, value in options.items()]
    return text_of(", ".join(said))


def _described(data: Any) -> str:
    from tunesmith.data.sources import describe

    return describe(data) if not hasattr(data, "sources") else repr(data)


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "\u2026"


def _row(name: str, cell: str) -> str:
    return f"<tr><th>{text_of(name)}</th><td>{cell}</td></tr>"


_STYLE = """
.tunesmith{color:inherit;font-size:.95em;line-height:1.45;max-width:60em}
.tunesmith table{border-collapse:collapse;margin:.2em 0 .8em;color:inherit;background:none}
.tunesmith tr,.tunesmith tr:nth-child(even){background:none!important}
.tunesmith th,.tunesmith td{text-align:left!important;vertical-align:top;padding:.1em 1em .1em 0;
border:0;color:inherit;background:none;white-space:normal;overflow-wrap:anywhere}
.tunesmith th{font-weight:400;opacity:.75;white-space:nowrap}
.tunesmith p{margin:.3em 0}
.tunesmith .bad{border-left:3px solid #d1495b;padding-left:.8em}
.tunesmith .dim{opacity:.75}
.tunesmith .yellow{border-left:3px solid #c98a00;padding-left:.6em}
.tunesmith .green{border-left:3px solid #2e8b57;padding-left:.6em}
.tunesmith .bold{font-weight:600}
.tunesmith .bar{display:inline-block;vertical-align:middle;width:14em;height:.7em;margin:0 .8em;
border-radius:.35em;background:rgba(128,128,128,.3);overflow:hidden}
.tunesmith .bar i{display:block;height:100%;background:#3b82c4}
"""
