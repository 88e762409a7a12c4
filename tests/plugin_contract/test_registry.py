"""The registry: every installed plugin by kind and name, and no harm from a broken one."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import attrs
import pytest

from tunesmith.errors import OptionError, PluginError, UnknownPluginError
from tunesmith.plugin import KINDS, Spec, hookimpl
from tunesmith.plugin.options import NoOptions
from tunesmith.plugin.registry import BUILTIN, Registry
from tunesmith.recipe import Step


@attrs.frozen
class Ranked:
    rank: int = 8
    """Rank."""


@attrs.frozen
class OtherRanked:
    rank: int = 8
    """Rank."""


def plugin(**hooks):
    """Return a plugin module whose hooks return what is given, such as methods=[Spec(...)]."""
    module = types.ModuleType("a_plugin")
    for name, result in hooks.items():

        def hook(result=result):
            return result

        setattr(module, f"tunesmith_{name}", hookimpl(hook))
    return module


def method(name, config=Ranked, **spec):
    return Spec(name, config, "collections:OrderedDict", **spec)


def installed(*entries):
    """Return a registry over (distribution, plugin or loader) pairs, each at version 1.2."""
    return Registry(
        [
            (
                f"entry-{number}",
                distribution,
                "1.2",
                entry if callable(entry) else lambda e=entry: e,
            )
            for number, (distribution, entry) in enumerate(entries)
        ]
    )


GOOD = ("good", plugin(methods=[method("zora")], formats=[Spec("rows", NoOptions, "m:C")]))


# finding


def test_a_plugin_is_found_by_kind_and_bare_name():
    found = installed(GOOD).find("methods", "zora")
    assert (found.key, found.version, found.builtin) == ("good:zora", "1.2", False)


def test_the_same_name_under_two_kinds_is_two_plugins():
    registry = installed(
        ("one", plugin(methods=[method("x", Ranked)], metrics=[method("x", OtherRanked)]))
    )
    assert registry.find("methods", "x").spec.config is Ranked
    assert registry.find("metrics", "x").spec.config is OtherRanked


@pytest.mark.parametrize("stranger_first", [True, False])
def test_a_bare_name_means_the_built_in_when_a_stranger_bears_it_too(stranger_first):
    entries = [
        ("aaa-stranger", plugin(methods=[method("lora", OtherRanked)])),
        (BUILTIN, plugin(methods=[method("lora", Ranked)])),
    ]
    registry = installed(*(entries if stranger_first else entries[::-1]))
    assert registry.find("methods", "lora").distribution == BUILTIN
    assert registry.find("methods", "aaa-stranger:lora").spec.config is OtherRanked
    assert registry.find("methods", f"{BUILTIN}:lora").spec.config is Ranked


def test_the_built_in_wins_even_over_several_strangers():
    lora = plugin(methods=[method("lora")])
    others = [(name, plugin(methods=[method("lora")])) for name in ("one", "two")]
    assert installed(*others, (BUILTIN, lora)).find("methods", "lora").builtin


def test_two_strangers_with_one_name_are_an_error_that_names_both():
    registry = installed(
        ("one", plugin(methods=[method("zora")])), ("two", plugin(methods=[method("zora")]))
    )
    with pytest.raises(PluginError, match="claimed by 2 plugins; say which: 'one:zora' or 'two:"):
        registry.find("methods", "zora")
    assert registry.find("methods", "two:zora").distribution == "two"


def test_two_strangers_with_one_name_harm_nobody_who_asks_for_another():
    registry = installed(
        ("one", plugin(methods=[method("zora")])),
        ("two", plugin(methods=[method("zora"), method("vera")])),
    )
    assert registry.find("methods", "vera").key == "two:vera"
    assert registry.broken == []


def test_a_distribution_may_be_spelled_as_package_indexes_allow():
    registry = installed(("My_Plugin", plugin(methods=[method("zora")])))
    assert registry.find("methods", "my-plugin:zora").distribution == "My_Plugin"


def test_an_unknown_name_is_answered_with_close_matches_and_then_what_is_installed():
    registry = installed(("one", plugin(methods=[method("lora"), method("dora")])))
    with pytest.raises(UnknownPluginError) as raised:
        registry.find("methods", "loar")
    assert str(raised.value) == (
        "unknown method 'loar'; did you mean 'lora' or 'dora'?; installed: dora, lora"
    )


def test_a_known_name_under_a_distribution_that_lacks_it_is_answered_with_the_name():
    with pytest.raises(UnknownPluginError, match=r"'other-distribution:zora'; did you mean 'zora'"):
        installed(GOOD).find("methods", "other-distribution:zora")


def test_a_name_two_strangers_share_is_listed_once():
    registry = installed(
        ("one", plugin(methods=[method("zora")])), ("two", plugin(methods=[method("zora")]))
    )
    with pytest.raises(UnknownPluginError, match=r"installed: zora$"):
        registry.find("methods", "qqqq")


def test_with_nothing_installed_the_answer_says_none():
    with pytest.raises(UnknownPluginError, match="unknown format 'x'; installed: none"):
        installed().find("formats", "x")


def test_built_ins_are_listed_first():
    registry = installed(
        ("aaa", plugin(methods=[method("a")])), (BUILTIN, plugin(methods=[method("z")]))
    )
    assert [item.spec.name for item in registry.of_kind("methods")] == ["z", "a"]


# config instances in place of names


def test_a_config_instance_finds_its_plugin():
    assert installed(GOOD).find_config("methods", Ranked).key == "good:zora"


def test_a_stranger_that_borrows_a_built_ins_config_does_not_take_its_place():
    registry = installed(
        ("aaa", plugin(methods=[method("a")])), (BUILTIN, plugin(methods=[method("lora")]))
    )
    assert registry.find_config("methods", Ranked).builtin


def test_a_config_class_that_several_plugins_share_does_not_choose_one_in_silence():
    registry = installed(
        (BUILTIN, plugin(formats=[method("a", NoOptions), method("b", NoOptions)]))
    )
    with pytest.raises(PluginError, match=r"say by name which: 'tunesmith:a' or 'tunesmith:b'"):
        registry.find_config("formats", NoOptions)


def test_a_config_class_of_no_plugin_is_named_with_what_is_installed():
    with pytest.raises(UnknownPluginError, match=r"OtherRanked is not the config .*: Ranked$"):
        installed(GOOD).find_config("methods", OtherRanked)


# steps


def test_a_step_is_built_with_its_options():
    class Zora:
        def __init__(self, config):
            self.config = config

    module = types.ModuleType("zora_for_build")
    module.Zora = Zora
    sys.modules["zora_for_build"] = module
    try:
        registry = installed(("one", plugin(methods=[Spec("zora", Ranked, "zora_for_build:Zora")])))
        assert registry.build(Step("peft", "zora", {"rank": 4})).config == Ranked(rank=4)
    finally:
        del sys.modules["zora_for_build"]


def test_a_steps_wrong_option_names_the_plugin():
    with pytest.raises(OptionError, match="unknown option 'rnak' for zora; did you mean 'rank'"):
        installed(GOOD).config_of(Step("peft", "zora", {"rnak": 4}))


# broken plugins


def fails_to_import():
    raise ImportError("no module named 'left_pad'")


def leaves_the_process():
    raise SystemExit("this plugin needs a licence")


def with_a_hook_that_raises():
    module = types.ModuleType("raises")

    @hookimpl
    def tunesmith_methods():
        raise RuntimeError("boom")

    module.tunesmith_methods = tunesmith_methods
    return module


def with_a_hook_of_another_signature():
    module = types.ModuleType("signature")
    module.tunesmith_check_plan = hookimpl(lambda plan: ["this must not be called"])

    @hookimpl
    def tunesmith_methods(session):
        return []

    module.tunesmith_methods = tunesmith_methods
    return module


def with_a_hook_that_fails_while_it_lists():
    module = types.ModuleType("lazy")

    @hookimpl
    def tunesmith_methods():
        yield method("first")
        raise RuntimeError("boom")

    module.tunesmith_methods = tunesmith_methods
    return module


BROKEN = [
    (fails_to_import, "ImportError: no module named 'left_pad'"),
    (leaves_the_process, "SystemExit: this plugin needs a licence"),
    (with_a_hook_that_raises, "RuntimeError: boom"),
    (with_a_hook_that_fails_while_it_lists, "RuntimeError: boom"),
    (with_a_hook_of_another_signature, "PluginValidationError: "),
    (
        plugin(methods=["zora"]),
        "PluginError: tunesmith_methods returned 'zora'; expected tunesmith",
    ),
    (plugin(methods=method("zora")), "TypeError: 'Spec' object is not iterable"),
    (
        plugin(methods=[method("twin"), method("twin")]),
        "PluginError: bad registers the method 'twin' twice; its first one is kept",
    ),
    (
        plugin(method=[method("zora")]),
        "PluginError: no hook is called 'tunesmith_method'; did you mean 'tunesmith_methods'",
    ),
]


@pytest.mark.parametrize(("broken", "problem"), BROKEN)
def test_a_broken_plugin_is_recorded_with_distribution_version_and_traceback(broken, problem):
    (record,) = installed(("bad", broken)).broken
    assert (record.entry, record.distribution, record.version) == ("entry-0", "bad", "1.2")
    assert record.problem.startswith(problem)
    assert "\n" not in record.problem
    assert record.problem.partition(":")[0] in record.traceback


@pytest.mark.parametrize("broken", [entry for entry, _ in BROKEN])
@pytest.mark.parametrize("bad_first", [True, False])
def test_a_broken_plugin_harms_nobody_who_did_not_ask_for_it(broken, bad_first):
    pair = [("bad", broken), GOOD]
    registry = installed(*(pair if bad_first else pair[::-1]))
    assert registry.find("methods", "zora").key == "good:zora"
    assert registry.find("formats", "rows").key == "good:rows"
    assert list(registry.each_hook("tunesmith_check_plan", plan=None)) == []


def test_the_traceback_shows_the_line_that_failed():
    (record,) = installed(("bad", fails_to_import)).broken
    assert "in fails_to_import" in record.traceback


def test_whoever_asks_for_a_broken_plugin_is_told_what_broke():
    registry = installed(("bad", fails_to_import), GOOD)
    with pytest.raises(PluginError, match=r"failed to load: bad 1\.2: ImportError: .*left_pad"):
        registry.find("methods", "bad:vera")


def test_whoever_asks_one_distribution_is_not_told_of_anothers_failure():
    with pytest.raises(UnknownPluginError) as raised:
        installed(("bad", fails_to_import), GOOD).find("methods", "good:vera")
    assert "bad" not in str(raised.value)


def test_what_is_sound_in_a_list_survives_what_is_not():
    registry = installed(
        ("one", plugin(methods=[method("a"), "nonsense", method("a"), method("b")]))
    )
    assert [item.spec.name for item in registry.of_kind("methods")] == ["a", "b"]
    assert len(registry.broken) == 2


def test_a_spec_for_another_api_is_listed_but_not_used():
    registry = installed(("old", plugin(methods=[method("zora", api=0)])), GOOD)
    old = registry.find("methods", "old:zora")
    message = (
        r"'old:zora' \(1\.2\) was written for plugin API 0; this tunesmith speaks API 1; "
        "upgrade it with `pip install -U old`"
    )
    with pytest.raises(PluginError, match=message):
        old.load()
    assert registry.find("methods", "good:zora").load()


# hooks that are called while a run goes


def test_each_plugins_answer_to_a_hook_comes_with_its_distribution():
    registry = installed(("one", plugin(check_plan=["a"])), GOOD, ("two", plugin(check_plan=[])))
    assert list(registry.each_hook("tunesmith_check_plan", plan=None)) == [
        ("one", ["a"]),
        ("two", []),
    ]


def test_a_hook_that_raises_is_handed_back_and_stops_no_other():
    def tunesmith_on_event(run, event):
        raise RuntimeError("boom")

    bad, heard = types.ModuleType("bad"), []
    bad.tunesmith_on_event = hookimpl(tunesmith_on_event)
    good = types.ModuleType("good")
    good.tunesmith_on_event = hookimpl(lambda run, event: heard.append(event))
    registry = installed(("bad", bad), ("good", good))
    ((distribution, error),) = registry.each_hook("tunesmith_on_event", run=None, event="e")
    assert (distribution, str(error), heard) == ("bad", "boom", ["e"])


# switching off


@pytest.mark.parametrize("switched_off", ["bad", " bad , x", "entry-0"])
def test_a_plugin_can_be_switched_off_by_entry_or_distribution(monkeypatch, switched_off):
    monkeypatch.setenv("TUNESMITH_DISABLE_PLUGINS", switched_off)
    registry = installed(("bad", fails_to_import), GOOD)
    assert (registry.disabled, registry.broken) == (["entry-0"], [])
    assert registry.find("methods", "zora")


def test_an_unknown_name_is_answered_with_what_was_switched_off(monkeypatch):
    monkeypatch.setenv("TUNESMITH_DISABLE_PLUGINS", "good")
    with pytest.raises(UnknownPluginError, match="off by TUNESMITH_DISABLE_PLUGINS: entry-0"):
        installed(GOOD).find("methods", "zora")


# entry points


def install(directory: Path, distribution: str, source: str, *, metadata: bool = True) -> None:
    """Put a distribution with one plugin module on disk, as an installer would."""
    module = distribution.replace("-", "_") + "_module"
    (directory / f"{module}.py").write_text(source)
    info = directory / f"{distribution.replace('-', '_')}-3.1.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 3.1\n"
    if metadata:
        (info / "METADATA").write_text(text)
    (info / "entry_points.txt").write_text(f"[tunesmith]\nmine = {module}\n")


A_PLUGIN = """
import attrs
from tunesmith.plugin import Spec, hookimpl

