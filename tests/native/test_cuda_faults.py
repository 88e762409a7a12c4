"""Faults planted in the CUDA kernels are found in emulation, each by what checks the right ones."""

import shutil
from pathlib import Path

import pytest
from emulation.device import CSRC, Device, EmulationError, build
from test_cuda_emulated import (
    ORDERS,
    changed_kernels,
    check_dequantize,
    check_linear,
    check_quantize,
    random,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]


def check(device: Device, kernels: str) -> None:
    for order in ORDERS:
        device.set_order(order)
        if kernels == "quantize":
            for numel in (64 * 11, 64 * 11 + 37):
                check_quantize(device, random(numel), 64, "nf4")
                for misaligned in ("weight", "packed"):
                    check_quantize(device, random(numel), 64, "fp4", misaligned=(misaligned,))
            check_quantize(device, random(1024 * 3 + 1), 1024, "fp4")
        elif kernels == "dequantize":
            for nested in (False, True):
                check_dequantize(device, random(64 * 300 + 37), 64, "nf4", nested)
                half = random(64 * 300 + 37).half()
                for misaligned in ((), ("packed",), ("out",)):
                    check_dequantize(device, half, 64, "fp4", nested, misaligned=misaligned)
        else:
            device.set_multiprocessors(1)
            for tokens in (1, 3, 13):
                check_linear(device, tokens, 2144, 30, nested=True)
                check_linear(device, tokens, 64, 3, misaligned=("x",))
                check_linear(device, tokens, 81, 13)


FAULTS = [
    # nibbles, ranks and scales
    ("quantize", "quantize.cu", "table) << ((4 * e) ^ 4)", "table) << (4 * e)"),
    ("quantize", "quantize.cu", "code_of(i) << 4 | low", "low << 4 | code_of(i)"),
    ("quantize", "quantize.cu", "threadIdx.x < 15", "threadIdx.x < 14"),
    ("quantize", "common.cuh", "offset = lanes / 2", "offset = lanes / 4"),
    ("dequantize", "common.cuh", "word >> ((4 * element) ^ 4)", "word >> (4 * element)"),
    ("dequantize", "common.cuh", "? pair >> 4 : pair & 0xFu", "? pair & 0xFu : pair >> 4"),
    ("dequantize", "common.cuh", "block / kNestedBlocksize", "block / 255"),
    ("dequantize", "dequantize.cu", "kElements >> weight", "2 * kElements >> weight"),
    ("linear_small", "linear_small.cuh", "e % 2 == 0 ? even : odd", "e % 2 == 0 ? odd : even"),
    ("linear_small", "linear_small.cuh", "next[r] >> to_block", "(next[r] + 1) >> to_block"),
    ("linear_small", "linear_small.cuh", "blocksize_log2 - 5", "blocksize_log2 - 4"),
    # ends of buffers, rows and blocks
    ("quantize", "quantize.cu", "i + 1 < end ?", "i < end ?"),
    ("quantize", "quantize.cu", "block < vector_blocks, table", "true, table"),
    ("quantize", "quantize.cu", "by_vectors ? numel / blocksize : 0", "1 + numel / blocksize"),
    ("quantize", "quantize.cu", "blocksize - step + begin; i >= 0", "blocksize - step; i > 0"),
    ("dequantize", "dequantize.cu", "kElements + thread_index()", "kElements + 1 + thread_index()"),
    ("dequantize", "dequantize.cu", "numel / kElements : 0", "numel / kElements + 1 : 0"),
    ("dequantize", "dequantize.cu", "is_aligned(out, 16)", "true"),
    ("dequantize", "dequantize.cu", "is_aligned(weight.codes, kElements / 2)", "true"),
    ("quantize", "quantize.cu", "is_aligned(weight, 16)", "true"),
    ("quantize", "quantize.cu", "is_aligned(packed, 4)", "true"),
    ("linear_small", "linear_small.cu", "blocksize), is_aligned(x, 16)", "blocksize), true"),
    (
        "linear_small",
        "linear_small.cuh",
        "m < linear.tokens && k < linear.in_features) {",
        "true) {",
    ),
    ("linear_small", "linear_small.cuh", "if (left > 0)", "if (left >= 0)"),
    ("linear_small", "linear_small.cuh", "|| row >= linear.out_features", ""),
    ("linear_small", "linear_small.cuh", "first_row + r < linear.out_features ?", "true ?"),
    (
        "linear_small",
        "linear_small.cuh",
        "min(first_row + r, linear.out_features - 1)",
        "(first_row + r)",
    ),
    ("linear_small", "linear_small.cu", "linear->in_features % kPiece != 0 ||", ""),
    ("linear_small", "linear_small.cu", "(typename X::Storage);", "(typename X::Storage) - 16;"),
    ("linear_small", "linear_small.cu", "int warp = 1", "int warp = 2"),
    # barriers
    ("quantize", "quantize.cu", "__syncthreads();", ""),
    ("dequantize", "dequantize.cu", "__syncthreads();", ""),
    ("linear_small", "linear_small.cuh", "if (first > 0) __syncthreads();", ""),
    ("linear_small", "linear_small.cuh", "    }\n    __syncthreads();", "    }"),
    ("linear_small", "linear_small.cu", "= sum;\n  __syncthreads();", "= sum;"),
]


@pytest.mark.parametrize(("kernels", "file", "right", "wrong"), FAULTS)
def test_a_planted_fault_is_found(
    tmp_path: Path, kernels: str, file: str, right: str, wrong: str
) -> None:
    cuda = changed_kernels(tmp_path, file, right, wrong)
    device = Device(build(tmp_path, [cuda / f"{kernels}.cu"]))
    with pytest.raises((AssertionError, EmulationError)):
        check(device, kernels)


@pytest.mark.parametrize("kernels", ["quantize", "dequantize", "linear_small"])
def test_nothing_is_found_where_no_fault_was_planted(tmp_path: Path, kernels: str) -> None:
    check(Device(build(tmp_path, [CSRC / "cuda" / f"{kernels}.cu"])), kernels)
