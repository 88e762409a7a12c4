"""4-bit checkpoints both ways: stock transformers + bitsandbytes opens ours, and we open theirs.

The stock side runs in a process of its own, which asserts that it never saw tunesmith.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tunesmith import Tuner
from tunesmith.engine.plan import make_plan
from tunesmith.errors import ModelError, OpError
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.plugin.quantizers import Quantizer
from tunesmith.plugin.registry import registry
from tunesmith.testing.tiny import tiny_llama, tiny_tokenizer
from tunesmith_plugins.quantizers.bitsandbytes import BitsAndBytes, BitsAndBytesConfig
from tunesmith_plugins.quantizers.fp4 import FP4, FP4Config
from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
# hidden sizes that give weights of more than 256 blocks, so that the nested scales have groups
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "attention_bias": True}

STOCK = """
import sys
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import bitsandbytes

def ready(model):
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        # with AVX512-BF16 the library computes in bfloat16, whatever it is asked for
        layer.support_avx512bf16_for_cpu = False
    return layers

ids = torch.arange(1, 61).view(2, -1)
"""

SAVE = (
    STOCK
    + """
base, target = sys.argv[1:]
kinds = {
    "nf4-nested": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4-nested": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "skip": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["down_proj", "lm_head"]},
    "head": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["q_proj"]},
    "storage": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
}
for name, options in kinds.items():
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    assert ready(model)
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, f"{target}/{name}.pt")
    model.save_pretrained(f"{target}/{name}")
config = BitsAndBytesConfig(load_in_8bit=True)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
model.save_pretrained(f"{target}/int8")
assert not any(name.startswith("tunesmith") for name in sys.modules)
"""
)

OPEN = (
    STOCK
    + """
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    layers = ready(model)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    torch.save((logits, len(layers), layers[0].compute_dtype), f"{directory}/stock.pt")
assert not any(name.startswith("tunesmith") for name in sys.modules)
"""
)


def stock(program: str, *arguments: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.arange(1, 61).view(2, -1)).logits
    return logits


def layers_of(model: Any) -> dict[str, NF4Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}


def distance(ours: Tensor, theirs: Tensor) -> float:
    assert float(theirs.std()) > 0.1, "these logits say nothing"
    return float((ours.float() - theirs.float()).abs().max())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with biases whose head is a layer of its own."""
    return tiny_llama(tmp_path_factory.mktemp("base") / "model", tied=False, **SIZES)


# --- tunesmith saves, stock transformers + bitsandbytes opens

OURS: dict[str, tuple[type[NF4], Any, torch.dtype]] = {
    "nf4": (NF4, NF4Config(), torch.float32),
    "not nested, blocks of 128": (NF4, NF4Config(nested=False, blocksize=128), torch.float32),
    "skip": (NF4, NF4Config(skip=("down_proj", "model.layers.0.self_attn")), torch.float32),
    "fp4": (FP4, FP4Config(), torch.float32),
    "bf16": (NF4, NF4Config(), torch.bfloat16),
    "sharded": (NF4, NF4Config(), torch.float32),
    "tied": (NF4, NF4Config(), torch.float32),
}


