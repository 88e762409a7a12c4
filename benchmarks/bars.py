"""What we promise, as data: `python -m benchmarks --check` fails where it does not hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import attrs

from benchmarks.cases import Case
from benchmarks.measure import Spread

__all__ = ["BARS", "CUDA_BARS", "NOT_ASKED", "Bar", "Verdict", "bars_of", "judge"]

NOT_ASKED = "not run: not among the cases of this run"
_OP = ("ours",)
_LINEAR_OP = ("ours (op)",)
_LAYER = ("ours (layer)", *_LINEAR_OP)
_PEFT_BNB = (
    "PEFT + bitsandbytes, fp32 adapters",
    "PEFT + bitsandbytes, autocast",
    "PEFT + bitsandbytes, 16-bit adapters",
)
_PEFT_BF16 = (
    "PEFT, bf16 base, fp32 adapters",
    "PEFT, bf16 base, autocast",
    "PEFT, bf16 base, bf16 adapters",
)
_SQUARE = (4096, 4096)
_WIDE = (14336, 4096)


@attrs.frozen
class Bar:
    """Ours must be so many times as fast as the fastest of theirs, in one run."""

    name: str
    case: Case
    ours: tuple[str, ...]
    """The first of these that ran is judged."""
    theirs: tuple[str, ...]
    at_least: float
    """Their time over ours."""


@attrs.frozen
class Verdict:
    """What became of a bar."""

    name: str
    at_least: float
    measured: float | None = None
    """The median of the rounds' ratios; None if it was not run."""
    passed: bool | None = None
    note: str = ""
    """Who was compared with whom, or why it was not run."""


class _Result(Protocol):
    """What is asked of a CaseResult."""

    @property
    def case(self) -> Case: ...
    @property
    def not_run(self) -> dict[str, str]: ...
    def ratio(self, theirs: str, ours: str) -> Spread | None: ...


def _linear(tokens: int, dtype: str, at_least: float) -> Bar:
    case = Case("linear", _SQUARE, dtype, tokens=tokens)
    name = f"NF4 linear forward, M={tokens}, {dtype}: bitsandbytes in training"
    return Bar(name, case, _LAYER, ("bitsandbytes",), at_least)


def _lora(tokens: int, dtype: str, at_least: float, shape: tuple[int, int] = _SQUARE) -> Bar:
    case = Case("lora", shape, dtype, tokens=tokens, adapter=True)
    of_shape = "" if shape == _SQUARE else f", {shape[0]}x{shape[1]}"
    name = f"NF4 + LoRA, both ways, M={tokens}, {dtype}{of_shape}: PEFT + bitsandbytes"
    return Bar(name, case, _LAYER, _PEFT_BNB, at_least)


def _decode(tokens: int, adapter: bool, at_least: float) -> Bar:
    case = Case("decode", _SQUARE, "bf16", tokens=tokens, adapter=adapter)
    base, theirs = ("+ LoRA", "PEFT + bitsandbytes") if adapter else ("linear", "bitsandbytes")
    name = f"NF4 {base}, decode, M={tokens}, bf16: {theirs}, packed"
    return Bar(name, case, _LAYER, (f"{theirs}, packed",), at_least)


def _isa(case: Case) -> Bar:
    tokens = f", M={case.tokens}" if case.tokens else ""
    name = f"AVX2 forced, {case.op}{tokens}, {case.dtype}: AVX-512"
    return Bar(name, case, ("ours, avx2",), ("ours, avx512",), 0.4)


