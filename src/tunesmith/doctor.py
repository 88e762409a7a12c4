"""What `tunesmith doctor` finds: versions, kernels, devices, and what is missing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from tunesmith.units import byte_size

__all__ = ["examine"]

OPTIONAL = {
    "bitsandbytes": ('quantize("bitsandbytes") and 8-bit optimizers', "tunesmith[bitsandbytes]"),
    "trl": ("trainers built on TRL", "tunesmith[trl]"),
    "gguf": ("reading .gguf files", "tunesmith[gguf]"),
    "tensorboard": ('loggers=("tensorboard",)', "tunesmith[tensorboard]"),
    "wandb": ('loggers=("wandb",)', "tunesmith[wandb]"),
}


def examine() -> tuple[str, bool]:
    """Return the report as text, and whether everything that is required is there."""
    lines = ["packages"]
    healthy = True
    for name in _required():
        found = _installed(name)
        if found is None:
            healthy = False
            lines.append(f"  {name:<14} MISSING: pip install {name}")
        else:
            lines.append(f"  {name:<14} {found}")
    lines.append("optional packages")
    for name, (purpose, extra) in OPTIONAL.items():
        found = _installed(name)
        missing = f"not installed, for {purpose}: pip install '{extra}'"
        lines.append(f"  {name:<14} {found or missing}")
    lines += _machine()
    lines += _plugins()
    lines.append("all that is required is there" if healthy else "something required is missing")
    return "\n".join(lines), healthy


def _machine() -> list[str]:
    lines = [
        "machine",
        f"  python         {platform.python_version()} on {platform.platform()}",
        f"  processors     {os.cpu_count()}",
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines.append(f"  memory         {byte_size(memory)}")
    try:
        import torch
    except ImportError as error:
        lines.append(f"  torch          cannot be imported: {error}")
        return lines
    from tunesmith.engine.models import cache_directory
    from tunesmith.ops import native_status
    from tunesmith.ops.machine import cpu_multiplies_bf16

    lines.append(f"  torch CPU      {torch.backends.cpu.get_cpu_capability()}, ")
    lines[-1] += f"{torch.get_num_threads()} threads, bf16 products " + (
        "in hardware" if cpu_multiplies_bf16() else "by conversion (auto precision takes fp32)"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(
                f"  cuda:{index}         {properties.name}, "
                f"{byte_size(properties.total_memory)}, "
                f"compute {properties.major}.{properties.minor}"
            )
    else:
        built = torch.version.cuda
        lines.append(
            "  cuda           no device is visible"
            + ("" if built else "; this torch is a CPU build, install a CUDA build to use a GPU")
        )
    status = native_status()
    lines.append(f"  {status}")
    if not status.loaded:
        lines.append("      build it with: pip install --force-reinstall --no-deps tunesmith")
    cache = cache_directory()
    lines.append(f"  cache          {cache}{'' if Path(cache).exists() else ' (empty)'}")
    return lines


def _plugins() -> list[str]:
    from tunesmith.plugin.registry import registry
    from tunesmith.plugin.spec import KINDS

    found = registry()
    counts = ", ".join(f"{len(found.of_kind(kind))} {kind}" for kind in KINDS)
    lines = ["plugins", f"  {counts}"]
    for broken in found.broken:
        lines.append(f"  broken: {broken.distribution} {broken.version}: {broken.problem}")
    return lines


def _required() -> list[str]:
    """Return the names of the packages that this distribution requires."""
    names = []
    for requirement in requires("tunesmith") or ():
        if "extra ==" not in requirement:
            names.append(
                "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]
            )
    return names


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