@pytest.fixture(scope="module")
def ours(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each kind: the directory, our logits, our number of layers, and what stock made of it."""
    root = tmp_path_factory.mktemp("ours")
    made: dict[str, Any] = {}
    tied = tiny_llama(root / "base", tied=True, **SIZES)
    for name, (kind, config, dtype) in OURS.items():
        source = tied if name == "tied" else base
        model = kind(config).load(source, dtype=dtype, device=CPU)
        model.save_pretrained(root / name, max_shard_size="60KB" if name == "sharded" else "1GB")
        made[name] = [root / name, logits_of(model), len(layers_of(model))]
    stock(OPEN, *(directory for directory, *_ in made.values()))
    for kept in made.values():
        kept.append(torch.load(kept[0] / "stock.pt"))
    return made


@pytest.mark.parametrize("name", OURS)
def test_stock_transformers_opens_what_we_saved_to_the_same_logits(
    ours: dict[str, Any], name: str
) -> None:
    _, logits, count, (theirs, their_count, compute_dtype) = ours[name]
    assert their_count == count
    assert compute_dtype == OURS[name][2]
    if theirs.dtype == torch.float32:
        assert distance(logits, theirs) <= 1e-5
    else:  # products are summed in another order, and each is rounded to 8 bits
        assert float((logits - theirs).float().norm() / theirs.float().norm()) < 0.02


def test_its_config_is_the_one_that_transformers_writes(ours: dict[str, Any]) -> None:
    from transformers import BitsAndBytesConfig as Stock

    written = json.loads((ours["nf4"][0] / "config.json").read_text())["quantization_config"]
    expected = Stock(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float32",
        llm_int8_skip_modules=["lm_head"],
    )
    assert written == json.loads(json.dumps(expected.to_dict()))
    skipped = json.loads((ours["skip"][0] / "config.json").read_text())["quantization_config"]
    assert skipped["llm_int8_skip_modules"] == [
        *(f"model.layers.0.self_attn.{each}_proj" for each in "qkvo"),
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ]


@pytest.mark.parametrize("name", OURS)
def test_what_we_saved_we_open_and_save_again_to_the_same_bytes(
    ours: dict[str, Any], name: str, tmp_path: Path
) -> None:
    directory, logits, _, _ = ours[name]
    kind, _, dtype = OURS[name]
    model = kind(type(OURS[name][1])()).load(directory, dtype=dtype, device=CPU)
    assert torch.equal(logits_of(model), logits)
    model.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", directory)
    configs = [json.loads((d / "config.json").read_text()) for d in (tmp_path / "again", directory)]
    assert configs[0] == configs[1]


def test_a_tied_head_stays_tied(ours: dict[str, Any]) -> None:
    directory = ours["tied"][0]
    assert "lm_head.weight" not in tensors_of(directory)
    model = NF4(NF4Config()).load(directory, dtype=torch.float32, device=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_a_model_keeps_in_fp32_is_left_alone_as_stock_transformers_does(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["down_proj"])
    model = NF4(NF4Config()).load(base, dtype=torch.float32, device=CPU)
    assert len(layers_of(model)) == 12
    assert not any("down_proj" in name for name in layers_of(model))


def test_a_weight_that_came_out_of_a_conversion_is_saved_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # undoing the conversion would concatenate packed bytes
    from transformers import modeling_utils
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

    plain = tiny_llama(tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    for layer in ("0", "1"):
        mlp = f"model.layers.{layer}.mlp"
        both = [tensors.pop(f"{mlp}.{name}.weight") for name in ("gate_proj", "up_proj")]
        tensors[f"{mlp}.fused.weight"] = torch.cat(both)
        tensors[f"{mlp}.out.weight"] = tensors.pop(f"{mlp}.down_proj.weight")
    fused = shutil.copytree(plain, tmp_path / "fused")
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    expected = logits_of(NF4(NF4Config()).load(plain, dtype=torch.float32, device=CPU))
    original = modeling_utils.get_model_conversion_mapping

    def mapping(model: Any, *args: Any, **kwargs: Any) -> list[Any]:
        targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
        return [
            *original(model, *args, **kwargs),
            WeightRenaming("mlp.out", "mlp.down_proj"),
            WeightConverter("mlp.fused.weight", targets, operations=[Chunk(dim=0)]),
        ]

    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "get_model_conversion_mapping", mapping)
        model = NF4(NF4Config()).load(fused, dtype=torch.float32, device=CPU)
        assert torch.equal(logits_of(model), expected)
        model.save_pretrained(tmp_path / "saved")
        saved = tensors_of(tmp_path / "saved")
        assert "model.layers.0.mlp.gate_proj.weight.quant_map" in saved
        assert "model.layers.0.mlp.out.weight.quant_map" in saved  # a renaming is undone
        again = NF4(NF4Config()).load(tmp_path / "saved", dtype=torch.float32, device=CPU)
        assert torch.equal(logits_of(again), expected)


# --- stock transformers + bitsandbytes saves, tunesmith opens

THEIRS = ("nf4-nested", "nf4", "fp4-nested", "fp4", "skip", "head", "storage")


@pytest.fixture(scope="module")
def theirs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds a model of each kind with its logits beside it."""
    root = tmp_path_factory.mktemp("theirs")
    stock(SAVE, base, root)
    for directory in filter(Path.is_dir, root.iterdir()):
        tiny_tokenizer().save_pretrained(directory)
    return root


def opened(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    quantizer = FP4(FP4Config()) if "fp4" in directory.name else NF4(NF4Config())
    return quantizer.load(directory, dtype=dtype, device=CPU)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}


def assert_same_files(ours: Path, theirs: Path) -> None:
    mine, others = tensors_of(ours), tensors_of(theirs)
    assert mine.keys() == others.keys()
    for name, tensor in others.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("name", THEIRS)
def test_we_open_what_stock_transformers_saved_to_the_same_logits(
    theirs: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(*_: Any, **__: Any) -> None:
        raise AssertionError("a stored weight was quantized again")

    monkeypatch.setattr(NF4Linear, "from_weight", quantize)
    model = opened(theirs / name)
    assert distance(logits_of(model), torch.load(theirs / f"{name}.pt")) <= 1e-5
    count = {"skip": 12, "head": 13}.get(name, 14)
    assert len(layers_of(model)) == count
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.get_submodule("model.layers.0.self_attn.q_proj").bias is not None


@pytest.mark.parametrize("name", [name for name in THEIRS if name != "storage"])
def test_saving_it_again_changes_no_byte(theirs: Path, name: str, tmp_path: Path) -> None:
    opened(theirs / name).save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", theirs / name)


def test_the_compute_dtype_is_ours_to_choose_and_plain_weights_follow(theirs: Path) -> None:
    model = opened(theirs / "nf4-nested", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {layer.compute_dtype for layer in layers_of(model).values()} == {torch.bfloat16}
    assert {layer.nested_absmax.dtype for layer in layers_of(model).values()} == {torch.float32}


def test_a_model_of_theirs_is_trained_merged_and_opened_again(
    theirs: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    result = (
        Tuner(theirs / "nf4-nested", device="cpu", precision="fp32")
        .quantize("nf4")
        .lora(r=4)
        .sft(alpaca_file, max_steps=2, batch_size=2, learning_rate=1e-2, max_length=64)
        .merge(dtype="fp32")
        .run(tmp_path / "run")
    )
    merged = AutoModelForCausalLM.from_pretrained(result.path / "stages" / "04-merge" / "model")
    assert not hasattr(merged.config, "quantization_config")
    moved = distance(logits_of(merged), torch.load(theirs / "nf4-nested.pt"))
    assert 1e-4 < moved < 10


# --- what a plan says


def plan_of(tuner: Tuner, data: Path, estimates: bool = False) -> Any:
    return make_plan(tuner.lora().sft(data).recipe, registry(), estimates=estimates)


def test_explain_says_that_stored_weights_are_taken_as_they_are(
    theirs: Path, alpaca_file: Path
) -> None:
    plan = plan_of(Tuner(theirs / "nf4").quantize("nf4"), alpaca_file, estimates=True)
    assert not plan.problems
    assert (
        "stored nf4 in blocks of 64, scales in fp32: 14 layers taken as they are, not quantized "
        "again" in " ".join(str(plan).split())  # it is wrapped
    )
    # the prediction goes by what is stored: fp32 scales are 4 bytes a block
    quantizer = NF4(NF4Config())
    quantizer.check_stored({"quant_method": "bitsandbytes", "load_in_4bit": True}, theirs / "nf4")
    assert quantizer.nbytes((128, 128), 4) == 128 * 64 + 256 * 4


def test_a_model_that_is_not_stored_quantized_is_not_said_to_be(
    base: Path, alpaca_file: Path
) -> None:
    plan = plan_of(Tuner(base).quantize("nf4"), alpaca_file)
    assert not plan.problems
    assert "stored" not in str(plan)


@pytest.mark.parametrize(
    ("name", "quantizer", "options", "message"),
    [
        (
            "nf4",
            "nf4",
            {"blocksize": 128},
            r"got blocksize=128, and model\.layers\.0\.mlp\.down_proj is stored in 4 bits with "
            r"blocksize=64; .* pass blocksize=64 or leave it out, or start from the unquantized",
        ),
        ("nf4", "nf4", {"nested": True}, "got nested=True, and .* with nested=False"),
        ("nf4-nested", "nf4", {"nested": False}, "got nested=False, and .* with nested=True"),
        ("fp4", "nf4", {}, r"got quant_type='nf4', and .*'fp4'; .* use \.quantize\(\"fp4\"\)"),
        ("nf4", "fp4", {}, r"got quant_type='fp4', and .*'nf4'; .* use \.quantize\(\"nf4\"\)"),
        ("nf4", "nf4", {"skip": "up_proj"}, "got skip='up_proj', and .*up_proj is stored in 4"),
        (
            "int8",
            "nf4",
            {},
            r"got a model that is stored quantized with bitsandbytes 8-bit; nf4 takes one in 16",
        ),
        ("int8", "bitsandbytes", {}, "got bits=4, and the model is stored with bits=8"),
        ("nf4", "bitsandbytes", {"quant_type": "fp4"}, "got quant_type='fp4', and the model is"),
    ],
)
def test_what_is_stored_otherwise_than_asked_for_is_a_problem(
    theirs: Path,
    alpaca_file: Path,
    name: str,
    quantizer: str,
    options: dict[str, Any],
    message: str,
) -> None:
    tuner = Tuner(theirs / name).quantize(quantizer, **options)
    (problem,) = plan_of(tuner, alpaca_file).problems
    assert problem.startswith(f"step 1 (quantize-{quantizer}): ")
    assert re.search(message, problem), problem
    # whoever loads without a plan is told the same
    with pytest.raises(ModelError, match=message):
        registry().build(tuner.recipe.steps[0]).load(theirs / name, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "int8"])
def test_bitsandbytes_takes_what_it_has_stored(theirs: Path, alpaca_file: Path, name: str) -> None:
    options = {"bits": 8} if name == "int8" else {}
    tuner = Tuner(theirs / name).quantize("bitsandbytes", **options)
    plan = plan_of(tuner, alpaca_file)
    assert not plan.problems
    assert "taken as it is, not quantized again" in str(plan)
    model = BitsAndBytes(BitsAndBytesConfig(**options)).load(
        theirs / name, dtype=torch.float32, device=CPU
    )
    if name != "int8":
        # in eval mode and with AVX512-BF16 it packs its weights anew, and rounds their scales
        assert distance(logits_of(model.train()), torch.load(theirs / f"{name}.pt")) <= 1e-5


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "tunesmith_nf4"])
def test_another_quantization_is_refused_by_its_name(
    base: Path, alpaca_file: Path, tmp_path: Path, method: str
) -> None:
    directory = shutil.copytree(base, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    for quantizer in ("nf4", "bitsandbytes"):
        (problem,) = plan_of(Tuner(directory).quantize(quantizer), alpaca_file).problems
        assert f"stored quantized with {method}; {quantizer} takes one in 16" in problem
    with pytest.raises(ModelError, match=f"stored quantized with {method}; .* start from the un"):
        NF4(NF4Config()).load(directory, dtype=torch.float32, device=CPU)


def test_without_a_quantize_step_the_plan_says_which_one_reads_it(
    theirs: Path, alpaca_file: Path
) -> None:
    # the merge would take packed bytes for weights
    for name, step in (("nf4", "nf4"), ("int8", "bitsandbytes")):
        (problem,) = plan_of(Tuner(theirs / name), alpaca_file).problems
        assert f'.quantize("{step}"): put that at the start' in problem
    with pytest.raises(ModelError, match=r"stored quantized with gptq.*cannot be read here: .*pip"):
        Quantizer(None).check_stored({"quant_method": "gptq", "bits": 4}, None)


def test_of_a_model_that_is_not_here_yet_the_config_is_asked() -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    said = NF4(NF4Config()).check_stored(stored, None)
    assert said == "nf4 by bitsandbytes: taken as it is, not quantized again"
    with pytest.raises(ModelError, match="got nested=True, and the model is stored"):
        NF4(NF4Config(nested=True)).check_stored(stored, None)


# --- checkpoints that are not whole


def changed(directory: Path, target: Path, change: Any) -> Path:
    copied = shutil.copytree(directory, target)
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def test_a_part_that_is_missing_is_named(theirs: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q_PROJ}.absmax"]

    broken = changed(theirs / "nf4", tmp_path / "model", change)
    with pytest.raises(OpError, match=f"{Q_PROJ}.absmax: is not there"):
        NF4(NF4Config()).load(broken, dtype=torch.float32, device=CPU)


def test_a_weight_whose_state_is_missing_is_named(theirs: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{Q_PROJ}.")]:
            del tensors[name]

    broken = changed(theirs / "nf4", tmp_path / "model", change)
    with pytest.raises(OpError, match=rf"{Q_PROJ}: got a uint8 tensor \[8192, 1\] without"):
        NF4(NF4Config()).load(broken, dtype=torch.float32, device=CPU)


def test_a_cast_checkpoint_is_refused(theirs: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.half()

    broken = changed(theirs / "nf4", tmp_path / "model", change)
    with pytest.raises(OpError, match=r"absmax: got torch\.float16; .* that was not cast"):
        NF4(NF4Config()).load(broken, dtype=torch.float32, device=CPU)


def test_a_checkpoint_of_another_model_is_refused(theirs: Path, tmp_path: Path) -> None:
    for field, value, message in (
        ("num_hidden_layers", 1, r"holds 4-bit weights for model\.layers\.1\..* and 6 more layers"),
        ("intermediate_size", 512, r"the checkpoint's shape is \[128, 256\], the model's \[128, 5"),
    ):
        directory = shutil.copytree(theirs / "nf4", tmp_path / field)
        config = json.loads((directory / "config.json").read_text())
        config[field] = value
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=message):
            NF4(NF4Config()).load(directory, dtype=torch.float32, device=CPU)


def test_a_config_that_promises_4_bits_over_plain_weights_is_refused(
    base: Path, theirs: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(base, tmp_path / "model")
    shutil.copy(theirs / "nf4" / "config.json", directory / "config.json")
    with pytest.raises(ModelError, match="says that it is stored in 4 bits, and no weight"):
        NF4(NF4Config()).load(directory, dtype=torch.float32, device=CPU)


# --- memory


def test_opening_stored_weights_holds_them_once(tmp_path: Path, load_nf4_measured: Any) -> None:
    # layers of the loading test's model: 101 MB in 16 bits, 26 in 4
    directory = tiny_llama(
        tmp_path / "dense",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = NF4(NF4Config()).load(directory, dtype=torch.bfloat16, device=CPU)
    model.save_pretrained(tmp_path / "stored")
    del model
    shutil.rmtree(directory)
    # weights that lie in pages of the file take none of the process's own memory
    peak, held = load_nf4_measured(tmp_path / "stored")
    largest = 1024 * 4096 // 2
    assert held < 30e6
    assert peak < held + 4 * largest
