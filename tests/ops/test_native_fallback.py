"""Without kernels the ops run in PyTorch, and say so once."""

import os
import subprocess
import sys

PROGRAM = """
import logging, sys
{before}
logging.basicConfig(stream=sys.stdout, format="LOG %(levelname)s %(name)s %(message)s")
import torch
from tunesmith.ops import dequantize_nf4, four_bit, native_status, quantize_nf4
from tunesmith import ops
weight = torch.arange(-64, 64).float()
w = quantize_nf4(weight)
print("STATUS", native_status())
print("SAME", torch.equal(w.packed, four_bit.reference_quantize_4bit(weight, 64, "nf4")[0]))
print("BACK", (dequantize_nf4(w) - weight).abs().max().item() < 10)
"""


def run(before: str = "", **env: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TUNESMITH_NATIVE"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(before=before)],
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_tunesmith_native_0_switches_the_kernels_off_with_one_log_line() -> None:
    log, status, same, back = run(TUNESMITH_NATIVE="0")
    said = "native kernels: not in use (switched off by TUNESMITH_NATIVE=0); the ops run in PyTorch"
    assert log == f"LOG WARNING tunesmith {said}"
    assert status == f"STATUS {said}"
    assert (same, back) == ("SAME True", "BACK True")


def test_a_missing_build_is_told_in_one_log_line_with_its_reason() -> None:
    log, status, same, back = run("sys.modules['tunesmith._native'] = None")
    assert log.startswith("LOG WARNING tunesmith native kernels: not in use (not built: ")
    assert log.endswith("; the ops run in PyTorch")
    assert status == "STATUS " + log.removeprefix("LOG WARNING tunesmith ")
    assert (same, back) == ("SAME True", "BACK True")


def test_importing_tunesmith_imports_no_torch() -> None:
    code = "import sys, tunesmith, tunesmith.errors; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
