"""What stands between products, each in one pass: RMSNorm, a gated unit, rotary embedding.

Each gives what the same in PyTorch gives, rounding included where that leaves a tensor in 16 bits,
but keeps less for its backward pass: that works out anew what takes no product. Each has a schema,
a fake, a reference in plain PyTorch, a derivative, and kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import native
from tunesmith.ops.dispatch import below_autograd, call, differentiate
from tunesmith.ops.dtypes import DTYPES, sum_dtype, word, words
from tunesmith.ops.native import CODES, empty_like, implement_on_all, stream_of

__all__ = ["ACTIVATIONS", "gated", "logps_", "rms_norm", "rotary"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": _gelu_tanh}
"""What a gated unit may apply to its gate."""

_SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps, bool from_one) -> (Tensor y, Tensor scale)",
    "rms_norm_backward": "(Tensor grad_y, Tensor x, Tensor weight, Tensor scale, bool from_one) "
    "-> Tensor",
    "gated": "(Tensor gate, Tensor up, str activation) -> Tensor",
    "gated_backward": "(Tensor grad_y, Tensor gate, Tensor up, str activation) "
    "-> (Tensor grad_gate, Tensor grad_up)",
    "logps_": "(Tensor(a!) logits, Tensor labels, bool gradients) -> Tensor",
    "rotary": "(Tensor x, Tensor cos, Tensor sin, bool backward) -> Tensor",
}
for _op, _schema in _SCHEMAS.items():
    torch.library.define(f"tunesmith::{_op}", _schema, tags=torch.Tag.pt2_compliant_tag)


def rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool = False) -> Tensor:
    """Return x / sqrt(mean(x², -1) + eps) times a frozen weight (RMSNorm, arXiv:1910.07467).

    `x` is [..., features] in bf16, fp16 or fp32, `weight` [features] in the same; with `from_one`
    the weight is what is added to one, as in Gemma. The root is taken in fp32; x divided by it is
    rounded to x's dtype before the weight comes in, or after it with `from_one`. Raises OpError
    for what does not fit together and for a weight that requires a gradient.
    """
    y: Tensor = call("rms_norm", x, weight, eps, from_one)[0]
    return y


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) times up (arXiv:2002.05202), both of one shape and dtype.

    bf16, fp16 or fp32; the activation is computed in fp32 and rounded before it is multiplied.
    Raises OpError for what does not fit together; `ACTIVATIONS` are allowed.
    """
    y: Tensor = call("gated", gate, up, activation)
    return y


