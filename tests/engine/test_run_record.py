"""An exporter knows the run that it writes about, and no stage of it is found again stale."""

from __future__ import annotations

import json
import sys
import types

import pytest
import yaml

from tunesmith import Tuner
from tunesmith.engine.runner import run
from tunesmith.errors import RunError
from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.events import StageReused
from tunesmith.plugin.exporters import Exporter
from tunesmith.plugin.options import NoOptions
from tunesmith.plugin.registry import Registry, registry

QUICK = {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 1}


class Card(Exporter[NoOptions]):
    """Writes what it is told of the run."""

    reads_run = True

    def export(self, session, directory):
        told = {
            "recipe": session.run.recipe,
            "lock": session.run.lock,
            "metrics": {name: dict(found) for name, found in session.metrics.items()},
        }
        (directory / "card.json").write_text(json.dumps(told))
        return {"card": directory / "card.json"}


class Rash(Card):
    """Reads the record without saying so."""

    reads_run = False


@pytest.fixture
def plugins(monkeypatch):
    """Register both exporters beside what is installed."""
    module = types.ModuleType("cards")

    @hookimpl
    def tunesmith_exporters():
        return [
            Spec(name, NoOptions, f"{__name__}:{name.title()}", summary="a card")
            for name in ("card", "rash")
        ]

    module.tunesmith_exporters = tunesmith_exporters
    import tunesmith_plugins

    entries = [
        ("builtin", "tunesmith", "0", lambda: tunesmith_plugins),
        ("cards", "cards", "1", lambda: module),
    ]
    found = Registry(entries)
    assert found.broken == []
    monkeypatch.setattr("tunesmith.plugin.registry.registry", lambda: found)
    monkeypatch.setitem(sys.modules, "cards", module)
    yield found
    registry.cache_clear()


def card(result):
    (path,) = [stage.paths["card"] for stage in result.stages if "card" in stage.paths]
    return json.loads(path.read_text())


def begun(tiny_model, data):
    return Tuner(tiny_model, device="cpu", precision="fp32").lora(r=2).sft(data, **QUICK)


def test_it_has_recipe_model_and_data_up_to_itself(plugins, tiny_model, alpaca_file, tmp_path):
    made = begun(tiny_model, alpaca_file).export("card").evaluate("loss", alpaca_file)
    result = run(made.recipe, tmp_path / "run", plugins)
    told = card(result)
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert told["recipe"] == {**written, "steps": written["steps"][:3]}
    lock = json.loads((tmp_path / "run" / "lock.json").read_text())
    assert told["lock"]["model"] == lock["model"]
    assert len(told["lock"]["model"]["sha256"]) == 64
    assert told["lock"]["data"] == {"02-sft": lock["data"]["02-sft"]}
    assert told["lock"]["data"]["02-sft"]["rows"] == 12
    assert told["lock"]["fingerprints"] == {"02-sft": lock["fingerprints"]["02-sft"]}
    assert set(told["lock"]["plugins"]) == {"tunesmith:lora", "tunesmith:sft", "cards:card"}
    assert list(told["metrics"]) == ["02-sft"]


def test_it_is_made_anew_where_an_evaluation_before_it_is_another_and_not_for_one_after_it(
    plugins, tiny_model, alpaca_file, tmp_path
):
    base = begun(tiny_model, alpaca_file)
    short = base.evaluate("loss", alpaca_file, max_length=48).export("card")
    first = card(run(short.recipe, tmp_path / "run", plugins))
    reused = []

    def listen(_, event):
        if isinstance(event, StageReused):
            reused.append(event.stage)

    run(short.evaluate("loss", alpaca_file).recipe, tmp_path / "run", plugins, [listen])
    assert reused == ["02-sft", "03-evaluate-loss", "04-card"]
    whole = base.evaluate("loss", alpaca_file).export("card")
    second = card(run(whole.recipe, tmp_path / "run", plugins))
    name = "03-evaluate-loss"
    told = [each["lock"]["fingerprints"][name] for each in (first, second)]
    assert told[0] != told[1]
    assert second["recipe"]["steps"][2] == {"evaluate": "loss", "data": str(alpaca_file)}


def test_one_that_does_not_say_so_is_told(plugins, tiny_model, alpaca_file, tmp_path):
    made = begun(tiny_model, alpaca_file).export("rash")
    with pytest.raises(RunError, match="set reads_run = True in the exporter's class"):
        run(made.recipe, tmp_path / "run", plugins)
