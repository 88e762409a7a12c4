"""Mixing: one LoRA adapter whose update is the weighted sum of those of several.

The update of an adapter is s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA. The sum of
several is again a product: of [w1 s1 B1, w2 s2 B2, ...] and [A1; A2; ...], whose rank is the sum of
their ranks. That is exact. To add up the A and the B apart is not: (B1 + B2)(A1 + A2) has terms
that are in neither. A smaller rank is had by the singular value decomposition of the sum, which
gives the nearest of that rank (Eckart and Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.errors import ModelError, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["mix_loras"]

_PREFIX = "base_model.model."
_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@attrs.frozen(eq=False)
class _Factors:
    """The update of one weight by one adapter: of each expert apart, where it is of several."""

    a: Tensor
    """[experts, r, in ...]; one expert for a weight that is no stack."""
    b: Tensor
    """[out, r, experts ...]; scaled and weighted."""

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def mix_loras(adapters: Sequence[tuple[Path, float]], directory: Path, *, rank: int | None) -> None:
    """Write a LoRA adapter whose update is the sum of those in other directories, each times a
    weight; `rank` cuts it, and None keeps all of it.

    All are of one base, in PEFT's format, as the result is, which has alpha equal to r. Errors:
    `ModelError` for an adapter that is no LoRA, or of which something is trained that no sum of
    updates holds: magnitudes (DoRA), biases, whole modules.
    """
    configs = [_config(place) for place, _ in adapters]
    found: dict[str, list[_Factors]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for (place, weight), config in zip(adapters, configs, strict=True):
        for name, factors, dtype in _factors(place, config, weight):
            found.setdefault(name, []).append(factors)
            dtypes.setdefault(name, dtype)
    summed = {name: _sum(parts, name) for name, parts in found.items()}
    if rank is not None:
        summed = {name: _cut(each, rank) for name, each in summed.items()}
    width = max(each.rank for each in summed.values())
    tensors: dict[str, Tensor] = {}
    for name, each in summed.items():
        a, b = (part.to(dtypes[name]) for part in (_padded(each.a, width), _padded(each.b, width)))
        first = next(suffix for suffix in _PAIRS if name.endswith(suffix))
        tensors[name] = a.reshape(-1, *a.shape[2:]).contiguous()
        second = name.removesuffix(first) + _PAIRS[first]
        tensors[second] = b.reshape(b.shape[0], -1, *b.shape[3:]).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    _mixed(configs, summed, width).save_pretrained(str(directory))


def _config(place: Path) -> LoraConfig:
    config = PeftConfig.from_pretrained(str(place), local_files_only=True)
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"adapter {place}: is of the kind {config.peft_type}; only LoRA adapters are mixed"
        )
    return config


def _factors(
    place: Path, config: LoraConfig, weight: float
) -> Iterator[tuple[str, _Factors, torch.dtype]]:
    """Yield the name of each A, the factors of its update in fp64, and the dtype of the file."""
    tensors = {
        name: tensor
        for name, tensor in load_file(place / SAFETENSORS_WEIGHTS_NAME).items()
        if not name.endswith(".base_layer.weight")  # the base's, which PEFT keeps of an embedding
    }
    pairs = [
        (name, name.removesuffix(first) + second)
        for name in tensors
        for first, second in _PAIRS.items()
        if name.endswith(first)
    ]
    if left := tensors.keys() - {name for pair in pairs for name in pair}:
        raise ModelError(
            f"adapter {place}: holds {listed(sorted(left)[:3])}, which cannot be mixed: only the "
            "two matrices of a LoRA can, and no magnitudes (dora=True), biases or whole modules"
        )
    for first, second in pairs:
        a, b = tensors[first].double(), tensors[second].double()
        module = _module(first)
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern, module), config.lora_alpha
        )
        scale = alpha / (math.sqrt(r) if config.use_rslora else r)
        yield (
            first,
            _Factors(
                a.reshape(-1, r, *a.shape[1:]),
                weight * scale * b.reshape(b.shape[0], r, -1, *b.shape[2:]),
            ),
            tensors[first].dtype,
        )


def _sum(parts: Sequence[_Factors], name: str) -> _Factors:
    shapes = {(each.a.shape[:1], each.a.shape[2:], each.b.shape[:1]) for each in parts}
    if len(shapes) > 1:
        raise ModelError(
            f"{name}: the adapters are for weights of other shapes; they are of different bases"
        )
    return _Factors(
        torch.cat([each.a for each in parts], 1), torch.cat([each.b for each in parts], 1)
    )


def _cut(whole: _Factors, rank: int) -> _Factors:
    """Return the nearest product of a lower rank, of each expert apart."""
    if whole.rank <= rank:
        return whole
    lows: list[Tensor] = []
    highs: list[Tensor] = []
    for expert, a in enumerate(whole.a.flatten(2).unbind(0)):
        b = whole.b[:, :, expert].reshape(whole.b.shape[0], whole.rank)
        # of the small matrix between the two orthonormal ones, and not of the whole update
        q_out, r_out = torch.linalg.qr(b)
        q_in, r_in = torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(r_out @ r_in.T)
        root = s[:rank].sqrt()
        highs.append((q_out @ u[:, :rank]) * root)
        lows.append(root[:, None] * (v[:rank] @ q_in.T))
    rest = whole.b.shape[3:]
    a = torch.stack(lows).reshape(len(lows), -1, *whole.a.shape[2:])
    b = torch.stack(highs, 2)
    return _Factors(a, b.reshape(*b.shape, *rest))


def _padded(part: Tensor, width: int) -> Tensor:
    """Return a factor with zeros up to a rank, which is its second dimension."""
    missing = part.new_zeros(part.shape[0], width - part.shape[1], *part.shape[2:])
    return torch.cat([part, missing], 1)


def _mixed(configs: Sequence[LoraConfig], summed: Mapping[str, _Factors], width: int) -> LoraConfig:
    parameters = sorted({name for config in configs for name in config.target_parameters or ()})
    stacks = {name.rpartition(".")[0] for name in parameters}
    modules = sorted({_module(name) for name in summed})
    plain = [name for name in modules if not any(_ends(name, stack) for stack in stacks)]
    first: Any = configs[0]
    made = LoraConfig(
        r=width,
        lora_alpha=width,
        lora_dropout=first.lora_dropout,
        target_modules=plain,
        target_parameters=parameters or None,
        fan_in_fan_out=first.fan_in_fan_out,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
    )
    made.inference_mode = True
    return made


def _module(name: str) -> str:
    """Return the name of the module that a tensor of an adapter is for."""
    suffix = next(each for each in _PAIRS if name.endswith(each))
    return name.removeprefix(_PREFIX).removesuffix(suffix).replace(".base_layer", "")


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
