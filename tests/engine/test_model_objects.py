"""A model in memory as a base: kept once, named by the run, not touched; or refused in words."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import AutoModelForSequenceClassification as Classifier

import tunesmith
from tunesmith import Recipe, Tuner
from tunesmith.engine.kept_models import kept_model
from tunesmith.engine.models import describe_model
from tunesmith.errors import ModelError, PlanError, RecipeError
from tunesmith.nn.loading import NF4LoadConfig
from tunesmith.plugin.events import StageReused
from tunesmith.recipe_model import model_of

SHORT = {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "max_length": 64}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "objects"


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def adapted(model, **options):
    """The model with an adapter that does something."""
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], **options}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return wrapped


def kept(cache):
    return sorted(entry.name for entry in cache.iterdir())


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 12)[None]).logits.float()


def base_of(run):
    return Recipe.from_yaml(run / "recipe.yaml").model


def problem(model, tokenizer):
    """What the plan finds wrong with a model; it is the only thing."""
    plan = Tuner(model, tokenizer=tokenizer).merge().explain()
    [text] = plan.problems
    with pytest.raises(PlanError, match=re.escape(text.splitlines()[0])):
        plan.raise_if_problems()
    return text


def test_a_run_on_an_object_is_that_on_its_directory(
    tiny_model, model, tokenizer, alpaca_file, tmp_path, cache
):
    """The same adapter to the byte, whatever is in memory afterwards."""
    given = Tuner(model, tokenizer=tokenizer).quantize("nf4").lora(r=4).sft(alpaca_file, **SHORT)
    named = Tuner(tiny_model).quantize("nf4").lora(r=4).sft(alpaca_file, **SHORT)
    one = given.run(tmp_path / "given", progress=False)
    other = named.run(tmp_path / "named", progress=False)
    files = [each.adapters["sft"] / "adapter_model.safetensors" for each in (one, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert one.generate("say 3", max_new_tokens=4) == other.generate("say 3", max_new_tokens=4)
    assert one.tokenizer.chat_template == other.tokenizer.chat_template
    assert [str(cache / name) for name in kept(cache)] == [base_of(tmp_path / "given")]


def test_the_recipe_of_the_run_goes_on_without_the_object(
    model, tokenizer, alpaca_file, tmp_path, cache
):
    tuner = Tuner(model, tokenizer=tokenizer).lora(r=2).sft(alpaca_file, **SHORT)
    first = tuner.run(tmp_path / "run", progress=False)
    events: list = []
    hear = [lambda run, event: events.append(event)]
    again = Tuner.from_yaml(tmp_path / "run" / "recipe.yaml")
    assert again.run(tmp_path / "run", progress=False, listeners=hear).metrics == first.metrics
    assert tuner.run(tmp_path / "run", progress=False, listeners=hear).metrics == first.metrics
    assert sum(isinstance(event, StageReused) for event in events) == 2
    assert len(kept(cache)) == 1


def test_the_object_is_as_it_was(model, tokenizer, alpaca_file, tmp_path):
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model(torch.arange(5, 9)[None], labels=torch.arange(5, 9)[None]).loss.backward()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    settings = copy.deepcopy(vars(model.config)), copy.deepcopy(vars(model.generation_config))
    tuner = Tuner(model, tokenizer=tokenizer).lora(r=2).sft(alpaca_file, **SHORT)
    tuner.explain()
    tuner.run(tmp_path / "run", progress=False)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
    assert all(torch.equal(grads[n], p.grad) for n, p in model.named_parameters() if n in grads)
    assert [module.training for module in model.modules()] == modes
    assert (vars(model.config), vars(model.generation_config)) == settings


def test_weights_that_change_are_another_model(model, tokenizer, tmp_path, cache):
    tuner = Tuner(model, tokenizer=tokenizer).merge()
    tuner.run(tmp_path / "a", progress=False)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    tuner.run(tmp_path / "b", progress=False)
    assert len(kept(cache)) == 2
    assert base_of(tmp_path / "a") != base_of(tmp_path / "b")
    opened = AutoModelForCausalLM.from_pretrained(base_of(tmp_path / "b"))
    assert torch.equal(logits(opened), logits(model))


@pytest.mark.parametrize("kind", ["bf16", "mixed", "untied", "resized", "in training"])
def test_what_opens_is_what_was_given(kind, model, tokenizer, tmp_path):
    # both leave hooks of transformers' own behind, which change nothing
    model.enable_input_require_grads()
    model(torch.arange(5, 9)[None], output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    if kind == "bf16":
        model.bfloat16()
    if kind == "mixed":
        model.bfloat16()
        model.model.norm.float()
        with torch.no_grad():
            model.model.norm.weight += 1e-4
    if kind == "untied":
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    if kind == "resized":
        model.resize_token_embeddings(300)
    model.train(kind == "in training")
    Tuner(model, tokenizer=tokenizer).merge().run(tmp_path / "run", progress=False)
    base = base_of(tmp_path / "run")
    held, ours = load_file(Path(base, "model.safetensors")), model.state_dict()
    assert ours.keys() - held.keys() == (set() if kind == "untied" else {"lm_head.weight"})
    for name, weight in held.items():
        assert weight.dtype == ours[name].dtype
        assert torch.equal(weight, ours[name])
    opened = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert opened.dtype == model.dtype
    assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == (kind != "untied")


def test_the_adapter_of_a_peft_model_is_merged(model, tokenizer, tmp_path, capsys):
    wrapped = adapted(model, modules_to_save=["norm"])
    with torch.no_grad():
        wrapped.base_model.model.model.norm.modules_to_save["default"].weight += 0.5
    expected, without = logits(wrapped), logits(copy.deepcopy(wrapped).unload())
    tuner = Tuner(wrapped, tokenizer=tokenizer).merge()
    tuner.explain()
    assert "LlamaForCausalLM in memory with the adapter 'default' merged" in capsys.readouterr().out
    tuner.run(tmp_path / "run", progress=False)
    opened = logits(AutoModelForCausalLM.from_pretrained(base_of(tmp_path / "run")))
    torch.testing.assert_close(opened, expected, rtol=1e-4, atol=1e-4)
    assert (opened - without).abs().max() > 0.1
    assert torch.equal(logits(wrapped), expected)


@pytest.mark.parametrize("by", ["tunesmith", "bitsandbytes"])
def test_a_model_in_4_bits_is_taken_byte_for_byte(by, tiny_model, tokenizer, alpaca_file, tmp_path):
    how = (
        NF4LoadConfig()
        if by == "tunesmith"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=how)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    plain = Tuner(model, tokenizer=tokenizer).lora(r=2).sft(alpaca_file, **SHORT)
    assert '.quantize("nf4")' in plain.explain().problems[0]
    tuner = Tuner(model, tokenizer=tokenizer).quantize("nf4").lora(r=2).sft(alpaca_file, **SHORT)
    assert "taken as they are" in str(tuner.explain()) or "taken as it is" in str(tuner.explain())
    result = tuner.run(tmp_path / "run", progress=False)
    held = load_file(Path(base_of(tmp_path / "run"), "model.safetensors"))
    assert held.keys() == expected.keys() - {"lm_head.weight"}  # which is the embedding
    for name, value in held.items():
        assert torch.equal(expected[name], value), name
    assert isinstance(result.generate("say 3", max_new_tokens=3), str)


def test_the_model_of_a_result_is_taken_with_what_it_was_taught(
    tiny_model, alpaca_file, tmp_path, cache
):
    """Its layers run in one pass each, by forwards of tunesmith's own that change no numbers."""
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, **SHORT, learning_rate=0.05)
    result = tuner.run(tmp_path / "run", progress=False)
    directory = kept_model(model_of(result.model, result.tokenizer), cache)
    opened = AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=1e-3, atol=1e-3)
    taught = logits(opened) - logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    assert taught.abs().max() > 0.01