BARS: tuple[Bar, ...] = (
    Bar(
        "quantize 4096x4096, bf16, nested: bitsandbytes",
        Case("quantize", _SQUARE, "bf16"),
        _OP,
        ("bitsandbytes",),
        20.0,
    ),
    Bar(
        "dequantize 4096x4096 to bf16: bitsandbytes",
        Case("dequantize", _SQUARE, "bf16"),
        _OP,
        ("bitsandbytes",),
        5.0,
    ),
    Bar(
        "dequantize 4096x4096 to bf16: share of copy bandwidth",
        Case("dequantize", _SQUARE, "bf16"),
        _OP,
        ("copy",),
        0.7,
    ),
    *(
        _linear(tokens, dtype, at_least)
        for dtype in ("bf16", "fp32")
        for tokens, at_least in ((512, 1.15), (64, 2.5), (16, 5.0))
    ),
    *(
        _lora(tokens, dtype, at_least)
        for dtype in ("bf16", "fp32")
        for tokens, at_least in ((512, 1.35), (64, 3.0), (16, 5.0))
    ),
    Bar(
        "NF4 + LoRA, both ways, M=512, bf16: PEFT on a bf16 base",
        Case("lora", _SQUARE, "bf16", tokens=512, adapter=True),
        _LAYER,
        _PEFT_BF16,
        1.0,
    ),
    *(
        _decode(tokens, adapter, at_least)
        for adapter in (False, True)
        for tokens, at_least in ((1, 1.0), (4, 1.5), (16, 1.5))
    ),
    *(
        _isa(Case("isa", _SQUARE, "bf16", tokens=tokens, adapter=op == "lora", op=op))
        for op, tokens in (("quantize", 0), ("dequantize", 0), ("linear", 16), ("linear", 512))
    ),
    _isa(Case("isa", _SQUARE, "bf16", tokens=512, adapter=True, op="lora")),
)


def _cuda_bars(shape: tuple[int, int]) -> tuple[Bar, ...]:
    size = f"{shape[0]}x{shape[1]}"
    dequantize = Case("dequantize", shape, "bf16")
    decode = Case("decode", shape, "bf16", tokens=1)
    with_adapter = attrs.evolve(decode, adapter=True)
    return (
        Bar(f"dequantize {size} to bf16: bitsandbytes", dequantize, _OP, ("bitsandbytes",), 2.0),
        Bar(f"dequantize {size} to bf16: share of a copy's pace", dequantize, _OP, ("copy",), 0.85),
        _lora(4096, "bf16", 1.3, shape),
        Bar(
            f"decode {size}, M=1, bf16: share of a copy's pace", decode, _LINEAR_OP, ("copy",), 0.6
        ),
        Bar(
            f"decode {size} + LoRA, M=1, bf16: share of a copy's pace",
            with_adapter,
            _LINEAR_OP,
            ("copy",),
            0.6,
        ),
    )


CUDA_BARS: tuple[Bar, ...] = (*_cuda_bars(_SQUARE), *_cuda_bars(_WIDE))


def bars_of(device: str) -> tuple[Bar, ...]:
    """Return what we promise on that device."""
    return CUDA_BARS if device.startswith("cuda") else BARS


def judge(bars: Iterable[Bar], results: Sequence[_Result]) -> list[Verdict]:
    """Return what became of each bar."""
    by_case = {result.case: result for result in results}
    return [_verdict(bar, by_case.get(bar.case)) for bar in bars]


def _verdict(bar: Bar, result: _Result | None) -> Verdict:
    if result is None:
        return Verdict(bar.name, bar.at_least, note=NOT_ASKED)
    for ours in bar.ours:
        found = {theirs: result.ratio(theirs, ours) for theirs in bar.theirs}
        ratios = {theirs: spread.median for theirs, spread in found.items() if spread is not None}
        if ratios:
            fastest = min(ratios, key=lambda name: ratios[name])
            measured = ratios[fastest]
            note = f"{fastest} / {ours}"
            return Verdict(bar.name, bar.at_least, measured, measured >= bar.at_least, note)
    reasons = (
        f"{name}: {result.not_run[name]}"
        for name in (*bar.ours, *bar.theirs)
        if name in result.not_run
    )
    return Verdict(bar.name, bar.at_least, note="not run: " + next(reasons, "no one to compare"))
