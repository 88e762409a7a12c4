"""Ways in which a model directory can be damaged; each is a function of the directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], Any]
GONE = object()


def setting(file: str, **changes: Any) -> Damage:
    """Change settings of a JSON file; GONE takes one out."""

    def damage(directory: Path) -> None:
        path = directory / file
        row = json.loads(path.read_text()) if path.exists() else {}
        row.update(changes)
        path.write_text(json.dumps({k: v for k, v in row.items() if v is not GONE}))

    return damage


def content(file: str, what: str | bytes) -> Damage:
    data = what.encode() if isinstance(what, str) else what
    return lambda directory: (directory / file).write_bytes(data)


def without(*patterns: str) -> Damage:
    return lambda directory: [
        file.unlink() for pattern in patterns for file in directory.glob(pattern)
    ]


def cut(file: str, keep: float) -> Damage:
    """Keep a share of a file, or all but so many bytes if negative."""

    def damage(directory: Path) -> None:
        data = (directory / file).read_bytes()
        (directory / file).write_bytes(data[: int(len(data) * keep) if keep > 0 else int(keep)])

    return damage


def longer(file: str, more: bytes) -> Damage:
    return lambda directory: (directory / file).write_bytes((directory / file).read_bytes() + more)


def flipped(file: str, byte: int, value: int) -> Damage:
    def damage(directory: Path) -> None:
        data = bytearray((directory / file).read_bytes())
        data[byte] ^= value
        (directory / file).write_bytes(data)

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Change the tensors; a mapping that is returned takes their place."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        changed = change(tensors)
        tensors = changed if isinstance(changed, dict) else tensors
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the header of the weights, and leave the weights as they are."""

    def damage(directory: Path) -> None:
        data = (directory / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        row = json.loads(data[8 : 8 + length])
        changed = change(row)
        text = changed if isinstance(changed, str) else json.dumps(row)
        raw = text.encode()
        (directory / "model.safetensors").write_bytes(
            len(raw).to_bytes(8, "little") + raw + data[8 + length :]
        )

    return damage


def sharded(change: Callable[[Path, dict[str, Any]], Any]) -> Damage:
    """Write the weights as two shards with an index, and change that."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[:5]}
        parts["model-00002-of-00002.safetensors"] = names[5:]
        for file, keys in parts.items():
            save_file({k: tensors[k] for k in keys}, directory / file, metadata={"format": "pt"})
        row = {
            "metadata": {"total_size": 1},
            "weight_map": {key: file for file, keys in parts.items() for key in keys},
        }
        changed = change(directory, row)
        text = changed if isinstance(changed, str) else json.dumps(row)
        (directory / "model.safetensors.index.json").write_text(text)

    return damage


def points_to(target: str) -> Damage:
    """Let the index name a file elsewhere, with the weights there."""

    def change(directory: Path, row: dict[str, Any]) -> None:
        first = directory / "model-00001-of-00002.safetensors"
        place = directory.parent / "elsewhere.safetensors"
        place.write_bytes(first.read_bytes())
        named = target.format(parent=directory.parent)
        row["weight_map"] = {
            key: named if file == first.name else file for key, file in row["weight_map"].items()
        }

    return sharded(change)


def _move(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
CONFIG, SETTINGS, TOKENIZER = "config.json", "tokenizer_config.json", "tokenizer.json"
WEIGHTS, GENERATION = "model.safetensors", "generation_config.json"

REFUSED: dict[str, Damage] = {
    # config.json
    "no config": without(CONFIG),
    "an empty config": content(CONFIG, ""),
    "a config of text": content(CONFIG, "model: llama"),
    "a config that is a list": content(CONFIG, "[]"),
    "a config that is null": content(CONFIG, "null"),
    "a config that is a number": content(CONFIG, "7"),
    "a config without settings": content(CONFIG, "{}"),
    "a config cut off": cut(CONFIG, 0.5),
    "a config nested without end": content(CONFIG, "[" * 100_000),
    "a config in another encoding": content(CONFIG, b"\xff\xfe\x00{"),
    "a config of 20 MB": content(CONFIG, '{"a": "' + "a" * (20 << 20) + '"}'),
    "model_type a number": setting(CONFIG, model_type=5),
    "model_type null": setting(CONFIG, model_type=None),
    "no model_type": setting(CONFIG, model_type=GONE),
    "an unknown architecture": setting(CONFIG, model_type="llama99"),
    "another architecture": setting(CONFIG, model_type="gpt2"),
    "an encoder": setting(CONFIG, model_type="bert"),
    "an encoder-decoder": setting(CONFIG, model_type="t5"),
    "a model of images": setting(CONFIG, model_type="vit"),
    "hidden_size text": setting(CONFIG, hidden_size="big"),
    "hidden_size zero": setting(CONFIG, hidden_size=0),
    "hidden_size negative": setting(CONFIG, hidden_size=-32),
    "hidden_size huge": setting(CONFIG, hidden_size=10**15),
    "hidden_size null": setting(CONFIG, hidden_size=None),
    "hidden_size of another model": setting(CONFIG, hidden_size=64),
    "layers text": setting(CONFIG, num_hidden_layers="two"),
    "layers negative": setting(CONFIG, num_hidden_layers=-1),
    "a billion layers": setting(CONFIG, num_hidden_layers=10**9),
    "a layer more": setting(CONFIG, num_hidden_layers=3),
    "a layer less": setting(CONFIG, num_hidden_layers=1),
    "heads zero": setting(CONFIG, num_attention_heads=0),
    "heads that do not divide": setting(CONFIG, num_attention_heads=5, head_dim=GONE),
    "heads text": setting(CONFIG, num_attention_heads="4"),
    "key heads of another model": setting(CONFIG, num_key_value_heads=4),
    "vocabulary of another model": setting(CONFIG, vocab_size=300),
    "vocabulary text": setting(CONFIG, vocab_size="many"),
    "vocabulary negative": setting(CONFIG, vocab_size=-1),
    "an unknown activation": setting(CONFIG, hidden_act="swosh"),
    "an activation that is a number": setting(CONFIG, hidden_act=5),
    "not tied after all": setting(CONFIG, tie_word_embeddings=False),
    "rope of an unknown kind": setting(CONFIG, rope_parameters={"rope_type": "tape"}),
    "rope a list": setting(CONFIG, rope_parameters=[1]),
    "an unknown dtype": setting(CONFIG, dtype="float99"),
    "intermediate_size null": setting(CONFIG, intermediate_size=None),
    "weights by another name": setting(CONFIG, transformers_weights="../other.safetensors"),
    "attention from a hub": setting(CONFIG, _attn_implementation="someone/attention"),
    "attention from a hub, by its other name": setting(CONFIG, attn_implementation="some/one"),
    "quantization a list": setting(CONFIG, quantization_config=[1]),
    "quantization text": setting(CONFIG, quantization_config="4bit"),
    "quantization unknown": setting(CONFIG, quantization_config={"quant_method": "q99"}),
    "quantization without a method": setting(CONFIG, quantization_config={"bits": 4}),
    "quantization by a package that is not here": setting(
        CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    "quantized by awq": setting(CONFIG, quantization_config={"quant_method": "awq", "bits": 4}),
    "said to be in 4 bits": setting(
        CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    # weights
    "no weights": without("*.safetensors"),
    "empty weights": content(WEIGHTS, ""),
    "seven bytes of weights": content(WEIGHTS, b"\x01" * 7),
    "weights that are a web page": content(WEIGHTS, "<html>" + "not found" * 100),
    "weights that are a pointer of git-lfs": content(
        WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
    "weights cut in half": cut(WEIGHTS, 0.5),
    "weights cut in the header": cut(WEIGHTS, 0.01),
    "weights without their last byte": cut(WEIGHTS, -1),
    "weights with more at the end": longer(WEIGHTS, b"more"),
    "a header longer than the file": flipped(WEIGHTS, 4, 0x7F),
    "a header of 2**63 bytes": flipped(WEIGHTS, 7, 0x7F),
    "a bit of the header's length": flipped(WEIGHTS, 0, 0x10),
    "a bit of the header": flipped(WEIGHTS, 12, 0x40),
    "a header of text": header(lambda row: "no header at all"),
    "a header that is a list": header(lambda row: "[]"),
    "an unknown dtype in the header": header(lambda row: row[UP].update(dtype="F99")),
    "whole numbers for weights": header(lambda row: row[UP].update(dtype="I32")),
    "another shape in the header": header(lambda row: row[UP].update(shape=[64, 64])),
    "a negative shape": header(lambda row: row[UP].update(shape=[-64, -32])),
    "a huge shape": header(lambda row: row[UP].update(shape=[2**62, 2**62])),
    "offsets that overlap": header(
        lambda row: row[UP].update(data_offsets=row[NORM]["data_offsets"])
    ),
    "offsets backwards": header(lambda row: row[UP].update(data_offsets=[8192, 0])),
    "offsets beyond the file": header(lambda row: row[UP].update(data_offsets=[2**40, 2**41])),
    "no offsets": header(lambda row: row[UP].pop("data_offsets")),
    "names as a data parallel model has them": weights(
        lambda t: {f"module.{key}": value for key, value in t.items()}
    ),
    "names as torch.compile has them": weights(
        lambda t: {f"_orig_mod.{key}": value for key, value in t.items()}
    ),
    "a weight renamed": weights(lambda t: _move(t, UP, UP.replace("up_proj", "upper"))),
    "a weight missing": weights(lambda t: t.pop(UP)),
    "the last norm missing": weights(lambda t: t.pop(NORM)),
    "no weight at all": weights(lambda t: {"nothing": torch.zeros(1)}),
    "a weight too many": weights(lambda t: t.update({"score.weight": torch.zeros(2, 32)})),
    "an adapter's weights inside": weights(
        lambda t: t.update({UP.replace("weight", "lora_A.weight"): torch.zeros(2, 32)})
    ),
    "a weight of another shape": weights(lambda t: t.update({NORM: torch.ones(31)})),
    "a weight transposed": weights(lambda t: t.update({UP: t[UP].T.contiguous()})),
    "pickled weights": lambda d: (
        (d / WEIGHTS).unlink(),
        (d / "pytorch_model.bin").write_bytes(b"\x80\x04."),
    ),
    "pickled weights by another name": lambda d: (d / WEIGHTS).rename(d / "model.pt"),
    "a pickle called safetensors": content(WEIGHTS, b"\x80\x04\x95" + b"x" * 500),
    "an adapter beside the model": setting("adapter_config.json", peft_type="LORA", r=2),
    "a distributed checkpoint": lambda d: (d / WEIGHTS).rename(
        d / "shard-00001-model-00001-of-00002.safetensors"
    ),
    # shards
    "an index of text": sharded(lambda d, row: "weights"),
    "an index that is a list": sharded(lambda d, row: "[]"),
    "an index without a map": sharded(lambda d, row: row.pop("weight_map")),
    "an empty map": sharded(lambda d, row: row.update(weight_map={})),
    "a map that is a list": sharded(lambda d, row: row.update(weight_map=["a"])),
    "a map to numbers": sharded(
        lambda d, row: row.update(weight_map=dict.fromkeys(row["weight_map"], 1))
    ),
    "a shard that is gone": sharded(
        lambda d, row: (d / "model-00002-of-00002.safetensors").unlink()
    ),
    "a shard cut off": sharded(lambda d, row: cut("model-00002-of-00002.safetensors", 0.5)(d)),
    "one shard twice": sharded(
        lambda d, row: row.update(
            weight_map=dict.fromkeys(row["weight_map"], "model-00001-of-00002.safetensors")
        )
    ),
    "a shard up the tree": points_to("../elsewhere.safetensors"),
    "a shard by its whole path": points_to("{parent}/elsewhere.safetensors"),
    "a shard around a corner": points_to("x/../../elsewhere.safetensors"),
    # tokenizer
    "no tokenizer": without("tokenizer*"),
    "no tokenizer.json": without(TOKENIZER),
    "a tokenizer of text": content(TOKENIZER, "tokens"),
    "a tokenizer that is a list": content(TOKENIZER, "[]"),
    "a tokenizer without settings": content(TOKENIZER, "{}"),
    "a tokenizer cut off": cut(TOKENIZER, 0.5),
    "a tokenizer nested without end": content(TOKENIZER, "[" * 100_000),
    "a tokenizer without a model": setting(TOKENIZER, model=GONE),
    "a tokenizer of an unknown model": setting(TOKENIZER, model={"type": "Magic"}),
    "a tokenizer without merges": setting(TOKENIZER, model={"type": "BPE", "vocab": {"a": 0}}),
    "a merge of unknown tokens": setting(
        TOKENIZER, model={"type": "BPE", "vocab": {"a": 0}, "merges": ["q z"]}
    ),
    "an id of 2**40": setting(
        TOKENIZER, model={"type": "BPE", "vocab": {"a": 2**40}, "merges": []}
    ),
    "an id below zero": setting(TOKENIZER, model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "ids of another model": setting(
        TOKENIZER,
        model={"type": "BPE", "vocab": {chr(33 + n): n * 9 for n in range(90)}, "merges": []},
    ),
    "an expression that is none": setting(
        TOKENIZER,
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(("},
            "behavior": "Isolated",
            "invert": False,
        },
    ),
    "an unknown pre-tokenizer": setting(TOKENIZER, pre_tokenizer={"type": "Magic"}),
    "added tokens that are text": setting(TOKENIZER, added_tokens="many"),
    "added tokens without ids": setting(TOKENIZER, added_tokens=[{"content": "<a>"}]),
    "settings of text": content(SETTINGS, "settings"),
    "settings that are a list": content(SETTINGS, "[]"),
    "settings cut off": cut(SETTINGS, 0.6),
    "an eos that is a number": setting(SETTINGS, eos_token=5),
    "an eos that is no token of the model": setting(SETTINGS, eos_token="<nowhere>"),
    "added tokens of the settings a list": setting(SETTINGS, added_tokens_decoder=[1, 2]),
    "added tokens of the settings text": setting(SETTINGS, added_tokens_decoder={"x": "y"}),
    "a template that is a number": lambda d: (
        setting(SETTINGS, chat_template=5)(d),
        without("chat_template.jinja")(d),
    ),
    "a template that is not Jinja": lambda d: (
        setting(SETTINGS, chat_template="{% for %}")(d),
        without("chat_template.jinja")(d),
    ),
    "a template that never ends": lambda d: (
        setting(SETTINGS, chat_template="{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3)(d),
        without("chat_template.jinja")(d),
    ),
    "a template file that is not Jinja": content("chat_template.jinja", "{% for %}"),
    "no template": lambda d: (
        setting(SETTINGS, chat_template=GONE)(d),
        without("chat_template.jinja")(d),
    ),
}
"""None of these can be trained; a plan says why."""

TRAINS: dict[str, Damage] = {
    "a generation config of text": content(GENERATION, "no JSON"),
    "a generation config that is a list": content(GENERATION, "[]"),
    "a generation config cut off": cut(GENERATION, 0.5),
    "a generation config of the wrong types": setting(GENERATION, max_new_tokens="many"),
    "a generation config of nonsense": setting(GENERATION, temperature=[], eos_token_id="x"),
}
"""These say nothing that training needs; a note names them."""
