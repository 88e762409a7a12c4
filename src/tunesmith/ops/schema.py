"""What each op is: its schema, what its arguments must be, what comes out, and its derivative.

The ops take flat tensors and plain numbers, so that any device can implement them. Every
implementation calls the `check_*` function of its op first: native code is handed bare pointers and
has no second chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops.dispatch import below_autograd, call, differentiate

__all__ = [
    "BLOCKSIZES",
    "DTYPES",
    "NESTED_BLOCKSIZE",
    "QUANT_TYPES",
    "SMALL_TOKENS",
    "check_absmax",
    "check_finite",
    "check_linear",
    "check_linear_backward",
    "check_packed",
    "check_weight",
    "count_blocks",
    "s_dtype",
    "sum_dtype",
    "word",
]

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""How many weights may share one absmax."""

NESTED_BLOCKSIZE = 256
"""How many absmax share one scale in double quantization."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What can be quantized, and what can be dequantized into."""

QUANT_TYPES = ("nf4", "fp4")
"""The 4-bit types; where a plain weight is possible, too, its type is ""."""


def count_blocks(numel: int, blocksize: int) -> int:
    """Return how many blocks hold `numel` elements; the last may be short."""
    return -(-numel // blocksize)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which s = x Aᵀ is kept for an x of that dtype: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


SMALL_TOKENS = 16
"""Up to this many rows of x, CUDA multiplies with a 4-bit weight without dequantizing it first."""


def s_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of s = x Aᵀ [tokens, rank] as `linear` returns it for x [..., in_features].

    It is `sum_dtype`, but x's own where CUDA has more than a few tokens: there a tensor core sums
    in fp32, and takes and leaves 16 bits.
    """
    if x.device.type == "cuda" and math.prod(x.shape[:-1]) > SMALL_TOKENS:
        return x.dtype
    return sum_dtype(x.dtype)


_WEIGHT = "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset"
_ADAPTER = "Tensor? lora_a, Tensor? lora_b, float scaling, Tensor? keep, float keep_scale"

_SCHEMAS = {
    "quantize_4bit": "(Tensor weight, int blocksize, str quant_type, str name='weight') "
    "-> (Tensor packed, Tensor absmax)",
    "quantize_absmax": "(Tensor absmax) "
    "-> (Tensor codes, Tensor nested_absmax, Tensor nested_offset)",
    "dequantize_4bit": "(Tensor packed, Tensor absmax, Tensor? nested_absmax, "
    "Tensor? nested_offset, SymInt[] shape, int blocksize, str quant_type, ScalarType dtype) "
    "-> Tensor",
    "linear": f"(Tensor x, {_WEIGHT}, int out_features, int blocksize, str quant_type, "
    f"Tensor? bias, {_ADAPTER}) -> (Tensor y, Tensor s)",
    # x and s only for what needs them, so that autograd need not keep them for the rest
    "linear_backward": f"(Tensor grad_y, Tensor? x, Tensor? s, {_WEIGHT}, int in_features, "
    f"int blocksize, str quant_type, {_ADAPTER}, bool need_x, bool need_a, bool need_b) "
    "-> (Tensor grad_x, Tensor grad_a, Tensor grad_b)",
}

for _op, _schema in _SCHEMAS.items():
    torch.library.define(f"tunesmith::{_op}", _schema, tags=torch.Tag.pt2_compliant_tag)


def _fake_quantize_4bit(
    weight: Tensor, blocksize: int, quant_type: str, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(count_blocks(numel, blocksize), dtype=torch.float32)
    return packed, absmax


def _fake_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = absmax.numel()
    codes = absmax.new_empty(blocks, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(count_blocks(blocks, NESTED_BLOCKSIZE))
    return codes, nested_absmax, absmax.new_empty(())


def _fake_dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    keep_scale: float,
) -> tuple[Tensor, Tensor]:
    # a mixture of devices can come here by way of a single tensor on the meta device
    check_linear(
        x, weight, absmax, nested_absmax, nested_offset, out_features, blocksize, quant_type,
        bias, lora_a, lora_b, keep,
    )  # fmt: skip
    rank = 0 if lora_a is None else lora_a.shape[0]
    y = x.new_empty((*x.shape[:-1], out_features))
    s = x.new_empty((math.prod(x.shape[:-1]), rank), dtype=s_dtype(x))
    return y, s


def _fake_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    blocksize: int,
    quant_type: str,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    keep_scale: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_linear_backward(
        grad_y, x, s, weight, absmax, nested_absmax, nested_offset, in_features, blocksize,
        quant_type, lora_a, lora_b, keep, need_a, need_b,
    )  # fmt: skip
    grad_x, grad_a, grad_b = (grad_y.new_empty(0) for _ in range(3))
    if need_x:
        grad_x = grad_y.new_empty((*grad_y.shape[:-1], in_features))
    if lora_a is not None and need_a:
        grad_a = lora_a.new_empty(lora_a.shape)
    if lora_b is not None and need_b:
        grad_b = lora_b.new_empty(lora_b.shape)
    return grad_x, grad_a, grad_b


torch.library.register_fake("tunesmith::quantize_4bit", _fake_quantize_4bit)
torch.library.register_fake("tunesmith::quantize_absmax", _fake_quantize_absmax)
torch.library.register_fake("tunesmith::dequantize_4bit", _fake_dequantize_4bit)
torch.library.register_fake("tunesmith::linear", _fake_linear)
torch.library.register_fake("tunesmith::linear_backward", _fake_linear_backward)


class _Linear(torch.autograd.Function):
    """`linear` with its derivative; bias's is worked out here, the others by `linear_backward`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, weight, absmax, nested_absmax, nested_offset = args[:5]
        _, blocksize, quant_type, _, lora_a, lora_b, scaling, keep, keep_scale = args[5:]
        need_x, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 9, 10))
        if ctx.needs_input_grad[1]:
            raise OpError(
                "got a weight that requires a gradient; this product has none for its weight, "
                "which is frozen; call weight.requires_grad_(False), or use "
                "torch.nn.functional.linear"
            )
        y, s = below_autograd("linear", *args)
        if y._is_view():  # of what nobody sees; autograd would not let it be written to in place
            y = torch.ops.aten._unsafe_view(y, y.shape)
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if need_a else None,
            s if need_b else None,
            weight,
            absmax,
            nested_absmax,
            nested_offset,
            lora_a,
            lora_b,
            keep if need_x or need_a else None,
        )
        ctx.settings = (x.shape[-1], blocksize, quant_type)
        ctx.scales = (scaling, keep_scale)
        return y, s

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 14
        if grad_y is None:
            return tuple(grads)
        x, s, *weight, lora_a, lora_b, keep = ctx.saved_tensors
        scaling, keep_scale = ctx.scales
        need_x, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 9, 10))
        if need_x or need_a or need_b:
            grad_x, grad_a, grad_b = call(
                "linear_backward",
                grad_y,
                x,
                s,
                *weight,
                *ctx.settings,
                lora_a,
                lora_b,
                scaling,
                keep,
                keep_scale,
                need_x,
                need_a,
                need_b,
            )
            grads[0] = grad_x if need_x else None
            grads[9] = grad_a if need_a else None
            grads[10] = grad_b if need_b else None
        if ctx.needs_input_grad[8]:
            grads[8] = grad_y.sum(tuple(range(grad_y.dim() - 1)))  # [out_features]
        return tuple(grads)


