"""How model, tokenizer, data and steps fit is told in the plan, for `run` as for `explain`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from tunesmith import Tuner
from tunesmith.engine.plan import make_plan
from tunesmith.errors import PlanError
from tunesmith.plugin.registry import registry
from tunesmith.testing.tiny import tiny_tokenizer

ROWS = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(6)]
QUICK = {"max_steps": 2, "batch_size": 3, "gradient_accumulation": 1, "max_length": 64}


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def plan_of(model, rows=ROWS, template=None, **options):
    tuner = Tuner(model, chat_template=template).lora(r=2).sft(rows, **{**QUICK, **options})
    return make_plan(tuner.recipe, registry(), estimates=False)


def saved(directory, config):
    torch.manual_seed(0)
    build = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        build = transformers.AutoModelForSeq2SeqLM
    build.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def added(model, **tokens):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(model)


def test_a_pad_token_without_a_row_does_no_harm(model, tmp_path):
    added(model, pad_token="<pad>")
    plan = plan_of(model)
    assert plan.problems == ()
    assert "the embedding has no row for '<pad>', which nothing in the data needs" in plan.notes[0]
    result = Tuner(model).lora(r=2).sft(ROWS, **QUICK).run(tmp_path / "run", progress=False)
    assert result.metrics["02-sft"]["loss"] > 0


def test_a_token_without_a_row_that_the_data_spells_is_a_problem(model):
    added(model, pad_token="<pad>")
    (problem,) = plan_of(model, [*ROWS, {"instruction": "what is <pad>", "output": "it"}]).problems
    assert "rows for ids below 271, and its tokenizer makes '<pad>' (id 271)" in problem


def test_a_token_without_a_row_that_the_template_writes_is_a_problem(model):
    added(model, additional_special_tokens=["<turn>"])
    template = "{% for m in messages %}<turn>{{ m.content }}<|im_end|>{% endfor %}"
    (problem,) = plan_of(model, template=template).problems
    assert "makes '<turn>' (id 271)" in problem


def test_without_pad_and_eos_it_trains_where_the_template_ends_turns(model, tmp_path):
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "eos_token": None, "pad_token": None}))
    assert plan_of(model).problems == ()
    result = Tuner(model).lora(r=2).sft(ROWS, **QUICK).run(tmp_path / "run", progress=False)
    assert result.metrics["02-sft"]["loss"] > 0
    endless = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (problem,) = plan_of(model, template=endless).problems
    assert "set tokenizer.eos_token" in problem


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(
            vocab_size=271, n_embd=32, n_layer=1, n_head=4, n_positions=48, eos_token_id=270
        ),
        transformers.OPTConfig(
            vocab_size=271,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=48,
        ),
        transformers.GPTJConfig(
            vocab_size=271, n_embd=32, n_layer=1, n_head=4, n_positions=48, rotary_dim=8
        ),
        transformers.GPTNeoConfig(
            vocab_size=271,
            hidden_size=32,
            num_layers=1,
            num_heads=4,
            attention_types=[[["global"], 1]],
            max_position_embeddings=48,
        ),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT on a Conv1D
def test_more_tokens_than_a_table_has_positions_are_a_problem(tmp_path, config):
    model = saved(tmp_path / "model", config)
    (problem,) = plan_of(model, max_length=49).problems
    assert "step 2 (sft): max_length=49, and the model has 48 positions" in problem
    assert "pass max_length=48 or less" in problem
    assert plan_of(model, max_length=48).problems == ()


def test_more_tokens_than_rotary_positions_were_trained_for_are_a_note(model):
    plan = plan_of(model, max_length=4096)
    assert plan.problems == ()
    assert "max_length=4096 is beyond the 2048 positions" in "".join(plan.notes)


SMALL = {"vocab_size": 271, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (transformers.BertConfig(**SMALL, intermediate_size=32), "is a bert, an encoder"),
        (transformers.RobertaConfig(**SMALL, intermediate_size=32), "is a roberta, an encoder"),
        (
            transformers.XLNetConfig(vocab_size=271, d_model=32, n_layer=1, n_head=4, d_inner=32),
            "is a xlnet, an encoder",
        ),
        (
            transformers.T5Config(
                vocab_size=271, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4
            ),
            "is a t5, an encoder-decoder",
        ),
        (
            transformers.BartConfig(
                vocab_size=271,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
            ),
            "is a bart, an encoder-decoder",
        ),
    ],
    ids=["bert", "roberta", "xlnet", "t5", "bart"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_causal_model_is_told_so(tmp_path, config, said):
    problems = plan_of(saved(tmp_path / "model", config)).problems
    assert any(said in problem for problem in problems)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("cpmant", "an encoder: each token sees those after it"),
        ("gemma4_unified_assistant", "drafts tokens from the hidden states of another one"),
        ("git", "captions images"),
        ("musicgen", "a decoder of audio codes"),
        ("musicgen_melody", "a decoder of audio codes"),
        ("prophetnet", "computes a token otherwise where rows of its batch are longer"),
        ("reformer", "trained on rows of one length alone"),
        ("xlnet", "an encoder: each token sees those after it"),
    ],
)
def test_what_opens_as_a_language_model_and_is_none_is_told_so(model, family, said):
    config = transformers.AutoConfig.for_model(family)
    (model / "config.json").write_text(json.dumps({**config.to_diff_dict(), "model_type": family}))
    problems = plan_of(model).problems
    assert any(f"is a {family}, " in problem and said in problem for problem in problems)


def test_a_decoder_whose_config_says_nothing_of_decoding_is_taken(tmp_path):
    config = transformers.GPTNeoXConfig(**SMALL, intermediate_size=32)
    assert plan_of(saved(tmp_path / "model", config)).problems == ()


def test_a_tokenizer_far_smaller_than_the_embedding_is_noted(tmp_path):
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 4000}, intermediate_size=32)
    plan = plan_of(saved(tmp_path / "model", config))
    assert plan.problems == ()
    assert "its tokenizer has 271 tokens, and the model 4,000" in "".join(plan.notes)


def test_run_and_explain_find_the_same_problems(model, tmp_path, capsys):
    (model / "tokenizer.json").unlink()
    tuner = Tuner(model).lora(r=2).sft(ROWS, **QUICK)
    with pytest.raises(PlanError) as caught:
        tuner.run(tmp_path / "run", progress=False)
    assert caught.value.problems == tuner.explain().problems
    assert "has no tokenizer" in capsys.readouterr().out