def logps_(logits: Tensor, labels: Tensor, gradients: bool) -> Tensor:
    """Return log_softmax(logits)[label] of each row: fp32 [rows].

    `logits` is [rows, classes] without gaps in bf16, fp16 or fp32; `labels` int64 [rows] from 0 to
    classes - 1. With `gradients` the derivative of each result by its logits, onehot - softmax, is
    written over them; otherwise they stay. Sums are fp32 or exacter. Has no derivative itself.
    Raises OpError for what does not fit together; a label that is none is an error on the CPU and
    gives NaN on a CUDA device, which would have to be waited for to look at it.
    """
    logps: Tensor = call("logps_", logits, labels, gradients)
    return logps


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with a rotary position embedding (arXiv:2104.09864): x cos + rotate_half(x) sin.

    `x` is [rows, tokens, heads, head size], `cos` and `sin` [rows or 1, tokens, head size] in the
    same dtype, bf16, fp16 or fp32; neither gets a gradient. Element i of a head is turned with
    i + head size / 2. Raises OpError for what does not fit together.
    """
    y: Tensor = call("rotary", x, cos, sin, False)
    return y


def check_alike(op: str, x: Tensor, *others: Tensor) -> None:
    """Refuse tensors of another dtype or device than the first."""
    for tensor in others:
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise OpError(
                f"{op}: got {word(tensor.dtype)} on {tensor.device} beside {word(x.dtype)} on "
                f"{x.device}; all tensors are of one dtype on one device"
            )


def check_rms_norm(x: Tensor, weight: Tensor, *like_x: Tensor) -> None:
    """Refuse tensors of a norm that do not fit together."""
    _check_first("rms_norm", x)
    if x.dim() == 0 or weight.shape != x.shape[-1:] or any(t.shape != x.shape for t in like_x):
        raise OpError(
            f"rms_norm: got x {list(x.shape)} and weight {list(weight.shape)}; the weight has one "
            "value for each of x's last axis, and gradients have x's shape"
        )
    check_alike("rms_norm", x, weight, *like_x)


def check_gated(gate: Tensor, up: Tensor, activation: str, *more: Tensor) -> None:
    """Refuse arguments of a gated unit that do not fit together."""
    _check_first("gated", gate)
    if activation not in ACTIVATIONS:
        raise OpError(
            f"gated: got activation {activation!r}; allowed are {', '.join(ACTIVATIONS)}; apply "
            "any other in PyTorch"
        )
    if any(tensor.shape != gate.shape for tensor in (up, *more)):
        raise OpError(
            f"gated: got gate {list(gate.shape)} and up {list(up.shape)}; they have one shape"
        )
    check_alike("gated", gate, up, *more)


def check_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse tensors of a rotary embedding that do not fit together."""
    _check_first("rotary", x)
    if (
        x.dim() != 4
        or x.shape[3] % 2
        or cos.shape != sin.shape
        or cos.shape not in ((x.shape[0], *x.shape[1::2]), (1, *x.shape[1::2]))
    ):
        raise OpError(
            f"rotary: got x {list(x.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)}; "
            "allowed is [rows, tokens, heads, head size] with an even head size, and "
            "[rows or 1, tokens, head size]"
        )
    check_alike("rotary", x, cos, sin)


