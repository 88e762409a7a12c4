"""Where a run computes and in what: the device and precision that "auto" means here."""

from __future__ import annotations

import os

import attrs

from tunesmith.errors import OptionError

__all__ = ["Device", "find_device"]


@attrs.frozen
class Device:
    """Where a run computes, and in what."""

    name: str
    """A torch device string."""
    precision: str
    """"fp32", "bf16" or "fp16"."""
    description: str
    memory_bytes: int
    """Memory of the device, or of the machine for the CPU."""


def find_device(name: str, precision: str) -> Device:
    """Return the device and precision that "auto" means here, or check the ones named.

    bf16 is taken where the hardware multiplies it (CUDA from Ampere on, CPUs with AVX512-BF16 or
    AMX), fp16 on older CUDA devices, fp32 elsewhere. Errors: `OptionError`.
    """
    import torch

    from tunesmith.ops.machine import check_environment, cpu_multiplies_bf16

    check_environment()
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            [
                "device 'cuda': this torch sees no CUDA device; use device='cpu', or install a "
                "CUDA build of torch and check the driver"
            ]
        )
    if kind not in ("cpu", "cuda", "mps"):
        raise OptionError([f"device '{name}': expected auto, cpu, cuda, cuda:N or mps"])
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise OptionError([f"precision '{precision}': expected auto, fp32, bf16 or fp16"])
    if precision == "fp16" and kind == "cpu":
        raise OptionError(["precision 'fp16': a CPU trains in fp32 or bf16; choose one of them"])
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(name))
        fitting = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        description, memory = properties.name, properties.total_memory
    else:
        fitting = "bf16" if kind == "cpu" and cpu_multiplies_bf16() else "fp32"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        description = (
            f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        )
    return Device(name, fitting if precision == "auto" else precision, description, memory)