class _LinearBackward(torch.autograd.Function):
    """`linear_backward`, which has no derivative and says so when it is asked for one."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = below_autograd("linear_backward", *args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise OpError(
            "got a second backward pass through a frozen linear layer; it has first derivatives "
            "only; leave create_graph=False, or use a dense torch.nn.Linear"
        )


differentiate("linear", _Linear)
differentiate("linear_backward", _LinearBackward)


def check_weight(weight: Tensor, blocksize: int, quant_type: str, name: str) -> None:
    """Refuse what cannot be quantized to 4 bits; `name` is what the message calls the tensor."""
    _check_blocksize(blocksize)
    _check_quant_type(quant_type)
    if weight.layout != torch.strided:
        raise OpError(
            f"{name}: got a {word(weight.layout)} tensor; only dense (strided) tensors can be "
            f"quantized to {quant_type}; call .to_dense() first"
        )
    verb = f"quantized to {quant_type}"
    _check_dtype(weight.dtype, f"{name}: got dtype", verb, "cast the tensor first")


def check_absmax(absmax: Tensor) -> None:
    """Refuse what is no fp32 [blocks] vector of absmax."""
    _check_part("absmax", absmax, torch.float32, (absmax.numel(),), absmax.device)


def check_packed(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuse parts that do not make up one 4-bit weight of that shape and block size."""
    _check_blocksize(blocksize)
    _check_quant_type(quant_type)
    _check_dtype(dtype, "got dtype", "dequantized into", "cast the result instead")
    if min(shape, default=0) < 0:
        raise OpError(f"got shape {list(shape)}; sizes cannot be negative; pass the weight's shape")
    numel = math.prod(shape)
    blocks = count_blocks(numel, blocksize)
    device = packed.device
    _check_part("packed", packed, torch.uint8, ((numel + 1) // 2,), device)
    if nested_absmax is None and nested_offset is None:
        _check_part("absmax", absmax, torch.float32, (blocks,), device)
        return
    if nested_absmax is None or nested_offset is None:
        raise OpError(
            "got only one of nested_absmax and nested_offset; a double-quantized weight has both, "
            "any other has neither; pass both or none"
        )
    groups = count_blocks(blocks, NESTED_BLOCKSIZE)
    _check_part("absmax codes", absmax, torch.uint8, (blocks,), device)
    _check_part("nested_absmax", nested_absmax, torch.float32, (groups,), device)
    _check_part("nested_offset", nested_offset, torch.float32, (), device)


def check_finite(absmax: Tensor, numel: int, blocksize: int, quant_type: str, name: str) -> None:
    """Refuse a weight of which a block holds NaN or Inf: the absmax of that block is one, too."""
    finite = absmax.isfinite()
    if bool(finite.all()):
        return
    block = int(finite.logical_not().nonzero()[0])
    first = block * blocksize
    last = min(first + blocksize, numel) - 1
    raise OpError(
        f"{name}: block {block} (elements {first} to {last} of the flattened tensor) holds NaN or "
        f"Inf; {quant_type} needs finite values; check the checkpoint, or the cast that made this "
        f"tensor"
    )


def check_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    keep: Tensor | None,
) -> None:
    """Refuse arguments of `linear` that do not fit together."""
    if x.dim() == 0 or x.layout != torch.strided:
        raise OpError(
            f"x: got a {word(x.layout)} tensor of shape {list(x.shape)}; allowed is a dense "
            f"tensor [..., in_features]; reshape it"
        )
    _check_x("x", x)
    in_features = x.shape[-1]
    _check_linear_weight(
        x, weight, absmax, nested_absmax, nested_offset, (out_features, in_features), blocksize,
        quant_type,
    )  # fmt: skip
    if bias is not None:
        _check_tensor("bias", bias, (x.dtype,), (out_features,), x.device)
    _check_adapter(x, lora_a, lora_b, in_features, out_features)
    if keep is None:
        return
    if lora_a is None:
        raise OpError(
            "got a dropout mask without an adapter; dropout acts on the adapter's input only; "
            "pass lora, or leave dropout at 0"
        )
    _check_tensor("keep", keep, (torch.bool,), x.shape, x.device)


def check_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    blocksize: int,
    quant_type: str,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    keep: Tensor | None,
    need_a: bool,
    need_b: bool,
) -> None:
    """Refuse arguments of `linear_backward` that do not fit together."""
    if grad_y.dim() == 0 or grad_y.layout != torch.strided:
        raise OpError(
            f"grad_y: got a {word(grad_y.layout)} tensor of shape {list(grad_y.shape)}; allowed "
            f"is a dense tensor [..., out_features]; reshape it"
        )
    _check_x("grad_y", grad_y)
    *leading, out_features = grad_y.shape
    shape = (*leading, in_features)
    _check_linear_weight(
        grad_y, weight, absmax, nested_absmax, nested_offset, (out_features, in_features),
        blocksize, quant_type,
    )  # fmt: skip
    _check_adapter(grad_y, lora_a, lora_b, in_features, out_features)
    if keep is not None:
        _check_tensor("keep", keep, (torch.bool,), shape, grad_y.device)
    if not (need_a or need_b):
        return
    if lora_a is None:
        raise OpError("got need_a or need_b without an adapter; pass lora_a and lora_b")
    if need_a:
        if x is None:
            raise OpError("got need_a without x, from which grad_a is made; pass x")
        _check_tensor("x", x, (grad_y.dtype,), shape, grad_y.device)
    if need_b:
        if s is None:
            raise OpError("got need_b without s, from which grad_b is made; pass linear's s")
        s_shape = (math.prod(leading), lora_a.shape[0])
        _check_tensor("s", s, (s_dtype(grad_y),), s_shape, grad_y.device)