# refused


def on_meta(model):
    with torch.device("meta"):
        return type(model)(model.config)


def with_a_hook(model):
    model.model.layers[1].register_forward_hook(lambda module, args, output: output)
    return model


def with_a_forward(model):
    stock = model.model.norm.forward
    model.model.norm.forward = lambda x: 2 * stock(x)
    return model


def with_another_module(model):
    class Clamped(nn.Linear):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = new = Clamped(*old.weight.shape[::-1], bias=False)
    new.weight = old.weight
    return model


def of_another_class(model):
    class MyLlama(type(model)):
        pass

    model.__class__ = MyLlama
    return model


def with_more_weights(model):
    model.extra = nn.Linear(2, 2)
    return model


def of_other_sizes(model):
    model.config.vocab_size += 3
    return model


def with_the_adapter_off(model):
    wrapped = adapted(model)
    wrapped.base_model.disable_adapter_layers()
    return wrapped


def with_the_adapter_merged(model):
    wrapped = adapted(model)
    wrapped.merge_adapter()
    return wrapped


def with_a_prompt(model):
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def without_its_wrapper(model):
    return adapted(model).get_base_model()


def gptq(model):
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (on_meta, r"weights on the meta device, such as model\..*have no values.*load it whole"),
        (with_a_hook, r"hook after its forward at model\.layers\.1: .*remove it first"),
        (with_a_forward, r"forward of its own at model\.norm: .*remove it first"),
        (with_another_module, r"a Clamped .* at model\.layers\.0\.mlp\.up_proj, where .* a Linear"),
        (of_another_class, r"would open as a LlamaForCausalLM of transformers, which is another"),
        (with_more_weights, r"extra\.bias, extra\.weight more than its config has"),
        (of_other_sizes, r"model\.embed_tokens\.weight.* of another shape than its config says"),
        (with_the_adapter_off, r"adapter switched off .*enable_adapter_layers\(\)"),
        (with_the_adapter_merged, r"merged into its base already; unmerge it first"),
        (with_a_prompt, r"adds tokens to the sequence, which cannot be merged"),
        (without_its_wrapper, r"layers of an adapter in it .*give the PeftModel itself"),
        (gptq, r"is quantized with gptq; .*save_pretrained\(\)"),
    ],
)
def test_what_no_directory_could_hold_is_refused_in_the_plan(make, told, model, tokenizer, cache):
    assert re.search(told, problem(make(model), tokenizer))
    assert not cache.exists()