def check_logps(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits and labels that do not fit together."""
    _check_first("logps_", logits)
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise OpError(
            f"logps_: got logits {list(logits.shape)} and labels {word(labels.dtype)} "
            f"{list(labels.shape)}; allowed is [rows, classes] and int64 [rows]"
        )
    if not logits.is_contiguous() or labels.device != logits.device:
        raise OpError("logps_: got logits with gaps, or labels on another device; copy them")


def _check_first(op: str, x: Tensor) -> None:
    if x.dtype not in (*DTYPES, torch.float64) or x.layout != torch.strided:
        raise OpError(
            f"{op}: got a {word(x.dtype)} {word(x.layout)} tensor; allowed are dense ones in "
            f"{words(DTYPES)}; cast it"
        )


def _sums(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reference_rms_norm(
    x: Tensor, weight: Tensor, eps: float, from_one: bool
) -> tuple[Tensor, Tensor]:
    """Do the op in plain PyTorch; the scale is [rows of x], fp32."""
    check_rms_norm(x, weight)
    wide = _sums(x)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if from_one:
        y = (wide * scale * (1.0 + _sums(weight))).to(x.dtype)
    else:
        y = (wide * scale).to(x.dtype) * weight
    return y, scale.reshape(-1)


def reference_rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, from_one: bool
) -> Tensor:
    """Return the gradient of x."""
    check_rms_norm(x, weight, grad_y)
    inflow = _sums(grad_y) * (1.0 + _sums(weight)) if from_one else _sums(grad_y * weight)
    scale = scale.view(*x.shape[:-1], 1)
    wide = _sums(x)
    along = (inflow * wide).mean(-1, keepdim=True) * scale * scale
    return (scale * (inflow - wide * along)).to(x.dtype)


def reference_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Do the op in plain PyTorch."""
    check_gated(gate, up, activation)
    return ACTIVATIONS[activation](gate) * up


def reference_gated_backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    check_gated(gate, up, activation, grad_y)
    grad = grad_y * up
    if activation == "silu":
        grad_gate = torch.ops.aten.silu_backward(grad, gate)
    else:
        grad_gate = torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")
    return grad_gate, grad_y * ACTIVATIONS[activation](gate)


def reference_rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Do the op in plain PyTorch, or take a gradient back through it."""
    check_rotary(x, cos, sin)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if backward:
        low, high = (x * sin).chunk(2, dim=-1)
        return x * cos + torch.cat((high, -low), dim=-1)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def reference_logps_(logits: Tensor, labels: Tensor, gradients: bool) -> Tensor:
    """Do the op in plain PyTorch."""
    check_logps(logits, labels)
    logps_of_all = _sums(logits).log_softmax(dim=1)
    wanted = labels[:, None]
    logps = logps_of_all.gather(1, wanted)
    if gradients:
        gradient = logps_of_all.exp_().neg_()
        gradient.scatter_add_(1, wanted, torch.ones_like(logps))
        logits.copy_(gradient)
    return logps.squeeze(1)


def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    check_rms_norm(x, weight)
    return x.new_empty(x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=sum_dtype(x.dtype))


torch.library.register_fake("tunesmith::rms_norm", _fake_rms_norm)
torch.library.register_fake(
    "tunesmith::rms_norm_backward", lambda grad_y, x, weight, scale, from_one: x.new_empty(x.shape)
)
torch.library.register_fake(
    "tunesmith::logps_",
    lambda logits, labels, gradients: logits.new_empty(len(logits), dtype=_sums(logits).dtype),
)
torch.library.register_fake(
    "tunesmith::gated", lambda gate, up, activation: gate.new_empty(gate.shape)
)
torch.library.register_fake(
    "tunesmith::gated_backward",
    lambda grad_y, gate, up, activation: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)
torch.library.register_fake("tunesmith::rotary", lambda x, cos, sin, backward: x.new_empty(x.shape))


def _once(op: str) -> NoReturn:
    raise OpError(
        f"got a second backward pass through {op}, which has first derivatives only; leave "
        "create_graph=False, or fused_layers=False"
    )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, weight, _, ctx.from_one = args
        if ctx.needs_input_grad[1]:
            raise OpError(
                "rms_norm: got a weight that requires a gradient; it is taken for frozen here; "
                "call weight.requires_grad_(False), or use torch.nn.functional.rms_norm"
            )
        y, scale = below_autograd("rms_norm", *args)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return y, scale

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _once("rms_norm")
        grad_x = call("rms_norm_backward", grad_y, *ctx.saved_tensors, ctx.from_one)
        return grad_x, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        gate, up, ctx.activation = args
        ctx.save_for_backward(gate, up)
        y: Tensor = below_autograd("gated", *args)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _once("gated")
        grads = call("gated_backward", grad_y, *ctx.saved_tensors, ctx.activation)
        return (*grads, None)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _, cos, sin, ctx.backwards = args
        ctx.save_for_backward(cos, sin)
        y: Tensor = below_autograd("rotary", *args)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        # it is linear, and its own kind the other way round: this can be differentiated again
        grad_x = call("rotary", grad_y, *ctx.saved_tensors, not ctx.backwards)
        return grad_x, None, None, None


differentiate("rms_norm", _RmsNorm)
differentiate("gated", _Gated)
differentiate("rotary", _Rotary)

for _op, _implementation in (
    ("rms_norm", reference_rms_norm),
    ("rms_norm_backward", reference_rms_norm_backward),
    ("logps_", reference_logps_),
    ("gated", reference_gated),
    ("gated_backward", reference_gated_backward),
    ("rotary", reference_rotary),
):
    torch.library.impl(f"tunesmith::{_op}", "default", _implementation)


# --- by the kernels


def _logps(logits: Tensor, labels: Tensor, gradients: bool) -> Tensor:
    check_logps(logits, labels)
    rows, classes = logits.shape
    if logits.dtype == torch.float64 or not logits.numel():
        return reference_logps_(logits, labels, gradients)
    if logits.device.type == "cpu":  # elsewhere to look at them is to wait for them
        least, most = labels.aminmax()
        if least < 0 or most >= classes:
            raise OpError(
                f"logps_: got labels from {int(least)} to {int(most)} for {classes} classes; "
                f"allowed is 0 to {classes - 1}; leave tokens without a label out"
            )
    labels = labels.contiguous()
    logps = logits.new_empty(rows, dtype=torch.float32)
    with stream_of(logits) as stream:
        native.kernels.logps(
            logits=logits.data_ptr(),
            labels=labels.data_ptr(),
            dtype=CODES[logits.dtype],
            rows=rows,
            columns=classes,
            gradients=gradients,
            logps=logps.data_ptr(),
            stream=stream,
        )
    return logps


def native_rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    """Do what the op of that name does, without a derivative."""
    check_rms_norm(x, weight)
    if x.dtype == torch.float64 or not x.numel():
        return reference_rms_norm(x, weight, eps, from_one)
    x, weight = x.contiguous(), weight.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    y, scale = empty_like(x), x.new_empty(rows, dtype=torch.float32)
    with stream_of(x) as stream:
        native.kernels.rms_norm(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            dtype=CODES[x.dtype],
            rows=rows,
            columns=columns,
            eps=eps,
            from_one=from_one,
            y=y.data_ptr(),
            scale=scale.data_ptr(),
            stream=stream,
        )
    return y, scale


def _rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, from_one: bool
) -> Tensor:
    check_rms_norm(x, weight, grad_y)
    if x.dtype == torch.float64 or not x.numel():
        return reference_rms_norm_backward(grad_y, x, weight, scale, from_one)
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    columns = x.shape[-1]
    grad_x = empty_like(x)
    with stream_of(x) as stream:
        native.kernels.rms_norm_backward(
            grad_y=grad_y.data_ptr(),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            scale=scale.data_ptr(),
            dtype=CODES[x.dtype],
            rows=x.numel() // columns,
            columns=columns,
            from_one=from_one,
            grad_x=grad_x.data_ptr(),
            stream=stream,
        )
    return grad_x


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check_gated(gate, up, activation)
    if gate.dtype == torch.float64:
        return reference_gated(gate, up, activation)
    gate, up = gate.contiguous(), up.contiguous()
    y = empty_like(gate)
    with stream_of(gate) as stream:
        native.kernels.gated(
            gate=gate.data_ptr(),
            up=up.data_ptr(),
            dtype=CODES[gate.dtype],
            numel=gate.numel(),
            activation=CODES[activation],
            y=y.data_ptr(),
            stream=stream,
        )
    return y


def _gated_backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    check_gated(gate, up, activation, grad_y)
    if gate.dtype == torch.float64:
        return reference_gated_backward(grad_y, gate, up, activation)
    grad_y, gate, up = grad_y.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = empty_like(gate), empty_like(up)
    with stream_of(gate) as stream:
        native.kernels.gated_backward(
            grad_y=grad_y.data_ptr(),
            gate=gate.data_ptr(),
            up=up.data_ptr(),
            dtype=CODES[gate.dtype],
            numel=gate.numel(),
            activation=CODES[activation],
            grad_gate=grad_gate.data_ptr(),
            grad_up=grad_up.data_ptr(),
            stream=stream,
        )
    return grad_gate, grad_up


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    check_rotary(x, cos, sin)
    if x.dtype == torch.float64:
        return reference_rotary(x, cos, sin, backward)
    rows, tokens, heads, size = x.shape
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = empty_like(x)
    with stream_of(x) as stream:
        native.kernels.rotary(
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            dtype=CODES[x.dtype],
            tokens=rows * tokens,
            positions=len(cos) * tokens,
            heads=heads,
            head_size=size,
            backward=backward,
            out=out.data_ptr(),
            stream=stream,
        )
    return out


implement_on_all(
    {
        "gated": _gated,
        "gated_backward": _gated_backward,
        "logps_": _logps,
        "rms_norm": native_rms_norm,
        "rms_norm_backward": _rms_norm_backward,
        "rotary": _rotary,
    }
)
