"""What `--json` prints: plans, results, plugins and errors as one JSON document each.

Keys are added and not renamed; docs/recipes.md lists them. Bytes are bytes, times are seconds, and
a number that is none is null.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from tunesmith.engine.dataset import LoadedData
    from tunesmith.engine.plan import Plan, PlannedStep
    from tunesmith.engine.result import RunResult
    from tunesmith.plugin.registry import Registered, Registry

__all__ = ["document", "error_values", "nothing_else", "plan_values", "plugin_values", "run_values"]


@contextmanager
def nothing_else() -> Iterator[None]:
    """Have whatever is printed meanwhile, by any library or process, go to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def document(values: Any) -> str:
    """Return values as JSON text by its standard, which knows no NaN."""
    return json.dumps(_finite(values), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def plan_values(plan: Plan) -> dict[str, Any]:
    """Return a plan: what will be done, what it will take, and what is wrong."""
    device = plan.device
    return {
        "model": {
            "name": plan.recipe.model,
            "kind": plan.model.kind if plan.model is not None else None,
            "parameters": plan.shapes.parameters if plan.shapes is not None else None,
        },
        "device": attrs.asdict(device) if device is not None else None,
        "seed": plan.recipe.seed,
        "steps": [_step_values(step) for step in plan.steps],
        "notes": list(plan.notes),
        "problems": list(plan.problems),
    }


def run_values(result: RunResult) -> dict[str, Any]:
    """Return a finished run: where it lies, what each stage made and measured."""
    return {
        "path": str(result.path),
        "report": str(result.path / "report.html"),
        "model": _path(result.model_path),
        "adapters": {name: str(path) for name, path in result.adapters.items()},
        "stages": [
            {
                "name": stage.name,
                "path": str(stage.path),
                "verb": stage.verb,
                "plugin": stage.plugin,
                "options": dict(stage.options),
                "metrics": dict(stage.metrics),
                "artefacts": {name: str(path) for name, path in stage.paths.items()},
                "seconds": stage.seconds,
                "finished": stage.finished,
            }
            for stage in result.stages
        ],
    }


def plugin_values(found: Registry, items: Sequence[Registered] | None = None) -> dict[str, Any]:
    """Return plugins by kind with their options, and what is broken: all of them, or some."""
    from tunesmith.plugin.spec import KINDS

    return {
        "plugins": {
            kind: [_plugin(item) for item in found.of_kind(kind) if items is None or item in items]
            for kind in KINDS
        },
        "broken": [
            {
                "distribution": broken.distribution,
                "version": broken.version,
                "entry": broken.entry,
                "problem": broken.problem,
            }
            for broken in found.broken
        ],
        "disabled": list(found.disabled),
    }


def error_values(error: BaseException, text: str) -> dict[str, Any]:
    """Return an error: its class, what was told of it, and each problem if there are several."""
    problems = getattr(error, "problems", None)
    return {
        "error": {
            "type": type(error).__name__,
            "message": text,
            "problems": list(problems) if isinstance(problems, tuple) else [text],
        }
    }


def _plugin(item: Registered) -> dict[str, Any]:
    from tunesmith.plugin.schema import options_schema

    return {
        "name": item.spec.name,
        "key": item.key,
        "version": item.version,
        "summary": item.spec.summary,
        "example": item.spec.example,
        "api": item.spec.api,
        "options": options_schema(item),
    }


def _step_values(step: PlannedStep) -> dict[str, Any]:
    from tunesmith.plugin.options import plain_options

    return {
        "name": step.name,
        "verb": step.step.verb,
        "plugin": step.plugin.key if step.plugin is not None else step.step.plugin,
        # as they act, where the plan has come so far as to know
        "options": dict(step.effective) or plain_options(step.config) if step.config else None,
        "data": _data_values(step.data) if step.data is not None else None,
        "eval_data": _data_values(step.eval_data) if step.eval_data is not None else None,
        "estimate": _estimate_values(step),
        "stored": step.stored or None,
        "holds": list(step.holds),
        "adapts": step.adapts or None,
    }


def _data_values(data: LoadedData) -> dict[str, Any]:
    return {
        "description": data.description,
        "format": data.format,
        "sha256": data.fingerprint,
        "rows": data.rows,
        "used": len(data.examples),
        "held_out": len(data.held_out),
        "left_out": dict(Counter(entry.reason for entry in data.dropped)),
    }


def _estimate_values(step: PlannedStep) -> dict[str, Any] | None:
    found = step.estimate
    if found is None:
        return None
    return {**attrs.asdict(found), "memory_bytes": found.memory_bytes}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)