@attrs.frozen
class Config:
    rank: int = 4

@hookimpl
def tunesmith_methods():
    return [Spec("zora", Config, "nowhere:Zora")]
"""


def test_plugins_are_discovered_through_entry_points(tmp_path, monkeypatch):
    install(tmp_path, "a-stranger", A_PLUGIN)
    install(tmp_path, "a-wreck", "raise ValueError('broken at import')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry()
    assert registry.find("methods", "zora").key == "a-stranger:zora"
    assert registry.find("methods", "zora").version == "3.1"
    wreck = next(item for item in registry.broken if item.distribution == "a-wreck")
    assert wreck.problem == "ValueError: broken at import"
    assert "a_wreck_module.py" in wreck.traceback


def test_a_distribution_whose_metadata_is_half_gone_stops_no_listing(tmp_path, monkeypatch):
    install(tmp_path, "a-remnant", A_PLUGIN, metadata=False)
    install(tmp_path, "a-neighbour", A_PLUGIN.replace("zora", "vera"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Registry().find("methods", "vera").key == "a-neighbour:vera"


def test_listing_plugins_imports_no_torch():
    code = (
        "import sys; from tunesmith.plugin.registry import registry; list(registry());"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_kind_has_a_hook():
    registry = installed(("one", plugin(**{kind: [method(f"of-{kind}")] for kind in KINDS})))
    assert {item.kind for item in registry} == set(KINDS)
