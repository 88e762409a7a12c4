"""The guide for plugin authors says everything there is, and its code runs."""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path

import attrs
import pytest

from tunesmith.plugin import KINDS, Spec, hookspecs
from tunesmith.plugin.exporters import Exporter
from tunesmith.plugin.formats import Format
from tunesmith.plugin.methods import Method
from tunesmith.plugin.metrics import Metric
from tunesmith.plugin.quantizers import Quantizer
from tunesmith.plugin.registry import Registry
from tunesmith.plugin.rewards import Reward
from tunesmith.plugin.session import Session
from tunesmith.plugin.trainers import Trainer
from tunesmith.plugin.transforms import Transform
from tunesmith.testing import conformance, tiny_examples, tiny_session

GUIDE = Path(__file__).parents[2] / "docs" / "plugins.md"
TEXT = GUIDE.read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
HEADINGS = set(re.findall(r"^#+ (.+)$", PROSE, flags=re.MULTILINE))
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
HOOKS = [name for name in vars(hookspecs) if name.startswith("tunesmith_")]
INTERFACES = [Format, Transform, Quantizer, Method, Trainer, Reward, Metric, Exporter]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_heading(hook):
    assert hook in HEADINGS, f"give {hook} a heading in {GUIDE.name}"


@pytest.mark.parametrize("interface", [*INTERFACES, Session, Spec])
def test_every_interface_has_a_heading(interface):
    assert interface.__name__ in HEADINGS, f"give {interface.__name__} a heading in {GUIDE.name}"


def test_no_heading_is_about_a_hook_that_does_not_exist():
    assert {name for name in HEADINGS if name.startswith("tunesmith_")} == set(HOOKS)


def test_there_is_one_interface_and_one_hook_for_each_kind():
    assert len(INTERFACES) == len(KINDS)
    assert {f"tunesmith_{kind}" for kind in KINDS} <= set(HOOKS)


@pytest.mark.parametrize("interface", INTERFACES)
def test_every_method_of_an_interface_is_explained(interface):
    section = PROSE.partition(f"\n## {interface.__name__}\n")[2].partition("\n## ")[0]
    abstract = getattr(interface, "__abstractmethods__", frozenset())
    assert abstract or interface is Quantizer
    for name in abstract:
        assert f"`{name}(" in section, f"{interface.__name__}.{name} is not explained"


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(Spec)])
def test_every_field_of_a_spec_is_explained(field):
    assert f"| `{field}` |" in TEXT


def test_every_class_of_the_conformance_kit_is_named():
    for name in conformance.__all__:
        assert name == "PluginConformance" or f"| `{name}` |" in TEXT


def title(block: str) -> str:
    return block.strip().splitlines()[0].strip('"')


@pytest.fixture
def run_block():
    """Return a function that imports a code block as a module and lists it as a plugin."""
    imported: list[str] = []

    def run(number: int) -> Registry:
        name = "my_formats" if number == 0 else f"guide_block_{number}"
        module = types.ModuleType(name)
        sys.modules[name] = module
        imported.append(name)
        exec(compile(BLOCKS[number], f"{GUIDE.name}, block {number}", "exec"), vars(module))
        return Registry([(name, "guide", "1", lambda: module)])

    yield run
    for name in imported:
        del sys.modules[name]


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=map(title, BLOCKS))
def test_every_code_block_is_a_sound_module(run_block, number):
    registry = run_block(number)
    assert registry.broken == []
    for item in registry:
        assert any(issubclass(item.load(), interface) for interface in INTERFACES)
    hooks = re.findall(r"def (tunesmith_\w+)\(", BLOCKS[number])
    assert len(list(registry)) == sum(hook.removeprefix("tunesmith_") in KINDS for hook in hooks)


def test_there_is_a_code_block_for_every_kind():
    shown = set(re.findall(r"def (tunesmith_\w+)\(", "".join(BLOCKS)))
    assert shown == set(HOOKS)


def made(run_block, kind):
    number = next(n for n, block in enumerate(BLOCKS) if f"def tunesmith_{kind}(" in block)
    (item,) = run_block(number)
    return item.load()(item.structure({}))


PEFT_READS_A_RENAMED_PROPERTY = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


