"""A Spec says what a plugin is, and finds the implementation only when it is asked to."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import attrs
import pytest

from tunesmith.errors import MissingExtraError, PluginError
from tunesmith.plugin import API_VERSION, Spec
from tunesmith.plugin.options import NoOptions


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a writer of importable modules that are gone after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def write(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_the_implementation_is_imported_by_load_and_not_before(module):
    spec = Spec("zora", NoOptions, module("zora_lazy", "class Zora: pass\n") + ":Zora")
    assert "zora_lazy" not in sys.modules
    assert spec.load().__name__ == "Zora"


def test_a_spec_is_written_for_the_current_api_unless_it_says_otherwise():
    assert Spec("zora", NoOptions, "m:C").api == API_VERSION


@pytest.mark.parametrize("name", ["", "LoRA", "mine:lora", "../lora", "a/b", ".lora"])
def test_a_name_that_could_not_be_written_in_a_recipe_is_refused(name):
    with pytest.raises(PluginError, match=f"{re.escape(repr(name))}: expected lower case"):
        Spec(name, NoOptions, "m:C")


def test_a_config_that_is_no_attrs_class_is_refused():
    with pytest.raises(PluginError, match=r"'zora': config is .*dict.*; expected an attrs class"):
        Spec("zora", dict, "m:C")


def test_a_path_without_a_class_is_refused():
    with pytest.raises(PluginError, match=r"impl is 'package\.module'; expected"):
        Spec("zora", NoOptions, "package.module")


def test_an_example_shape_that_does_not_exist_is_refused():
    with pytest.raises(PluginError, match="example is 'pairs'; expected one of conversation, "):
        Spec("zora", NoOptions, "m:C", example="pairs")


def test_one_required_package_given_as_text_is_one_name():
    assert Spec("zora", NoOptions, "m:C", requires="trl").requires == ("trl",)


def test_a_spec_cannot_be_changed():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Spec("zora", NoOptions, "m:C").name = "other"


def test_a_module_that_does_not_exist_is_named():
    with pytest.raises(PluginError, match=r"'zora': nowhere\.at_all:Zora cannot be imported"):
        Spec("zora", NoOptions, "nowhere.at_all:Zora").load()


def test_a_class_that_does_not_exist_is_named(module):
    spec = Spec("zora", NoOptions, module("zora_other", "class Other: pass\n") + ":Zora")
    with pytest.raises(PluginError, match="zora_other has no class 'Zora'; mend the Spec's impl"):
        spec.load()


def test_a_module_that_fails_while_imported_says_how(module):
    spec = Spec("zora", NoOptions, module("zora_broken", "1 / 0\n") + ":Zora")
    with pytest.raises(PluginError, match="importing zora_broken:Zora failed: ZeroDivisionError"):
        spec.load()


def test_a_missing_package_is_answered_with_the_command_that_installs_it(module):
    impl = module("zora_extra", "import package_nobody_has\n") + ":Zora"
    spec = Spec("zora", NoOptions, impl, hint="pip install zora[extra]")
    with pytest.raises(MissingExtraError, match=r"install it with: pip install zora\[extra\]"):
        spec.load()


def test_the_command_is_given_even_if_the_module_is_named_after_the_package(module):
    impl = module("nobody_has_extras", "import nobody_has\n") + ":Zora"
    spec = Spec("zora", NoOptions, impl, hint="pip install nobody-has")
    with pytest.raises(MissingExtraError, match="needs the package 'nobody_has'"):
        spec.load()


def test_a_plugins_own_module_that_is_missing_is_not_blamed_on_an_extra():
    spec = Spec("zora", NoOptions, "nowhere.at_all:Zora", hint="pip install trl")
    with pytest.raises(PluginError) as raised:
        spec.load()
    assert not isinstance(raised.value, MissingExtraError)


def test_what_a_plugin_itself_says_is_missing_reaches_the_user_unchanged(module):
    source = (
        "from tunesmith.errors import MissingExtraError\n"
        "raise MissingExtraError('faiss', 'zora', 'install it with: conda install faiss')\n"
    )
    spec = Spec("zora", NoOptions, module("zora_own_words", source) + ":Zora")
    with pytest.raises(MissingExtraError, match="conda install faiss"):
        spec.load()
