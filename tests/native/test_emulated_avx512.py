"""AVX-512 and AMX kernels, with emulated instructions, agree with scalar ones and with fp64.

So they are tested on a CPU that has neither; where there is one, the other tests of this folder
run them natively as well. emulation/avx512.h says what is emulated: whatever a real CPU might do
otherwise, like its speed, is not shown here.
"""

import importlib.machinery
import importlib.util
import random
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch
from fuzz import build
from layers import CODES, random_layer
from torch import Tensor

from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import BLOCKSIZES, QUANT_TYPES
from tunesmith.ops.tables import TABLES as CODE_VALUES

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
    pytest.mark.skipif(not build.has_avx2(), reason="the emulation needs a CPU with AVX2"),
]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The extension module, with AVX-512 for every CPU."""
    folder = tmp_path_factory.mktemp("emulated_avx512")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    bindings = [build.CSRC / "module.cpp", *sorted((build.CSRC / "bindings").glob("*.cpp"))]
    jobs = {**dict.fromkeys(bindings, includes), **build.kernels(), build.REAL_POOL: []}
    build.compile_all(folder, jobs, ["-O1", "-fPIC", "-fvisibility=hidden"])
    library = folder / "_native.so"
    objects = [str(build.object_of(folder, source)) for source in jobs]
    build.run(["g++", "-shared", *objects, "-ldl", "-o", str(library)])
    return load(library)


def load(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_native", str(library))
    spec = importlib.util.spec_from_loader("_native", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(params=["avx512", "avx512_bf16", "amx_bf16"])
def isa(request: pytest.FixtureRequest, emulated: ModuleType) -> Iterator[str]:
    emulated.set_isa(request.param)
    yield request.param
    emulated.set_isa("scalar")


def quantized(native: ModuleType, weight: Tensor, blocksize: int, quant_type: str) -> list[Tensor]:
    numel = weight.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-numel // blocksize))
    native.quantize_4bit(
        weight.data_ptr(),
        CODES[weight.dtype],
        numel,
        blocksize,
        CODES[quant_type],
        packed.data_ptr(),
        absmax.data_ptr(),
        None,
    )
    return [packed, absmax]


def dequantized(
    native: ModuleType,
    parts: list[Tensor],
    numel: int,
    blocksize: int,
    quant_type: str,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> list[Tensor]:
    """Return the bits of each dtype; the scales are nested if there are four parts."""
    packed, absmax, *nested = parts
    out = []
    for dtype in dtypes:
        values = torch.empty(numel, dtype=dtype)
        native.dequantize_4bit(
            packed.data_ptr(),
            absmax.data_ptr(),
            *([part.data_ptr() for part in nested] or [0, 0]),
            numel,
            blocksize,
            CODES[quant_type],
            CODES[dtype],
            values.data_ptr(),
            None,
        )
        out.append(values.view(torch.uint8))
    return out


def midpoints(quant_type: str) -> Tensor:
    values = CODE_VALUES[quant_type][0].sort().values
    middle = (values[:-1] + values[1:]) / 2
    one = torch.ones(())
    return torch.cat([one[None], middle, middle.nextafter(one), middle.nextafter(-one)])


def test_every_instruction_set_is_there(emulated: ModuleType) -> None:
    assert emulated.isas() == ["amx_bf16", "avx512_bf16", "avx512", "avx2", "scalar"]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_values_have_the_bits_of_the_scalar_kernels(
    emulated: ModuleType, isa: str, dtype: torch.dtype, quant_type: str
) -> None:
    choose = random.Random(1)
    for seed in range(60):
        numel = choose.choice((choose.randint(1, 600), choose.randint(1, 9000)))
        blocksize = choose.choice(BLOCKSIZES)
        scale = 10.0 ** choose.uniform(-45, 4)  # down to denormals and zeros
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn(numel, generator=generator) * scale).to(dtype)
        if seed % 3 == 0:  # where the code changes, and right beside
            weight = midpoints(quant_type).repeat(numel // 46 + 1)[:numel].to(dtype)
        results = []
        for name in ("scalar", isa):
            emulated.set_isa(name)
            parts = quantized(emulated, weight, blocksize, quant_type)
            codes = torch.arange(parts[1].numel()).mul(7).to(torch.uint8)
            nested = [torch.rand(-(-len(codes) // 256), generator=generator.manual_seed(seed))]
            nested += [torch.tensor(0.25)]
            results.append(
                parts
                + dequantized(emulated, parts, numel, blocksize, quant_type)
                + dequantized(emulated, [parts[0], codes, *nested], numel, blocksize, quant_type)
            )
        for scalar, ours in zip(*results, strict=True):
            assert torch.equal(scalar, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_too_large_for_the_caches_has_the_bits_of_the_scalar_kernels(
    emulated: ModuleType, isa: str, dtype: torch.dtype
) -> None:
    numel = (1 << 24) // dtype.itemsize + 101
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, ((numel + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.randn(-(-numel // 4096), generator=generator)
    results = []
    for name in ("scalar", isa):
        emulated.set_isa(name)
        results.append(dequantized(emulated, [packed, absmax], numel, 4096, "nf4", [dtype])[0])
    assert torch.equal(*results)


# tokens, in_features, out_features: few tokens, several groups of codes for one tile of them, rows
# that begin at an odd element, more tokens than are multiplied at once, a depth of several blocks
SHAPES = [
    *((1, 64, 33), (2, 192, 7), (3, 128, 40), (4, 320, 20), (5, 64, 1), (8, 576, 30)),
    *((9, 128, 96), (33, 256, 25), (17, 384, 64), (64, 64, 65)),
    *((5, 512, 130), (16, 384, 64)),
    *((1, 1, 1), (7, 33, 5), (16, 65, 100), (31, 7, 97), (2, 63, 64)),
    *((530, 5, 3), (1100, 2, 9), (6, 1030, 4), (3, 5, 700)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_linear_layer_and_its_gradients_are_those_of_the_formula(
    emulated: ModuleType, isa: str, dtype: torch.dtype
) -> None:
    for number, shape in enumerate(SHAPES):
        for seed in (number, 100 + number, 200 + number):
            layer = random_layer(*shape, seed=seed, dtype=dtype)
            y, s = layer.forward(emulated)
            layer.assert_output_close(y, s, isa)
            generator = torch.Generator().manual_seed(seed)
            grad_y = torch.randn(y.shape, generator=generator).to(dtype)
            grads = layer.backward(emulated, s, grad_y)
            layer.assert_gradients_close(grads, s, grad_y, isa)
