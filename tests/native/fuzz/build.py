"""Compiles csrc/cpu as the tests need it, and with it the fuzz targets of this folder.

python tests/native/fuzz/build.py FOLDER               then  FOLDER/linear --executions 100000
python tests/native/fuzz/build.py FOLDER --libfuzzer   then  FOLDER/linear CORPUS  (needs clang)
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tunesmith.ops.machine import cpu_flags

FUZZ = Path(__file__).resolve().parent
EMULATED_AVX512 = FUZZ.parent / "emulation" / "avx512.h"
CSRC = FUZZ.parents[2] / "csrc"
REAL_POOL = CSRC / "cpu" / "pool.cpp"
EXACT_POOL = FUZZ / "exact_pool.cpp"
DRIVER = FUZZ / "main.cpp"

TARGETS = (
    "quantize",
    "dequantize",
    "linear",
    "linear_backward",
    "attention",
    "decoder_layer",
    "elementwise",
    "gradients",
    "logps",
    "pool",
)

# -ffp-contract=off as in CMakeLists.txt; the rest of the warnings are CMake's business
COMMON = ("-std=c++17", "-ffp-contract=off", "-Wno-psabi")
SANITIZED = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)

SMALLER = (
    ("product.h", "kTokens = 512", "kTokens = 64"),
    ("product.h", "kTokensOfFewRows = 128", "kTokensOfFewRows = 20"),
    ("product.h", "kBlockColumns = 256", "kBlockColumns = 64"),
    ("jobs.h", "kLarge = int64_t(1) << 24", "kLarge = int64_t(1) << 9"),
    ("attention.cpp", "kQueries = 128, kKeys = 256", "kQueries = 12, kKeys = 20"),
    ("amx/attention_forward.cpp", "kKeys = 128", "kKeys = 32"),
    ("amx/attention_backward.cpp", "kQueries = 128, kKeys = 64", "kQueries = 64, kKeys = 64"),
)

# the longest to compile first
PORTABLE = (
    "scalar/product",
    "attention",
    "decode_layer",
    "decoder_layer",
    "dispatch",
    "clip_norm",
    "linear",
    "parallel",
    "scalar/kernels",
)
AVX2 = ("avx2/product", "avx2/kernels")
AVX512 = (
    "amx/attention_backward",
    "amx/attention_forward",
    "amx/product",
    "avx512/product_bf16",
    "avx512/product",
    "avx512/kernels",
)


def has_avx2() -> bool:
    """Return whether this CPU runs the AVX2 files, and with them the emulated AVX-512."""
    return platform.machine() == "x86_64" and {"avx2", "fma", "f16c"} <= cpu_flags()


def kernels(csrc: Path = CSRC) -> dict[Path, list[str]]:
    """Return the sources of csrc/cpu but for the pool, each with its flags; AVX-512 is emulated."""
    emulated = f'-DTUNESMITH_EMULATED_AVX512="{EMULATED_AVX512}"'
    x86 = ["-DTUNESMITH_X86", emulated] if has_avx2() else []
    avx2 = [*x86, "-mavx2", "-mfma", "-mf16c"]
    flags = dict.fromkeys((*AVX512, *AVX2), avx2) if has_avx2() else {}
    flags |= dict.fromkeys(PORTABLE, x86)
    return {csrc / "cpu" / f"{name}.cpp": flag for name, flag in flags.items()}


def object_of(folder: Path, source: Path) -> Path:
    """Return where the object of a source goes."""
    return folder / f"{source.parent.name}_{source.stem}.o"


def compile_all(
    folder: Path, jobs: dict[Path, list[str]], flags: Sequence[str], compiler: str = "g++"
) -> None:
    """Compile sources to `object_of` each, two at a time."""

    def compile_one(source: Path) -> None:
        command = [compiler, *COMMON, *flags, *jobs[source], "-c", str(source)]
        run([*command, "-o", str(object_of(folder, source))])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, jobs))


def run(command: Sequence[str]) -> None:
    """Run a command; raises RuntimeError with its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def build_targets(folder: Path, *, libfuzzer: bool = False) -> None:
    """Build every target into `folder`, with the address and undefined behaviour sanitizers."""
    compiler = "clang++" if libfuzzer else "g++"
    flags = [*SANITIZED, "-fsanitize=fuzzer-no-link"] if libfuzzer else SANITIZED
    others = [REAL_POOL, EXACT_POOL, *(FUZZ / f"{name}.cpp" for name in TARGETS)]
    if not libfuzzer:
        others.append(DRIVER)
    jobs = kernels(csrc_for_inputs(folder)) | {source: [] for source in others}
    compile_all(folder, jobs, flags, compiler)
    for name in TARGETS:
        objects = objects_of_target(folder, name)
        if libfuzzer:
            objects.remove(object_of(folder, DRIVER))
        link_target(name, objects, folder / name, libfuzzer=libfuzzer)


def csrc_for_inputs(folder: Path) -> Path:
    """Copy csrc to `folder`; what it does for large tensors begins at a size that inputs have."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc, dirs_exist_ok=True)
    for name, old, new in SMALLER:
        source = csrc / "cpu" / name
        text = source.read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
        source.write_text(text.replace(old, new))
    return csrc


def objects_of_target(folder: Path, name: str) -> list[Path]:
    """Return what a target is linked from."""
    pool = REAL_POOL if name == "pool" else EXACT_POOL
    parts = [*kernels(), pool, DRIVER, FUZZ / f"{name}.cpp"]
    return [object_of(folder, part) for part in parts]


def link_target(name: str, objects: list[Path], out: Path, *, libfuzzer: bool = False) -> None:
    """Link one target from its objects."""
    link = ["clang++", "-fsanitize=fuzzer,address,undefined"] if libfuzzer else ["g++", *SANITIZED]
    wrap = ["-Wl,--wrap=mmap,--wrap=munmap"] if name == "pool" else []
    run([*link, *wrap, *map(str, objects), "-ldl", "-lpthread", "-o", str(out)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--libfuzzer", action="store_true", help="let clang's libFuzzer drive")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    build_targets(args.folder, libfuzzer=args.libfuzzer)
