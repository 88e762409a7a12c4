"""No input makes a CPU kernel read or write beside its memory, or give a wrong number.

Each target of this folder draws sizes, types and numbers from its input, runs every instruction set
(AVX-512 in emulation) under the address and undefined behaviour sanitizers, and compares with a
plain loop. An execution is one input through one instruction set.
"""

import ctypes.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
from fuzz import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

HAS_OPENMP = ctypes.util.find_library("gomp") is not None


@attrs.frozen
class Job:
    """One process: a target and how long it runs."""

    target: str
    executions: int
    seed: int
    openmp: bool = False
    pool_mb: str | None = None

    def failure(self, folder: Path) -> str:
        """Run it; return what went wrong, or nothing."""
        command = [str(folder / self.target), "--executions", str(self.executions)]
        command += ["--seed", str(self.seed), *(["--openmp"] if self.openmp else [])]
        # more threads than cores should not wait for each other by spinning
        env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        env.pop("TUNESMITH_POOL_MB", None)
        if self.pool_mb is not None:
            env["TUNESMITH_POOL_MB"] = self.pool_mb
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode == 0 and int(done.stdout.split()[0]) >= self.executions:
            return ""
        return f"{self}\n{done.stdout}{done.stderr}"


def jobs(executions: dict[str, int]) -> list[Job]:
    """Share so many executions of each target among ways to run it; the longest jobs first."""
    out = []
    for target, count in executions.items():
        if target == "pool":
            limits = (None, "0", "1")
            out += [Job(target, -(-count // 3), seed=1, pool_mb=limit) for limit in limits]
        else:
            with_openmp = count // 4 if HAS_OPENMP else 0
            out.append(Job(target, count - with_openmp, seed=1))
            if with_openmp:
                out.append(Job(target, with_openmp, seed=2, openmp=True))
    return out


def failures(folder: Path, executions: dict[str, int]) -> str:
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: job.failure(folder), jobs(executions))
    return "\n".join(filter(None, found))


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    build.build_targets(folder)
    return folder


def test_thousands_of_inputs_to_every_kernel_are_handled(targets: Path) -> None:
    # one of attention is dozens of products
    executions = dict.fromkeys(reversed(build.TARGETS), 3000)
    executions["attention"] = 1500
    assert failures(targets, executions) == ""


@pytest.mark.slow
def test_a_million_executions_are_clean(targets: Path) -> None:
    executions = {
        "linear_backward": 165_000,
        "linear": 165_000,
        "attention": 40_000,
        "pool": 100_000,
        "quantize": 150_000,
        "dequantize": 150_000,
        "decoder_layer": 40_000,
        "elementwise": 80_000,
        "gradients": 45_000,
        "logps": 65_000,
    }
    assert sum(executions.values()) == 1_000_000
    assert failures(targets, executions) == ""


@pytest.mark.parametrize(
    ("target", "file", "old", "new", "said"),
    [
        (
            "dequantize",
            "scalar/kernels.cpp",
            "if (i + 1 < end)",
            "if (i + 1 <= end)",
            "heap-buffer-overflow",
        ),
        (
            "dequantize",
            "scalar/kernels.cpp",
            "job.nested_offset, kDynamic",
            "0.0f, kDynamic",
            "WRONG",
        ),
        (
            "linear",
            "linear.cpp",
            "lora_b();\n    product.alpha2 = linear->scaling",
            "lora_b();\n    product.alpha2 = 1",
            "WRONG",
        ),
        ("attention", "attention.cpp", "into_queries.accumulate = true;", "", "WRONG"),
        (
            "attention",
            "amx/attention_backward.cpp",
            "paired(rounded_grads[0], rounded_grads[1])",
            "paired(rounded_grads[1], rounded_grads[0])",
            "WRONG",
        ),
        (
            "attention",
            "amx/attention_forward.cpp",
            "scale_totals(totals + i, rescale)",
            "scale_totals(totals + i, _mm512_set1_ps(1.0f))",
            "WRONG",
        ),
        ("attention", "softmax.h", "running_out[d] *= rescale;", "", "WRONG"),
        (
            "decoder_layer",
            "decoder_layer.cpp",
            "+ kLine - 1) / kLine * kLine",
            ") / kLine * kLine",
            "AddressSanitizer",
        ),
        ("elementwise", "../formulas.h", "+ 3.0f * kCubic", "+ 2.0f * kCubic", "WRONG"),
        ("gradients", "clip_norm.cpp", "norm + 1e-6f", "norm + 1e-1f", "WRONG"),
        ("logps", "softmax.h", "begin += kSummedAtOnce", "begin += kSummedAtOnce + 1", "WRONG"),
        ("pool", "pool.cpp", "if (size < total ||", "if (", "AddressSanitizer"),
    ],
)
def test_a_fault_in_a_kernel_is_found_and_its_input_printed(
    targets: Path, tmp_path: Path, target: str, file: str, old: str, new: str, said: str
) -> None:
    csrc = build.csrc_for_inputs(tmp_path)
    faulty = csrc / "cpu" / file
    text = faulty.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
    faulty.write_text(text.replace(old, new))
    # what a header says is compiled into the plain C++ of one instruction set, which is enough
    source = faulty if faulty.suffix == ".cpp" else csrc / "cpu" / "scalar/kernels.cpp"

    flags = build.kernels(csrc).get(source, [])
    build.compile_all(tmp_path, {source: flags}, build.SANITIZED)
    changed = build.object_of(tmp_path, source)
    objects = build.objects_of_target(targets, target)
    sound = build.object_of(targets, source)
    build.link_target(
        target, [changed if part == sound else part for part in objects], tmp_path / target
    )
    failure = Job(target, 3000, seed=1).failure(tmp_path)
    assert said in failure
    printed = failure.partition("--input ")[2].split()[0]
    again = subprocess.run(
        [tmp_path / target, "--input", printed], capture_output=True, text=True, check=False
    )
    assert again.returncode != 0
    assert said in again.stderr