def test_a_classifier_and_a_body_without_a_head_are_refused(tiny_model, tokenizer):
    assert "would open as a LlamaForCausalLM" in problem(
        Classifier.from_pretrained(tiny_model, num_labels=1), tokenizer
    )
    body = AutoModelForCausalLM.from_pretrained(tiny_model).model
    assert "would open as a LlamaForCausalLM" in problem(body, tokenizer)


def test_an_adapter_on_4_bits_is_refused(tiny_model, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=NF4LoadConfig())
    assert "would round the weights once more" in problem(adapted(base), tokenizer)


def test_what_the_plan_finds_in_an_object_bears_its_name(model, tokenizer, alpaca_file):
    tokenizer.chat_template = None
    plan = Tuner(model, tokenizer=tokenizer).lora(r=2).sft(alpaca_file, **SHORT).explain()
    assert plan.problems
    assert not any("/tunesmith-" in text for text in (*plan.problems, *plan.notes))


@pytest.mark.parametrize(
    ("got", "told"),
    [
        (lambda m, t: (m,), r"a LlamaForCausalLM without its tokenizer; pass it along"),
        (lambda m, t: (m, "gpt2"), r"tokenizer: got a str; expected a tokenizer"),
        (lambda m, t: (m.model.norm, t), r"got a LlamaRMSNorm, a torch module that is no transf"),
        (lambda m, t: (nn.Sequential(), t), r"got a Sequential, a torch module that is no"),
        (lambda m, t: (nn.DataParallel(m), t), r"a DataParallel around a Llama.* its \.module"),
        (lambda m, t: (torch.compile(m), t), r"around a LlamaForCausalLM; .* its \._orig_mod"),
        (lambda m, t: (type(m), t), r"got the class LlamaForCausalLM; expected a hub id"),
        (lambda m, t: ((m, t),), r"got a tuple; expected a hub id"),
        (lambda m, t: (None,), r"got None; expected a hub id"),
        (lambda m, t: ("org/model", t), r"beside the name of a model"),
    ],
)
def test_what_is_no_model_is_refused_where_it_is_given(got, told, model, tokenizer):
    given, *more = got(model, tokenizer)
    with pytest.raises(ModelError, match=told):
        Tuner(given, tokenizer=more[0] if more else None)


