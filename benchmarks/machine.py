"""Where a result comes from: the machine, its load, the versions."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tunesmith.ops import native_status
from tunesmith.ops.machine import cpu_flags

__all__ = ["describe", "last_level_cache", "slug", "versions"]

_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
_PACKAGES = ("tunesmith", "torch", "bitsandbytes", "peft", "torchao", "transformers", "kernels")


def describe(device: str) -> dict[str, object]:
    """Return what there is to know about the machine, in names and numbers."""
    flags = cpu_flags()
    found: dict[str, object] = {
        "cpu": _cpu_model(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "last_level_cache_mib": round(last_level_cache() / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "device": device,
    }
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        found["gpu"] = card.name
        found["gpu_memory_gib"] = round(card.total_memory / 2**30, 1)
        found["compute_capability"] = f"{card.major}.{card.minor}"
        found["cuda"] = torch.version.cuda or ""
    return found


def versions() -> dict[str, str]:
    """Return the versions of all who take part; "not installed" is one, too."""
    found = {name: _version(name) for name in _PACKAGES}
    found["torch"] = torch.__version__
    found["native"] = str(native_status())
    return found


def slug(machine: dict[str, object]) -> str:
    """Return the machine as a part of a file name."""
    name = f"{machine.get('gpu') or machine['cpu']} {machine['threads']}t"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def last_level_cache() -> int:
    """Return the bytes of the first core's largest cache, as Linux lists it; 32 MiB elsewhere."""
    sizes = [32 << 20]
    found = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    if found:
        units = {"K": 1 << 10, "M": 1 << 20}
        texts = [path.read_text(encoding="ascii").strip() for path in found]
        sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[-1] in units]
    return max(sizes)


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    if named is None:
        return platform.machine()
    # virtual machines hide the model behind a brand; family and model tell it all the same
    numbers = re.findall(r"^(?:cpu family|model)\s*:\s*(\d+)$", text, flags=re.MULTILINE)[:2]
    suffix = f" (family {numbers[0]}, model {numbers[1]})" if len(numbers) == 2 else ""
    return named[1].strip() + suffix


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
