"""The guide for plugin authors says everything there is."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from pathlib import Path

import attrs
import pytest

from tools.write_plugin_pages import written
from tunesmith.plugin import KINDS, Spec, hookspecs
from tunesmith.plugin.exporters import Exporter
from tunesmith.plugin.formats import Format
from tunesmith.plugin.methods import Method
from tunesmith.plugin.metrics import Metric
from tunesmith.plugin.quantizers import Quantizer
from tunesmith.plugin.registry import Registry
from tunesmith.plugin.rewards import Reward
from tunesmith.plugin.session import Session
from tunesmith.plugin.trainers import Trainer, TrainingData
from tunesmith.plugin.transforms import Transform
from tunesmith.scaffold import KINDS_OF_ONE
from tunesmith.testing import conformance

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8")
    for path in [DOCS / "plugins.md", *sorted((DOCS / "plugins").glob("*.md"))]
}
TEXT = "\n".join(PAGES.values())
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
PROSE = FENCED.sub("", TEXT)
HEADINGS = set(re.findall(r"^#+ (.+)$", PROSE, flags=re.MULTILINE))
BLOCKS = [
    (page, code)
    for page, text in PAGES.items()
    for language, code in FENCED.findall(text)
    if language == "python" and page != "plugins/watching.md"
]
HOOKS = [name for name in vars(hookspecs) if name.startswith("tunesmith_")]
INTERFACES = [Format, Transform, Quantizer, Method, Trainer, Reward, Metric, Exporter]

NAMES = [
    *(
        f"tunesmith.plugin.{module}"
        for module in [
            "conditions",
            "counted",
            "events",
            "exporters",
            "fast",
            "formats",
            "methods",
            "metrics",
            "options",
            "quantizers",
            "rewards",
            "rollouts",
            "session",
            "shares",
            "spec",
            "trainers",
            "transforms",
        ]
    ),
    "tunesmith.data.examples",
    "tunesmith.data.pack",
    "tunesmith.nn.logps",
    "tunesmith.nn.tasks",
    "tunesmith.testing",
]
UNSAID = {
    "Event": "the base of all events",
    "Example": "the five shapes as one type",
    "API_VERSION": "what a Spec's api is unless said otherwise",
    "KINDS": "the kinds are the pages",
    "task_of": "for the host",
}


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_heading(hook):
    assert hook in HEADINGS, f"give {hook} a heading in docs/plugins/hooks.md"


@pytest.mark.parametrize("interface", [*INTERFACES, Session, Spec])
def test_every_interface_has_a_heading(interface):
    assert interface.__name__ in HEADINGS, f"give {interface.__name__} a heading in docs/plugins"


def test_no_heading_is_about_a_hook_that_does_not_exist():
    assert {name for name in HEADINGS if name.startswith("tunesmith_")} == set(HOOKS)


def test_there_is_one_interface_and_one_hook_for_each_kind():
    assert len(INTERFACES) == len(KINDS)
    assert {f"tunesmith_{kind}" for kind in KINDS} <= set(HOOKS)


@pytest.mark.parametrize("interface", INTERFACES)
def test_every_method_and_flag_of_an_interface_is_explained(interface):
    page = FENCED.sub("", PAGES[f"plugins/{interface.__name__.lower()}.md"])
    spoken = {"effective": "spec.md has it for all kinds", "mix": "asked of a mixable one"}
    for name, member in vars(interface).items():
        if name.startswith("_") or name in spoken:
            continue
        shown = f"`{name}(" if inspect.isroutine(member) else f"`{name}"
        assert shown in page, f"{interface.__name__}.{name} is not explained on its page"


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(Spec)])
def test_every_field_of_a_spec_is_explained(field):
    assert f"| `{field}` |" in TEXT


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_is_told(module):
    names = importlib.import_module(module).__all__
    untold = [name for name in names if f"`{name}" not in PROSE and f".{name}" not in PROSE]
    assert [name for name in untold if name not in UNSAID] == []


def test_what_a_step_is_given_is_told():
    page = PAGES["plugins/session.md"] + PAGES["plugins/exporter.md"]
    inner = {"record", "loaded", "unload", "samples", "at_work", "trains_base", "naming"}
    names = {name for name in dir(Session) if not name.startswith(("_", "with_", "using"))}
    names |= {field.name for field in attrs.fields(Session) if not field.name.startswith("_")}
    untold = {
        name for name in names - inner if f"`{name}" not in page and f"session.{name}" not in page
    }
    assert untold <= {"task", "trains"}
    for field in attrs.fields(TrainingData):
        assert f"`data.{field.name}" in PAGES["plugins/trainer.md"]


def test_every_class_of_the_conformance_kit_is_named():
    for name in conformance.__all__:
        assert name == "PluginConformance" or f"| `{name}` |" in TEXT


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", FENCED.sub("", PAGES[page])):
        if "://" not in target:
            assert (DOCS / page).parent.joinpath(target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("kind", KINDS_OF_ONE)
def test_a_page_shows_what_the_command_writes(kind):
    page = PAGES[f"plugins/{kind}.md"]
    assert f"<!-- tunesmith plugins new {kind} " in page
    assert written(page) == page, "run python tools/write_plugin_pages.py"


def title(block: tuple[str, str]) -> str:
    return block[1].strip().splitlines()[0].strip('"')


@pytest.fixture
def run_block():
    """Return a function that imports a code block as a module and lists it as a plugin."""
    imported: list[str] = []

    def run(number: int) -> Registry:
        page, code = BLOCKS[number]
        name = "my_formats" if page == "plugins.md" else f"guide_block_{number}"
        module = types.ModuleType(name)
        sys.modules[name] = module
        imported.append(name)
        exec(compile(code, f"{page}, block {number}", "exec"), vars(module))
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
    hooks = re.findall(r"def (tunesmith_\w+)\(", BLOCKS[number][1])
    assert len(list(registry)) == sum(hook.removeprefix("tunesmith_") in KINDS for hook in hooks)


def test_there_is_a_code_block_for_every_kind():
    shown = set(re.findall(r"def (tunesmith_\w+)\(", "".join(code for _, code in BLOCKS)))
    assert shown == set(HOOKS)


def test_the_guides_first_format_converts(run_block):
    (item,) = run_block(0)
    example = item.load()(item.structure({})).convert({"question": "Who?", "answer": "I."})
    assert [message.content for message in example.messages] == ["Who?", "I."]


def test_the_hooks_of_the_guide_take_what_the_specifications_give():
    for hook in ("tunesmith_check_plan", "tunesmith_on_event"):
        (shown,) = re.findall(rf"def {hook}\((.*?)\)", "".join(code for _, code in BLOCKS))
        assert shown.split(", ") == list(inspect.signature(getattr(hookspecs, hook)).parameters)