def test_a_name_too_long_for_a_path_is_told(capsys):
    plan = Tuner("x" * 5000).explain()
    assert "cannot be looked up: file name too long; expected a hub id" in plan.problems[0]
    assert len(plan.problems[0]) < 500


# in a Tuner


def test_a_tuner_with_an_object_is_immutable_and_compared_by_which_object(
    model, tokenizer, tiny_model
):
    one, same = (Tuner(model, tokenizer=tokenizer).lora(r=2) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert one != Tuner(other, tokenizer=tokenizer).lora(r=2)
    assert one != Tuner(tiny_model).lora(r=2)
    assert repr(one) == "Tuner(<LlamaForCausalLM in memory>).lora(r=2)"
    with pytest.raises(AttributeError, match="immutable"):
        one.model = other


def test_yaml_says_where_such_a_recipe_is_written(model, tokenizer):
    with pytest.raises(RecipeError, match=r"a LlamaForCausalLM in memory, which no file can hold"):
        Tuner(model, tokenizer=tokenizer).lora(r=2).to_yaml()


def test_torch_is_not_imported_to_tell_an_object_from_a_name():
    program = (
        "import sys; from tunesmith import Tuner\n"
        "Tuner('org/model').lora(r=2)\n"
        "try: Tuner(7)\n"
        "except ValueError: pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


# in the cache


def test_a_kept_model_that_was_damaged_is_put_aside_and_written_anew(
    model, tokenizer, tmp_path, cache, caplog
):
    tuner = Tuner(model, tokenizer=tokenizer).merge()
    tuner.run(tmp_path / "a", progress=False)
    [name] = kept(cache)
    file = cache / name / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    tuner.run(tmp_path / "b", progress=False)
    assert file.read_bytes() == good
    assert kept(cache) == [name, f"{name}-damaged"]
    assert "model.safetensors is not what was written" in caplog.text


def test_a_kept_model_that_is_gone_is_asked_for_again(
    model, tokenizer, alpaca_file, tmp_path, cache
):
    tuner = Tuner(model, tokenizer=tokenizer).lora(r=2).sft(alpaca_file, **SHORT)
    tuner.run(tmp_path / "run", progress=False)
    shutil.rmtree(cache)
    opened = tunesmith.open(tmp_path / "run")
    with pytest.raises(ModelError, match=r"is gone; .* give the same one to the same chain again"):
        opened.generate("say 3")
    events: list = []
    tuner.run(tmp_path / "run", progress=False, listeners=[lambda run, e: events.append(e)])
    assert any(isinstance(event, StageReused) for event in events)
    assert opened.generate("say 3", max_new_tokens=2) is not None


def test_what_was_half_written_is_no_model_and_is_cleared(model, tokenizer, tmp_path, cache):
    stale, fresh = cache / ".model.1.draft", cache / ".model.2.draft"
    for draft in (stale, fresh):
        draft.mkdir(parents=True)
        (draft / "config.json").write_text("{}")
    old = time.time() - 3 * 24 * 3600
    for place in (stale / "config.json", stale):
        os.utime(place, (old, old))
    Tuner(model, tokenizer=tokenizer).merge().run(tmp_path / "run", progress=False)
    assert not stale.exists()
    assert fresh.exists()  # it may be another process's, at work


def test_a_run_killed_while_its_model_is_written_leaves_no_half_model(
    model, tokenizer, tmp_path, cache, monkeypatch
):
    from tunesmith.engine import kept_models

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kept_models, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            Tuner(model, tokenizer=tokenizer).merge().run(tmp_path / "run", progress=False)
    assert kept(cache) == []
    result = Tuner(model, tokenizer=tokenizer).merge().run(tmp_path / "run", progress=False)
    assert result.model_path


def test_a_lock_names_the_directory(model, tokenizer, tiny_model):
    recipe = Tuner(model, tokenizer=tokenizer).recipe
    assert describe_model(tiny_model, recipe)["name"] == str(tiny_model)
