"""Whoever brings an option's name along from another library is told what it is called here."""

from __future__ import annotations

import inspect

import pytest

from tunesmith import Tuner
from tunesmith.errors import OptionError, RecipeError
from tunesmith.other_names import PLACES, other_names
from tunesmith.plugin.options import field_docs
from tunesmith.plugin.registry import registry
from tunesmith.recipe import Recipe

CONFIGS = {
    "quantizer": ("quantizers", "nf4"),
    "method": ("methods", "lora"),
    "trainer": ("trainers", "sft"),
    "sft": ("trainers", "sft"),
    "dpo": ("trainers", "dpo"),
    "merge": ("exporters", "merge"),
}


def test_what_a_name_is_answered_with_is_there():
    settings = Recipe("m").__slots__
    for name, found in other_names().items():
        assert bool(found.option) == bool(found.place), name
        if found.place in CONFIGS:
            config = registry().find(*CONFIGS[found.place]).spec.config
            assert found.option in field_docs(config), name
        elif found.place in ("run", "model"):
            assert found.option in settings, name
        else:
            assert found.place == "data" or found.says, name
    assert set(PLACES) == {*CONFIGS, "run", "model", "data"}


def test_no_name_hides_an_option_of_the_step_it_is_said_of():
    # an option that comes to be here leaves the table
    every = {name for item in registry() for name in field_docs(item.spec.config)}
    assert {
        name for name, found in other_names().items() if name in every and not found.option
    } == (set())
    assert {
        name
        for name, found in other_names().items()
        if name != found.option
        and found.place in CONFIGS
        and name in field_docs(registry().find(*CONFIGS[found.place]).spec.config)
    } == set()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        # PEFT
        (lambda t: t.lora(rank=8), "unknown option 'rank' for lora; it is called 'r' here$"),
        (lambda t: t.lora(lora_alpha=8), "it is called 'alpha' here; unset, it is twice r"),
        (lambda t: t.lora(target_modules=["q_proj"]), "it is called 'targets' here"),
        (lambda t: t.lora(use_rslora=True), "it is called 'rslora' here"),
        (lambda t: t.lora(modules_to_save=["x"]), "no such option: .*name more layers in targets"),
        # bitsandbytes
        (lambda t: t.lora(load_in_4bit=True), r"a step of its own, the first one: \.quantize"),
        (lambda t: t.quantize("nf4", bnb_4bit_quant_type="fp4"), r"\.quantize\(\"fp4\"\)"),
        (lambda t: t.quantize("nf4", bnb_4bit_use_double_quant=True), "it is called 'nested' here"),
        (
            lambda t: t.quantize("nf4", bnb_4bit_compute_dtype="bf16"),
            r"called 'precision' here, and is a setting of the whole run: Tuner\(model, precision=",
        ),
        # transformers
        (lambda t: t.sft("a", num_train_epochs=1), "it is called 'epochs' here"),
        (lambda t: t.sft("a", per_device_train_batch_size=1), "it is called 'batch_size' here"),
        (lambda t: t.sft("a", warmup_ratio=0.1), "called 'warmup' here; a share of the steps"),
        (lambda t: t.sft("a", warmup_steps=10), "called 'warmup' here; a whole number of steps"),
        (lambda t: t.sft("a", report_to="wandb"), "it is called 'loggers' here"),
        (lambda t: t.sft("a", bf16=True), "called 'precision' here.*write \"bf16\" as its value"),
        (lambda t: t.sft("a", output_dir="x"), r"goes into the run directory.*\.run\(\"runs/a\"\)"),
        (lambda t: t.sft("a", eval_strategy="steps"), "called 'eval_steps' here; what holds rows"),
        (lambda t: t.sft("a", optim="sgd"), "it is called 'optimizer' here"),
        # TRL
        (lambda t: t.sft("a", max_seq_length=9), "it is called 'max_length' here"),
        (lambda t: t.dpo("a", loss_type="ipo"), "said by the training step's plugin"),
        (lambda t: t.sft("a", beta=0.1), r"it is an option of \.dpo\(data, beta=…\)"),
        # Axolotl
        (lambda t: t.sft("a", sample_packing=True), "it is called 'packing' here"),
        (lambda t: t.sft("a", micro_batch_size=1), "it is called 'batch_size' here"),
        (lambda t: t.sft("a", sequence_len=9), "it is called 'max_length' here"),
        # ours, given to another step
        (lambda t: t.lora(learning_rate=1e-4), r"it is an option of a training step: \.sft\("),
        (lambda t: t.sft("a", r=8), r"it is an option of the method: \.lora\(r=…\)"),
    ],
)
def test_an_option_of_another_library_is_answered_with_ours(build, said):
    with pytest.raises(OptionError, match=said):
        build(Tuner("m"))


def test_a_misspelt_option_is_still_answered_with_the_nearest():
    with pytest.raises(OptionError, match=r"'epoch' for sft; did you mean 'epochs'\?"):
        Tuner("m").sft("a", epoch=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"load_in_4bit": True}, r"unknown setting 'load_in_4bit'; .*\.quantize\(\"nf4\"\)"),
        ({"torch_dtype": "bfloat16"}, "it is called 'precision' here; its values are fp32, bf16"),
        ({"device_map": "auto"}, "it is called 'device' here"),
        ({"lora_alpha": 8}, r"called 'alpha' here, and is an option of the method: \.lora\("),
        ({"sead": 3}, r"unknown setting 'sead'; did you mean 'seed'\?"),
    ],
)
def test_a_setting_of_another_library_is_answered_with_ours(settings, said):
    with pytest.raises(OptionError, match=said):
        Tuner("m", **settings)
    assert "trust_remote_code" in inspect.signature(Tuner).parameters


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("base_model", "unknown key 'base_model'; it is called 'model' here"),
        ("bf16", "it is called 'precision' here; write \"bf16\" as its value"),
        ("datasets", "called 'data' here, and is what a training step is given"),
        ("adapter", r"said by a step of its own: \.lora\(r=16\) .*'- peft: lora' in a recipe"),
        ("output_dir", "--out runs/a"),
        ("num_epochs", "called 'epochs' here, and is an option of a training step: .*'- train:"),
        ("learning_rate", "it is an option of a training step: .*'- train: sft'"),
        ("sead", r"did you mean 'seed'\?"),
    ],
)
def test_a_key_of_another_librarys_file_is_answered_with_ours(key, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.from_dict({"model": "m", key: 1})


def test_a_step_in_a_file_is_answered_alike():
    recipe = Recipe.from_dict(
        {"model": "m", "steps": [{"train": "sft", "data": "a", "num_epochs": 1}]}
    )
    with pytest.raises(OptionError, match="it is called 'epochs' here"):
        registry().config_of(recipe.steps[0])
