"""Which kernels run is decided at run time: by the CPU, by TUNESMITH_ISA, by what torch loaded."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tunesmith.errors import OptionError
from tunesmith.ops.machine import ISAS, check_environment


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ISA_IN_USE = "from tunesmith import _native; print(_native.isa())"


def test_the_best_instruction_set_is_taken_unless_told_otherwise(native: ModuleType) -> None:
    assert run_python(ISA_IN_USE, TUNESMITH_ISA="") == native.isas()[0]
    for name in native.isas():
        assert run_python(ISA_IN_USE, TUNESMITH_ISA=name) == name


def test_a_setting_that_names_nothing_is_refused(native: ModuleType) -> None:
    for name, value in (("TUNESMITH_ISA", "z80"), ("TUNESMITH_NATIVE", "off")):
        with pytest.raises(OptionError, match=f"{name}={value}: expected"):
            check_environment({name: value})
    refused = run_python(
        "try: import tunesmith.ops\nexcept ValueError as error: print(error)",
        TUNESMITH_ISA="avx1024",
    )
    assert refused.startswith("TUNESMITH_ISA=avx1024: expected one of amx_bf16, avx512_bf16")
    assert native.isas() == [name for name in ISAS if name in native.isas()]


def test_forcing_one_that_is_not_here_is_an_error_and_changes_nothing(native: ModuleType) -> None:
    before = native.isa()
    with pytest.raises(ValueError, match="z80"):
        native.set_isa("z80")
    assert native.isa() == before


def test_the_scalar_kernels_are_always_there(native: ModuleType) -> None:
    assert native.isas()[-1] == "scalar"


def test_without_torch_there_is_no_openmp_and_the_kernels_run_in_one_thread(
    native: ModuleType,
) -> None:
    code = """
import ctypes, sys
from tunesmith import _native
assert "torch" not in sys.modules
n = 64 * 4096
weight = (ctypes.c_float * n)(*[(i % 101 - 50) / 50 for i in range(n)])
packed, absmax = (ctypes.c_ubyte * (n // 2))(), (ctypes.c_float * 4096)()
out = (ctypes.c_float * n)()
at = ctypes.addressof
fp32, nf4 = _native.FLOAT32, _native.NF4
_native.quantize_4bit(at(weight), fp32, n, 64, nf4, at(packed), at(absmax), None)
_native.dequantize_4bit(at(packed), at(absmax), 0, 0, n, 64, nf4, fp32, at(out), None)
print(_native.has_openmp(), max(abs(a - b) for a, b in zip(weight, out)) < 0.16)
"""
    assert run_python(code) == "False True"


def test_torch_s_own_openmp_is_used_and_no_second_one_is_loaded(native: ModuleType) -> None:
    code = """
import torch
def runtimes():
    return sorted({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line})
before = runtimes()
from tunesmith.ops import native_status, quantize_nf4
quantize_nf4(torch.randn(1 << 20))
print(native_status().openmp, runtimes() == before, len(before))
"""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("only Linux lists what a process has loaded")
    assert run_python(code) == "True True 1"


def test_the_module_links_neither_torch_nor_an_openmp_runtime_nor_a_shared_cudart(
    native: ModuleType,
) -> None:
    content = Path(native.__file__ or "").read_bytes()
    for library in (b"libtorch", b"libc10", b"libgomp", b"libomp", b"libiomp", b"libcudart.so"):
        assert library not in content, library


def test_a_stream_without_cuda_kernels_is_an_error_rather_than_a_crash(native: ModuleType) -> None:
    if native.has_cuda():
        pytest.skip("this build has CUDA kernels")
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        native.quantize_4bit(0, native.FLOAT32, 0, 64, native.NF4, 0, 0, 7)
