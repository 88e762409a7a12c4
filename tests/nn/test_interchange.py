"""4-bit weights in bitsandbytes' layout: the same names, dtypes and bytes, both ways."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.errors import OpError
from tunesmith.nn import interchange
from tunesmith.nn.interchange import Format, as_tensors, from_tensors
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.ops import dequantize_4bit, quantize_4bit
from tunesmith.ops.dtypes import DTYPES

QUANT_TYPES = ("nf4", "fp4")


# Blocks of 64 end with the rows: across rows bitsandbytes 0.50.2 gets other values where it
# runs AVX-512.
def make_weight(rows: int = 640, columns: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, columns, generator=generator) / 8).to(dtype)


def theirs(
    weight: Tensor,
    blocksize: int = 64,
    nested: bool = True,
    quant_type: str = "nf4",
    storage: torch.dtype = torch.uint8,
    bias: Tensor | None = None,
) -> Any:
    """A Linear4bit of bitsandbytes that holds the weight."""
    bnb = pytest.importorskip("bitsandbytes")
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=bias is not None)
    # an instruction set of the machine decides whether the library repacks weights for its kernels
    layer.support_avx512bf16_for_cpu = False
    layer.weight = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        compress_statistics=nested,
        quant_type=quant_type,
        blocksize=blocksize,
        quant_storage=storage,
        module=layer,
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu")


def state_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    (key,) = (key for key in tensors if ".quant_state." in key)
    return json.loads(bytes(tensors[key].tolist()))


def with_state(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    (key,) = (key for key in tensors if ".quant_state." in key)
    data = json.dumps({**state_of(tensors), **changes}).encode()
    return {**tensors, key: torch.tensor(list(data), dtype=torch.uint8)}


def assert_same_bytes(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ours.keys() == others.keys()
    for name, tensor in others.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert (
            ours[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
        ), name


# --- what is written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_state_dict_is_that_of_bitsandbytes_linear4bit(
    quant_type: str, nested: bool, blocksize: int, dtype: torch.dtype
) -> None:
    weight, bias = make_weight(dtype=dtype), torch.ones(640, dtype=dtype)
    layer = NF4Linear.from_weight(
        weight, bias, blocksize=blocksize, nested=nested, quant_type=quant_type
    )
    ours = layer.state_dict()
    expected = theirs(weight, blocksize, nested, quant_type, bias=bias).state_dict()
    if nested:
        # the library looks codes of absmax up in a coarse table, and misses the nearest now and
        # then: the code, and nothing else, may be a neighbour
        codes = expected["weight.absmax"]
        distance = (codes.int() - ours["weight.absmax"].int()).abs()
        assert int(distance.max()) <= 1
        assert int(distance.count_nonzero()) <= max(1, len(codes) // 50)
        expected["weight.absmax"] = ours["weight.absmax"]
    assert_same_bytes(ours, expected)


def test_it_is_made_of_the_tensors_that_were_agreed_on() -> None:
    weight = make_weight(33, 5)  # an odd number of elements, and a short last block
    tensors = as_tensors(quantize_4bit(weight))
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == {
        "weight": (torch.uint8, [83, 1]),
        "weight.absmax": (torch.uint8, [3]),
        "weight.quant_map": (torch.float32, [16]),
        "weight.nested_absmax": (torch.float32, [1]),
        "weight.nested_quant_map": (torch.float32, [256]),
        "weight.quant_state.bitsandbytes__nf4": (
            torch.uint8,
            [len(tensors["weight.quant_state.bitsandbytes__nf4"])],
        ),
    }
    state = state_of(tensors)
    assert state.pop("nested_offset") != 0
    assert state == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [33, 5],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }


def test_tensors_share_no_memory_so_that_safetensors_takes_them(tmp_path: Any) -> None:
    layers = nn.ModuleList(NF4Linear.from_weight(make_weight()) for _ in range(2))
    save_file(layers.state_dict(), tmp_path / "weights.safetensors")
    again = nn.ModuleList(NF4Linear.from_weight(torch.ones(640, 128)) for _ in range(2))
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert_same_bytes(again.state_dict(), layers.state_dict())


def test_a_state_dict_shares_memory_with_its_layer() -> None:
    layer = NF4Linear.from_weight(make_weight())
    state = layer.state_dict()
    assert state["weight"].data_ptr() == layer.packed.data_ptr()
    assert state["weight.absmax"].data_ptr() == layer.absmax.data_ptr()


def test_on_the_meta_device_there_are_names_and_shapes() -> None:
    layer = NF4Linear.from_weight(make_weight())
    state = layer.to("meta").state_dict()
    assert state["weight"].is_meta
    assert state.keys() == NF4Linear.from_weight(make_weight()).state_dict().keys()


# --- what bitsandbytes makes of it


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bitsandbytes_reads_it_back_to_the_same_values(quant_type: str, nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = NF4Linear.from_weight(make_weight(), nested=nested, quant_type=quant_type)
    stats = layer.state_dict()
    read = bnb.nn.Params4bit.from_prequantized(
        data=stats.pop("weight"), quantized_stats=stats, device="cpu"
    )
    dense = bnb.functional.dequantize_4bit(read.data, read.quant_state)
    assert torch.equal(dense, layer.weight)


# --- what is read


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_weight_of_bitsandbytes_comes_back_byte_for_byte(
    quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    linear4bit = theirs(make_weight(dtype=dtype), 64, nested, quant_type)
    state = linear4bit.state_dict()
    w = from_tensors(state)
    assert (w.quant_type, w.nested, w.blocksize, w.dtype) == (quant_type, nested, 64, dtype)
    assert_same_bytes(as_tensors(w), state)
    dense = bnb.functional.dequantize_4bit(linear4bit.weight.data, linear4bit.weight.quant_state)
    assert torch.equal(dequantize_4bit(w), dense)


def test_a_layer_loads_the_state_dict_of_bitsandbytes() -> None:
    weight, bias = make_weight(), torch.arange(640.0)
    state = theirs(weight, bias=bias).state_dict()
    for assign in (False, True):
        layer = NF4Linear.from_weight(torch.ones(640, 128), torch.zeros(640))
        assert layer.load_state_dict(state, assign=assign).missing_keys == []
        assert_same_bytes(layer.state_dict(), state)


def test_bytes_kept_in_another_dtype_are_read_as_bytes() -> None:
    weight = make_weight()
    for storage in (torch.bfloat16, torch.float32, torch.int8):
        state = theirs(weight, storage=storage).state_dict()
        assert state["weight"].dtype == storage
        assert torch.equal(from_tensors(state).packed, quantize_4bit(weight).packed)


def test_the_first_element_of_a_byte_is_in_its_high_nibble() -> None:
    # written out by hand, so that a mistake both ways is seen without bitsandbytes
    tensors = {
        "weight": torch.tensor([[0x0F], [0x7D]], dtype=torch.uint8),
        "weight.absmax": torch.tensor([2.0]),
        "weight.quant_map": interchange.TABLES["nf4"][0].clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(b'{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[2,2]}'),
            dtype=torch.uint8,
        ),
    }
    values = dequantize_4bit(from_tensors(tensors))
    expected = [[-2.0, 2.0], [0.0, 2 * 0.5626170039176941]]
    assert torch.equal(values, torch.tensor(expected))


def test_the_offset_of_the_scales_keeps_every_bit() -> None:
    bits = torch.randint(0x3000_0000, 0x4000_0000, (200,), dtype=torch.int32)
    w = quantize_4bit(make_weight(64, 64))
    for offset in bits.view(torch.float32):
        assert w.nested_offset is not None
        w.nested_offset.copy_(offset)
        assert torch.equal(from_tensors(as_tensors(w)).nested_offset, offset)  # type: ignore[arg-type]


def test_other_tensors_are_passed_over_and_names_may_have_a_prefix() -> None:
    layer = NF4Linear.from_weight(make_weight())
    state = nn.ModuleDict({"up": layer, "norm": nn.LayerNorm(3)}).state_dict()
    assert torch.equal(from_tensors(state, "up.weight").packed, layer.packed)


# --- what is refused

FAULTS: dict[str, tuple[Any, str]] = {
    "a plain weight": (
        lambda t: {"weight": torch.ones(640, 128)},
        r"got a float32 tensor \[640, 128\] without the quant_state .* NF4Linear\.from_weight",
    ),
    "no scales": (
        lambda t: {k: v for k, v in t.items() if k != "weight.absmax"},
        r"weight\.absmax: is not there",
    ),
    "no weight": (
        lambda t: {k: v for k, v in t.items() if k != "weight"},
        r"weight: is not there, only weight\.absmax",
    ),
    "cast scales": (
        lambda t: {**t, "weight.nested_absmax": t["weight.nested_absmax"].half()},
        r"weight\.nested_absmax: got torch\.float16",
    ),
    "plain scales where codes are due": (
        lambda t: {**t, "weight.absmax": t["weight.absmax"].float()},
        r"weight\.absmax: got torch\.float32; this part of a 4-bit weight is torch\.uint8",
    ),
    "a cast table": (
        lambda t: {**t, "weight.quant_map": t["weight.quant_map"].half()},
        r"weight\.quant_map: got torch\.float16",
    ),
    "a table that was cast and cast back": (
        lambda t: {**t, "weight.quant_map": t["weight.quant_map"].half().float()},
        r"weight\.quant_map: its values are not those",
    ),
    "another table of the scales": (
        lambda t: {**t, "weight.nested_quant_map": t["weight.nested_quant_map"] * 1.001},
        r"weight\.nested_quant_map: its values are not those",
    ),
    "the other type's table": (
        lambda t: {**t, "weight.quant_map": interchange.TABLES["fp4"][0]},
        r"weight\.quant_map: its values are not those",
    ),
    "no offset": (lambda t: with_state(t, nested_offset=None), "got nested_offset None"),
    "an offset of NaN": (
        lambda t: with_state(t, nested_offset=float("nan")),
        "got nested_offset nan; expected a finite number",
    ),
    "nested blocks of 128": (lambda t: with_state(t, nested_blocksize=128), "in blocks of 128"),
    "an unknown type": (
        lambda t: with_state(t, quant_type="af4"),
        r"got quant_type 'af4'; allowed are nf4, fp4",
    ),
    "blocks of 32": (lambda t: with_state(t, blocksize=32), "got blocksize 32; allowed are 64"),
    "another shape": (lambda t: with_state(t, shape=[640, 130]), r"^weight: packed: got uint8"),
    "no shape": (lambda t: with_state(t, shape=None), r"expected an object with .*shape"),
    "fp64": (lambda t: with_state(t, dtype="float64"), "got dtype 'float64'; allowed are bfloat16"),
    "a damaged state": (
        lambda t: {k: v[:-1] if "quant_state" in k else v for k, v in t.items()},
        "is no JSON object in a uint8 tensor",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_such_weight_is_refused_with_a_reason(fault: str) -> None:
    plant, message = FAULTS[fault]
    tensors = as_tensors(quantize_4bit(make_weight()))
    from_tensors(tensors)
    with pytest.raises(OpError, match=message):
        from_tensors(plant(tensors))


def test_a_table_computed_on_another_machine_may_differ_in_the_last_bit() -> None:
    tensors = as_tensors(quantize_4bit(make_weight()))
    tensors["weight.nested_quant_map"].mul_(1 + 2**-23)
    from_tensors(tensors)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"blocksize": 128}, "got .* nf4 in blocks of 128.* holds .* blocks of 64"),
        ({"nested": False}, r"scales in fp32; this layer holds .* scales quantized, too"),
        ({"quant_type": "fp4"}, "got .* fp4 .* holds .* nf4"),
        ({"rows": 320}, r"got \[320, 128\] .* holds \[640, 128\]"),
        ({"plain": True}, r"proj\.weight: got a float32 tensor \[640, 128\] without"),
    ],
    ids=str,
)
def test_a_layer_takes_over_only_its_own_kind(other: dict[str, Any], message: str) -> None:
    model = nn.ModuleDict({"proj": NF4Linear.from_weight(make_weight())})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weight = make_weight(other.pop("rows", 640))
    if other.pop("plain", False):
        state = {"proj.weight": weight}
    else:
        state = as_tensors(quantize_4bit(weight, **other), "proj.weight")
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert_same_bytes(model.state_dict(), before)


def test_keys_that_are_missing_or_too_many_are_told_by_their_names() -> None:
    bias = torch.zeros(640)
    model = nn.ModuleDict({"proj": NF4Linear.from_weight(make_weight(), bias)})
    found = model.load_state_dict({}, strict=False)
    assert found.missing_keys == ["proj.weight", "proj.bias"]
    assert found.unexpected_keys == []
    state = {**model.state_dict(), "proj.weight.SCB": bias, "proj.other": bias}
    found = model.load_state_dict(state, strict=False)
    assert found.missing_keys == []
    assert sorted(found.unexpected_keys) == ["proj.other", "proj.weight.SCB"]


def test_a_format_says_itself_in_words() -> None:
    w = quantize_4bit(make_weight(), 128, nested=False, quant_type="fp4")
    assert str(Format.of(w)) == "fp4 in blocks of 128, scales in fp32"


def test_it_needs_no_bitsandbytes() -> None:
    program = (
        "import sys, torch; sys.modules['bitsandbytes'] = None\n"
        "from tunesmith.nn.nf4_linear import NF4Linear\n"
        "layer = NF4Linear.from_weight(torch.ones(8, 64))\n"
        "layer.load_state_dict(layer.state_dict())"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
