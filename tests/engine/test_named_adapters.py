"""Several adapters on one base: named, gone back to, trained on, merged; none disturbs another."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tunesmith import Tuner
from tunesmith.engine.result import RunResult
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, Step

SHORT = {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "max_length": 64}


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.fixture
def base(tiny_model):
    return Tuner(tiny_model).quantize("nf4")


def test_each_is_what_it_is_without_the_other(base, alpaca_file, preference_file, tmp_path):
    both = (
        base.peft("lora", name="zh", r=4)
        .sft(alpaca_file, **SHORT)
        .peft("lora", name="code", r=8)
        .sft(alpaca_file, learning_rate=1e-3, **SHORT)
        .use("zh")
        .dpo(preference_file, **SHORT)
        .merge()
    )
    result = both.run(tmp_path / "both", progress=False)
    zh = base.peft("lora", name="zh", r=4).sft(alpaca_file, **SHORT).dpo(preference_file, **SHORT)
    alone = zh.merge().run(tmp_path / "zh", progress=False)
    other = base.lora(r=8).sft(alpaca_file, learning_rate=1e-3, **SHORT)
    code = other.run(tmp_path / "code", progress=False)

    assert list(result.adapters) == ["zh", "code"]
    assert list(alone.adapters) == ["zh"]
    assert list(code.adapters) == ["sft"]
    assert equal(weights(result.adapters["zh"]), weights(alone.adapters["zh"]))
    assert equal(weights(result.adapters["code"]), weights(code.adapters["sft"]))
    assert not equal(weights(result.adapters["zh"]), weights(result.stages[0].adapter))
    merged, expected = (
        load_file(each.model_path / "model.safetensors") for each in (result, alone)
    )
    assert equal(merged, expected)
    opened = RunResult.open(tmp_path / "both")
    assert opened.adapters == result.adapters
    assert Recipe.from_yaml(tmp_path / "both" / "recipe.yaml").to_dict() == both.recipe.to_dict()


def test_answers_come_from_the_one_that_is_used(base, alpaca_file, tmp_path):
    hot = {**SHORT, "learning_rate": 0.05, "max_steps": 4}
    first = base.lora(r=4).sft(alpaca_file, **hot)
    said = first.run(tmp_path / "a", progress=False).generate("2+2?", max_new_tokens=12)
    second = first.peft("lora", name="b", r=8).sft(alpaca_file, **SHORT)
    result = second.run(tmp_path / "b", progress=False)
    assert result.generate("2+2?", max_new_tokens=12) != said
    again = second.use("sft").run(tmp_path / "b", progress=False)
    assert again.generate("2+2?", max_new_tokens=12) == said


def test_a_run_that_was_cut_short_answers_with_what_was_trained(base, alpaca_file, tmp_path):
    """And not with the fresh adapter that the next training would have begun with."""
    hot = {**SHORT, "learning_rate": 0.05, "max_steps": 4}
    first = base.lora(r=4).sft(alpaca_file, **hot)
    said = first.run(tmp_path / "a", progress=False).generate("2+2?", max_new_tokens=12)

    def stop(run, event):
        if getattr(event, "stage", "").endswith("05-sft"):
            raise KeyboardInterrupt

    longer = first.peft("lora", name="b", r=8).sft(alpaca_file, **SHORT)
    with pytest.raises(KeyboardInterrupt):
        longer.run(tmp_path / "b", progress=False, listeners=[stop])
    cut = RunResult.open(tmp_path / "b")
    assert list(cut.adapters) == ["sft"]
    assert cut.generate("2+2?", max_new_tokens=12) == said


def test_names_are_written_and_read():
    recipe = Recipe("m", (Step("peft", "lora", {"r": 4}, name="zh"), Step("use", "zh")))
    assert recipe.to_dict()["steps"] == [{"peft": "lora", "name": "zh", "r": 4}, {"use": "zh"}]
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"peft": "lora", "name": "../zh"}, "'name' is '../zh'"),
        ({"peft": "lora", "name": "a:b"}, "'name' is 'a:b'"),
        ({"use": "zh", "r": 4}, "takes the name of an adapter and nothing else; got r"),
        ({"use": 3}, "'use' is 3"),
    ],
)
def test_what_is_no_name_is_refused(row, message):
    with pytest.raises(RecipeError, match="step") as caught:
        Recipe.from_dict({"model": "m", "steps": [row]})
    assert message in str(caught.value)


def test_a_name_where_none_can_be_is_an_unknown_option(base, alpaca_file):
    with pytest.raises(Exception, match="unknown option 'name'"):
        base.train("sft", alpaca_file, name="zh")


def test_adapters_are_mixed_and_the_run_goes_on_with_the_sum(
    base, alpaca_file, preference_file, tmp_path
):
    hot = {**SHORT, "learning_rate": 0.01}
    two = (base.lora(name="zh", r=4).sft(alpaca_file, **hot).lora(name="code", r=8)).sft(
        alpaca_file, **{**hot, "learning_rate": 0.02}
    )
    alone = two.use("zh").merge().run(tmp_path / "a", progress=False)
    itself = two.mix(adapters={"zh": 1.0}).merge().run(tmp_path / "b", progress=False)
    assert list(itself.adapters) == ["zh", "code", "mix"]
    ours, expected = (load_file(each.model_path / "model.safetensors") for each in (itself, alone))
    for name, weight in expected.items():
        assert (ours[name].float() - weight.float()).abs().max() < 1e-5, name

    mixed = two.mix(name="both", adapters={"zh": 0.5, "code": 0.5}, rank=6)
    result = mixed.dpo(preference_file, **SHORT).merge().run(tmp_path / "c", progress=False)
    assert list(result.adapters) == ["zh", "code", "both"]
    stages = [stage.name for stage in result.stages if stage.adapter is not None]
    assert stages == ["03-sft", "05-sft", "06-mix", "07-dpo"]
    assert result.adapters["both"] == result.stages[3].adapter
    assert RunResult.open(tmp_path / "c").adapters == result.adapters


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (lambda t, f: t.lora().sft(f).mix(adapters={"sgt": 1.0}), "no adapter 'sgt' by then"),
        (lambda t, f: t.lora().sft(f).export("merge", name="a"), "makes no adapter"),
        (
            lambda t, f: t.lora(name="a").sft(f).mix(adapters={"a": 1.0}, name="a"),
            "there is an adapter 'a' already",
        ),
    ],
)
def test_a_mix_that_cannot_be_is_found_in_the_plan(base, alpaca_file, chain, message):
    from tunesmith.engine.plan import make_plan
    from tunesmith.plugin.registry import registry

    plan = make_plan(chain(base, alpaca_file).recipe, registry(), estimates=False)
    assert message in "\n".join(plan.problems)
