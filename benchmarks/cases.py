"""What is measured: suites, shapes, numbers of tokens, dtypes."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch

__all__ = ["DTYPES", "RANK", "SUITES", "Case", "cases_of"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANK = 16

SUITES = {
    "quantize": "a weight to NF4, blocks of 64, nested scales",
    "dequantize": "NF4 to a fresh tensor at each call, dropped before the next",
    "linear": "y = x Wt as in training: grad mode on, x requires a gradient",
    "lora": f"forward and backward of a linear layer with LoRA r={RANK}: y, dX, dA, dB",
    "decode": "y = x Wt in inference mode, weights taken in turn so that caches do not hold them",
    "isa": "our kernels under several instruction sets, one process each, in turn",
}

_SQUARE = (4096, 4096)
_WIDE = (14336, 4096)
# the linear layers of SmolLM2-135M
_SMALL = ((576, 576), (1536, 576), (576, 1536), (192, 576))
_SHAPES = (_SQUARE, _WIDE, *_SMALL)


@attrs.frozen
class Case:
    """One thing to measure; all contestants get the same."""

    suite: str
    """A name in SUITES."""
    shape: tuple[int, int]
    """Of the weight: [out_features, in_features]."""
    dtype: str
    """Of the weight before it is quantized, of x, y and dequantized values; a name in DTYPES."""
    tokens: int = 0
    """Rows of x; 0 where there is no x."""
    adapter: bool = False
    """Whether a LoRA adapter is on the layer."""
    op: str = attrs.field()
    """What is done: a suite's name; differs from `suite` only in suite isa."""

    @op.default
    def _same_as_suite(self) -> str:
        return self.suite

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return DTYPES[self.dtype]

    @property
    def key(self) -> str:
        """One line that names the case."""
        words = [self.suite, *([self.op] if self.op != self.suite else ())]
        words.append(f"{self.shape[0]}x{self.shape[1]}")
        if self.tokens:
            words.append(f"M={self.tokens}")
        words.append(self.dtype)
        if self.adapter and self.op == "decode":
            words.append("+LoRA")
        return " ".join(words)


def cases_of(
    suite: str, dtypes: Iterable[str], quick: bool = False, device: str = "cpu"
) -> list[Case]:
    """Return a suite's cases; `quick` takes a few small ones. Neighbours share a weight."""
    tokens: tuple[int, ...]
    on_cpu = device == "cpu"
    if suite in ("quantize", "dequantize"):
        shapes: tuple[tuple[int, int], ...] = (_SQUARE,)
        if not quick and (suite == "quantize" or not on_cpu):
            shapes = (_SQUARE, _WIDE)
        return [Case(suite, shape, dtype) for shape in shapes for dtype in dtypes]
    if suite == "isa":
        return _isa_cases(dtypes, quick) if on_cpu else []
    shapes = (_SQUARE, _SMALL[0]) if quick else _SHAPES
    if suite == "linear":
        tokens = (16, 512) if quick else (1, 4, 16, 64, 512, 2048)
    elif suite == "lora":
        tokens = (16, 512) if quick else (16, 64, 512, 2048, *(() if on_cpu else (4096,)))
    else:
        tokens = (1, 4) if quick else (1, 4, 16)
    adapters = {"linear": (False,), "lora": (True,), "decode": (False, True)}[suite]
    return [
        Case(suite, shape, dtype, tokens=count, adapter=adapter)
        for shape in shapes
        for dtype in dtypes
        for adapter in adapters
        for count in tokens
    ]


def _isa_cases(dtypes: Iterable[str], quick: bool) -> list[Case]:
    cases = []
    for dtype in dtypes:
        cases += [
            Case("isa", _SQUARE, dtype, op="quantize"),
            Case("isa", _SQUARE, dtype, op="dequantize"),
        ]
        for tokens in (16,) if quick else (16, 512):
            cases.append(Case("isa", _SQUARE, dtype, tokens=tokens, op="linear"))
            cases.append(Case("isa", _SQUARE, dtype, tokens=tokens, adapter=True, op="lora"))
    return cases
