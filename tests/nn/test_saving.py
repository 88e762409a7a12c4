"""A model is written with all its weights, whatever transformers refuses to write beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MixtralConfig

from tunesmith import Tuner
from tunesmith.errors import ModelError
from tunesmith.nn import saving
from tunesmith.nn.checkpoint import ShardWriter
from tunesmith.nn.saving import checkpoint_names, not_opened, plain_weights, save_model
from tunesmith.testing.tiny import tiny_llama, tiny_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in (("Who sings?", "The wren."), ("Who swims?", "The otter."))
]


def mixture(directory: Path) -> Path:
    """Save a tiny mixture of experts, whose checkpoint has each expert on its own."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=271,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def opened(directory: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return model, AutoTokenizer.from_pretrained(directory)


def saved(base: Path, target: Path, **options: Any) -> dict[str, torch.Tensor]:
    model, tokenizer = opened(base)
    target.mkdir()
    save_model(model, tokenizer, target, base=base, **options)
    return {
        k: v for file in sorted(target.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_what_save_pretrained_would_write(tmp_path: Path, tied: bool) -> None:
    base = tiny_llama(tmp_path / "base", tied)
    ours = saved(base, tmp_path / "ours")
    theirs = load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_stacked_experts_are_written_one_by_one_as_their_checkpoint_has_them(
    tmp_path: Path,
) -> None:
    base = mixture(tmp_path / "base")
    ours = saved(base, tmp_path / "ours")
    theirs = load_file(base / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in ours
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_experts_are_divided_one_stack_at_a_time(tmp_path: Path) -> None:
    """A tensor is made when it is written, and no sooner."""
    model, _ = opened(mixture(tmp_path / "base"))
    made: list[str] = []

    def counted(name: str, make: Any) -> Any:
        def counting() -> torch.Tensor:
            made.append(name)
            return make()

        return counting

    weights = {name: counted(name, make) for name, make in plain_weights(model).items()}
    written = checkpoint_names(model, weights)
    next(written)
    assert len(made) == 1
    assert len(list(written)) > len(made)
    assert sorted(made) == sorted(weights)


def test_many_shards_open_as_one_model(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    saved(base, tmp_path / "ours", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    ours, theirs = opened(tmp_path / "ours")[0], opened(base)[0]
    assert all(a.equal(b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


BROKEN_GENERATION = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "eos_token_id": 270}


def test_a_generation_config_that_cannot_be_written_costs_no_training(tmp_path: Path) -> None:
    """Sampling settings without sampling are read with a warning and refused on saving."""
    base = tiny_llama(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(BROKEN_GENERATION))
    model, _ = opened(base)
    model.generation_config.pad_token_id = 268  # as a trainer does, after which all is looked at
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "theirs")
    options: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "gradient_accumulation": 1}
    result = Tuner(str(base)).sft(ROWS, **options).run(tmp_path / "run", progress=False)
    assert result.model_path is not None
    written = (Path(result.model_path) / "generation_config.json").read_bytes()
    assert written == (base / "generation_config.json").read_bytes()
    opened(Path(result.model_path))


def test_settings_of_generation_in_config_json_are_no_obstacle(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"temperature": 0.3, "torch_dtype": "bfloat16", "somebodys_own": [1]}
    (base / "config.json").write_text(json.dumps(config))
    saved(base, tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert ours["somebodys_own"] == [1]
    assert ours["dtype"] == "float32"
    assert "torch_dtype" not in ours


def test_weights_are_kept_and_their_place_named_when_the_tokenizer_fails(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    model, _ = opened(base)
    (tmp_path / "ours").mkdir()

    class Failing:
        def save_pretrained(self, _: Path) -> None:
            raise OSError("no room for vocab.json")

    with pytest.raises(ModelError, match=r"weights are whole, in .*ours.*no room for vocab.json"):
        save_model(model, Failing(), tmp_path / "ours", base=base)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours")


def test_weights_are_kept_by_the_models_own_names_where_its_checkpoints_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers cannot turn back opens as well as it is."""
    base = mixture(tmp_path / "base")

    def failing(model: Any, weights: Any) -> Any:
        yield "half", torch.zeros(1)
        raise ModelError("cannot be undone")

    monkeypatch.setattr(saving, "checkpoint_names", failing)
    ours = saved(base, tmp_path / "ours")
    assert "model.layers.0.mlp.experts.gate_up_proj" in ours
    assert "half" not in ours
    a, b = opened(base)[0].state_dict(), opened(tmp_path / "ours")[0].state_dict()
    assert all(a[name].equal(b[name]) for name in a)


def test_a_head_that_is_no_longer_the_embedding_is_written_and_said_to_be(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tied=True)
    model, tokenizer = opened(base)
    head = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.lm_head.weight = head
    (tmp_path / "ours").mkdir()
    save_model(model, tokenizer, tmp_path / "ours", base=base)
    again, _ = opened(tmp_path / "ours")
    assert again.lm_head.weight.equal(head)
    assert again.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)


def test_a_weight_that_was_left_out_is_found_before_the_stage_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base")
    model, tokenizer = opened(base)
    (tmp_path / "ours").mkdir()
    name = "model.layers.1.mlp.up_proj.weight"

    def leaky(model: Any) -> Any:
        return {k: v for k, v in plain_weights(model).items() if k != name}

    monkeypatch.setattr(saving, "plain_weights", leaky)
    with pytest.raises(ModelError, match=rf"1 missing: {name}"):
        save_model(model, tokenizer, tmp_path / "ours", base=base)


def test_a_directory_of_another_shape_does_not_open(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    model, _ = opened(base)
    assert not_opened(type(model), base) == ""
    config = json.loads((base / "config.json").read_text()) | {"intermediate_size": 96}
    (base / "config.json").write_text(json.dumps(config))
    assert "gate_proj" in not_opened(type(model), base)


def test_a_model_without_a_base_says_itself_how_it_generates(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=271, n_embd=32, n_layer=1, n_head=2)
    )
    model.generation_config.temperature = 0.5  # refused by save_pretrained without sampling
    (tmp_path / "ours").mkdir()
    save_model(model, tiny_tokenizer(), tmp_path / "ours")
    again, _ = opened(tmp_path / "ours")
    assert again.generation_config.temperature == 0.5
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


class TestShardWriter:
    def test_a_name_written_twice_is_an_error(self, tmp_path: Path) -> None:
        writer = ShardWriter(tmp_path)
        writer.add("a", torch.zeros(1))
        with pytest.raises(ModelError, match="a: is written twice"):
            writer.add("a", torch.ones(1))

    def test_tensors_that_share_memory_are_written_in_full(self, tmp_path: Path) -> None:
        writer, shared = ShardWriter(tmp_path), torch.arange(4.0)
        writer.add("a", shared)
        writer.add("b", shared)
        writer.close()
        assert load_file(tmp_path / "model.safetensors")["b"].equal(shared)

    def test_a_directory_that_is_left_half_written_holds_no_model(self, tmp_path: Path) -> None:
        writer = ShardWriter(tmp_path, 8)
        for name in "abc":
            writer.add(name, torch.zeros(2))
        assert not list(tmp_path.glob("*.safetensors"))
        assert not list(tmp_path.glob("*.json"))
        writer.discard()
        assert not list(tmp_path.iterdir())
