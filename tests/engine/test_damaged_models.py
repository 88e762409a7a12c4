"""A damaged model or tokenizer is refused in our words, before anything is trained on it."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.engine.damage import REFUSED, TRAINS
from tunesmith import Tuner
from tunesmith.engine.plan import make_plan
from tunesmith.errors import ModelError, PlanError, TunesmithError
from tunesmith.plugin.quantizers import Quantizer
from tunesmith.plugin.registry import registry
from tunesmith.recipe import Step
from tunesmith.testing.tiny import tiny_llama

ROWS = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(4)]
QUICK = {"max_steps": 1, "batch_size": 2, "gradient_accumulation": 1, "max_length": 128}


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def tuner(model):
    return Tuner(model).lora(r=2).sft(ROWS, **QUICK)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("what", REFUSED)
def test_the_plan_says_what_is_damaged(model, what):
    REFUSED[what](model)
    plan = make_plan(tuner(model).recipe, registry(), estimates=False)
    assert plan.problems
    for problem in plan.problems:
        assert "\n" not in problem
        assert "Traceback" not in problem
        assert len(problem) < 900
        assert ";" in problem or "holds no config.json" in problem  # what to do


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("quantizer", [None, "nf4", "bitsandbytes"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_damaged_stops_a_run_with_an_error_of_ours(model, what, quantizer, tmp_path):
    REFUSED[what](model)
    start = Tuner(model) if quantizer is None else Tuner(model).quantize(quantizer)
    with pytest.raises(TunesmithError):
        start.lora(r=2).sft(ROWS, **QUICK).run(tmp_path / "run", progress=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("quantizer", [None, "nf4", "bitsandbytes"])
@pytest.mark.parametrize("what", REFUSED)
def test_loading_without_a_plan_says_it_too(model, what, quantizer):
    import torch

    from tunesmith.nn.pretrained import load_tokenizer

    REFUSED[what](model)
    loader = registry().build(Step("quantize", quantizer)) if quantizer else Quantizer(None)
    weights_are_sound = "token" in what or "settings" in what or "template" in what
    try:
        loader.load(model, dtype=torch.float32, device=torch.device("cpu"))
        load_tokenizer(model)
    except TunesmithError:
        return
    assert weights_are_sound or "encoder" in what or "ids" in what


@pytest.mark.parametrize("what", TRAINS)
def test_what_training_does_without_is_told_and_left_out(model, what, tmp_path):
    TRAINS[what](model)
    plan = make_plan(tuner(model).recipe, registry(), estimates=False)
    assert plan.problems == ()
    if "nonsense" not in what:  # transformers takes it
        assert "generation_config.json: is left out, as it cannot be used" in plan.notes[0]
    tuner(model).run(tmp_path / "run", progress=False)


def test_a_model_that_holds_no_numbers_is_named_where_it_is_quantized(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TunesmithError, match=r"layers\.0\.mlp\.up_proj.*NaN or Inf"):
        Tuner(model).quantize("nf4").lora(r=2).sft(ROWS, **QUICK).run(
            tmp_path / "run", progress=False
        )


def test_every_kind_of_problem_is_told_at_once(model, tmp_path):
    REFUSED["a weight missing"](model)
    REFUSED["an eos that is no token of the model"](model)
    REFUSED["a template file that is not Jinja"](model)
    with pytest.raises(PlanError) as caught:
        Tuner(model).lora(r=2).sft([{"instruction": "a"}], **QUICK).run(
            tmp_path / "run", progress=False
        )
    said = str(caught.value)
    for part in ("up_proj", "not valid Jinja", "no format knows"):
        assert part in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "key",
    ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"],
)
def test_what_old_checkpoints_hold_besides_is_no_fault(model, key):
    import torch

    tensors = load_file(model / "model.safetensors")
    tensors[key] = tensors["model.embed_tokens.weight"].clone() if "lm" in key else torch.ones(4)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert make_plan(tuner(model).recipe, registry(), estimates=False).problems == ()


def test_shards_that_are_links_as_in_the_hubs_cache_are_taken(model, tmp_path):
    blob = tmp_path / "blob"
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    assert make_plan(tuner(model).recipe, registry(), estimates=False).problems == ()


def test_a_checkpoint_of_experts_one_by_one_fits_a_model_that_fuses_them(tmp_path):
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=271,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = tiny_llama(tmp_path / "model")
    (model / "model.safetensors").unlink()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    assert any(".experts.3." in key for key in load_file(model / "model.safetensors"))
    assert make_plan(tuner(model).recipe, registry(), estimates=False).problems == ()
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (problem,) = make_plan(tuner(model).recipe, registry(), estimates=False).problems
    assert "layers.1.mlp.experts" in problem


def test_an_error_of_a_library_is_chained(model):
    from tunesmith.nn.pretrained import load_config

    REFUSED["hidden_size text"](model)
    with pytest.raises(ModelError) as caught:
        load_config(model)
    assert "hidden_size" in str(caught.value.__cause__)