def _check_x(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES and x.dtype != torch.float64:
        raise OpError(
            f"{name}: got dtype {word(x.dtype)}; allowed are {_words(DTYPES)}, float64; cast it"
        )


def _check_linear_weight(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: tuple[int, int],
    blocksize: int,
    quant_type: str,
) -> None:
    if weight.device != x.device:
        raise OpError(
            f"weight: got a tensor on {weight.device}, but the input is on {x.device}; all "
            f"tensors of a product must be on one device; move one of them"
        )
    if quant_type != "":
        if absmax is None:
            raise OpError(
                f"got no absmax for a weight in {quant_type}; only a plain weight has none; pass "
                f"the parts as quantize_{quant_type} returned them"
            )
        nbytes = (math.prod(shape) + 1) // 2
        if weight.numel() != nbytes:
            raise OpError(
                f"got an input of {shape[1]} features and a packed weight of {weight.numel()} "
                f"bytes; {shape[0]} rows of {shape[1]} are {nbytes} bytes; pass an input that has "
                f"the weight's in_features"
            )
        check_packed(weight, absmax, nested_absmax, nested_offset, shape, blocksize, quant_type)
        return
    if absmax is not None or nested_absmax is not None or nested_offset is not None:
        raise OpError(
            "got scales for a plain weight; only a 4-bit weight has them; name its quant_type: "
            + " or ".join(QUANT_TYPES)
        )
    wide = (torch.float64,) if x.dtype == torch.float64 else ()
    _check_tensor("weight", weight, (*DTYPES, *wide), shape, x.device)


def _check_adapter(
    x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, in_features: int, out_features: int
) -> None:
    if lora_a is None and lora_b is None:
        return
    if lora_a is None or lora_b is None:
        raise OpError("got only one of lora_a and lora_b; an adapter has both; pass both or none")
    rank = lora_a.shape[0] if lora_a.dim() else 0
    if rank == 0:
        raise OpError(
            f"lora_a: got shape {list(lora_a.shape)}; allowed is [rank, {in_features}] with a "
            f"rank of 1 or more; leave the adapter out if there is none"
        )
    wide = (torch.float64,) if x.dtype == torch.float64 else ()
    _check_tensor("lora_a", lora_a, (*DTYPES, *wide), (rank, in_features), x.device)
    # one dtype for both, so that a kernel knows one
    _check_tensor("lora_b", lora_b, (lora_a.dtype,), (out_features, rank), x.device)


def _check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise OpError(
            f"{name}: got {word(tensor.dtype)} {list(tensor.shape)}; allowed here is "
            f"{' or '.join(map(word, dtypes))} {list(shape)}; cast or reshape it"
        )
    if tensor.device != device:
        raise OpError(
            f"{name}: got a tensor on {tensor.device}, but the input is on {device}; all tensors "
            f"of a product must be on one device; move one of them"
        )


def _check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        allowed = ", ".join(map(str, BLOCKSIZES))
        raise OpError(
            f"got blocksize {blocksize}; allowed are {allowed}; 64 is what the QLoRA paper uses"
        )


def _check_quant_type(quant_type: str) -> None:
    if quant_type not in QUANT_TYPES:
        raise OpError(
            f"got quant_type '{quant_type}'; allowed are {', '.join(QUANT_TYPES)}; nf4 is what "
            f"the QLoRA paper uses"
        )


def _check_dtype(dtype: torch.dtype, got: str, verb: str, next_step: str) -> None:
    if dtype not in DTYPES:
        raise OpError(f"{got} {word(dtype)}; {_words(DTYPES)} can be {verb}; {next_step}")


def _check_part(
    name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if part.dtype != dtype or part.shape != shape:
        raise OpError(
            f"{name}: got {word(part.dtype)} {list(part.shape)}; this weight needs "
            f"{word(dtype)} {list(shape)}; pass the parts as they came from quantizing"
        )
    if part.device != device:
        raise OpError(
            f"{name}: got a tensor on {part.device}, but the packed data is on {device}; all parts "
            f"of a weight must be on one device; move them together"
        )


def _words(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(word, dtypes))


def word(value: torch.dtype | torch.layout) -> str:
    """Return what messages and files call a dtype or layout: torch's name without "torch."."""
    return str(value).removeprefix("torch.")