def test_the_guides_format_converts(run_block):
    example = made(run_block, "formats").convert({"question": "Who?", "answer": "I."})
    assert [message.content for message in example.messages] == ["Who?", "I."]


def test_the_guides_transform_and_reward_work(run_block):
    from tunesmith.data.examples import Sourced

    rows = [Sourced(example, "here") for example in tiny_examples("conversation")]
    dropped = []
    brief = made(run_block, "transforms")
    assert brief.apply(rows, seed=0, drop=lambda *told: dropped.append(told)).rows == tuple(rows)
    brief = type(brief)(attrs.evolve(brief.config, characters=1))
    assert brief.apply(rows, seed=0, drop=lambda *told: dropped.append(told)).rows == ()
    assert dropped == [("here", "too long")] * len(rows)
    terse = made(run_block, "rewards")
    assert terse.score([], ["a b", "word " * 40], [[1], [2]]) == [1.0, 0.5]


@PEFT_READS_A_RENAMED_PROPERTY
def test_the_guides_quantizer_method_trainer_metric_and_exporter_work_together(run_block, tmp_path):
    from tunesmith.data.examples import Sourced
    from tunesmith.plugin.trainers import TrainingData

    session = tiny_session(
        tmp_path / "base",
        quantizer=made(run_block, "quantizers"),
        method=made(run_block, "methods"),
        trains=True,
    )
    rows = [Sourced(example, "here") for example in tiny_examples("conversation")]
    number = next(n for n, block in enumerate(BLOCKS) if "def tunesmith_trainers(" in block)
    (item,) = run_block(number)
    trainer = item.load()(item.structure({"max_steps": 1, "batch_size": 2}))
    built = trainer.build(session, TrainingData(rows, [], lambda *_: None), tmp_path / "work")
    assert built.args.label_smoothing_factor == 0.1
    built.train()
    measured = made(run_block, "metrics").measure(session, tiny_examples("conversation"))
    assert measured.values["answer_length"] > 1
    (tmp_path / "out").mkdir()
    made_of = made(run_block, "exporters").export(session, tmp_path / "out")
    assert made_of == {"adapter": tmp_path / "out"}
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_the_guides_metric_of_answers_measures(tmp_path):
    (block,) = [each for each in BLOCKS if "class Exact(" in each]
    names = {"__name__": "exact"}
    exec(compile(block, "plugins.md, the metric of answers", "exec"), names)
    session = tiny_session(tmp_path / "base")
    metric = names["Exact"](names["ExactConfig"](new_tokens=4))
    examples = tiny_examples("conversation")
    measured = metric.measure(session, examples)
    assert 0 <= measured.values["exact"] <= 1
    assert len(measured.samples) == min(4, len(examples))
    assert all("\n" not in sample.completion for sample in measured.samples)


@PEFT_READS_A_RENAMED_PROPERTY
def test_the_guides_fast_trainer_trains(tmp_path):
    from tunesmith.data.examples import Sourced
    from tunesmith.plugin.conditions import Conditions
    from tunesmith.plugin.trainers import TrainingData

    (block,) = [each for each in BLOCKS if "class Quick(" in each]
    names = {"__name__": "quick"}
    exec(compile(block, "plugins.md, the fast trainer", "exec"), names)
    session = tiny_session(tmp_path / "base", trains=True)
    rows = [Sourced(example, "here") for example in tiny_examples("conversation")]
    config = names["QuickConfig"](max_steps=1, batch_size=2)
    trainer = names["Quick"](config)
    built = trainer.build(session, TrainingData(rows, [], lambda *_: None), tmp_path / "work")
    assert type(built).__name__ == "FastTrainer"
    built.train()
    told = trainer.explain(Conditions(trains_base=True, model=session.model))
    assert told[0].text.startswith("loss:")


def test_the_hooks_of_the_guide_take_what_the_specifications_give():
    for hook in ("tunesmith_check_plan", "tunesmith_on_event"):
        (shown,) = re.findall(rf"def {hook}\((.*?)\)", "".join(BLOCKS))
        assert shown.split(", ") == list(inspect.signature(getattr(hookspecs, hook)).parameters)
