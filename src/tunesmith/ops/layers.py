"""Layers whose parts are looked at once and then run many times, on the CPU by our own kernels.

An op checks what it is given at every call. That takes longer than multiplying a few tokens, and in
a step of training as long as many of the kernels. What is here is checked when it is made, and
holds its tensors: `DecoderLayer` for training, `PreparedLayers` and its parts for decoding.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor, nn

from tunesmith.errors import OpError
from tunesmith.ops import attention, elementwise, linear, native
from tunesmith.ops.dtypes import DTYPES, word
from tunesmith.ops.four_bit import dequantize_by_kernel
from tunesmith.ops.frozen import FrozenLinear, check_linear
from tunesmith.ops.native import CODES, MAX_HEAD_SIZE, empty_like, pointer, pooled_empty

__all__ = [
    "DecoderLayer",
    "NormArguments",
    "Positions",
    "PreparedLayers",
    "PreparedLinear",
    "PreparedNorm",
    "multiplies_all",
]


def multiplies_all(x: Tensor, layers: Sequence[FrozenLinear]) -> bool:
    """Return whether each of some layers of as many tokens as x has is one call of ours.

    That is so on the CPU, for frozen biases, and where a library's product is no faster.
    """
    if not CODES or x.device.type != "cpu" or x.dtype not in DTYPES or not x.numel():
        return False
    tokens = x.numel() // x.shape[-1]
    return all(
        layer.out_features * layer.in_features > 0
        and linear.in_one_call(tokens, x.dtype, layer.weight, layer.quant_type)
        and not (layer.bias is not None and layer.bias.requires_grad)
        for layer in layers
    )


NormArguments = tuple[Tensor, float, bool]
"""What the op rms_norm takes after x."""


Positions = tuple[Tensor, Tensor, Tensor]
"""Where tokens stand: cos and sin [rows or 1, tokens, head size], and segments of attention."""


class DecoderLayer:
    """A decoder layer on the CPU; its tensors are held, and never written.

    h = norm(x), then attention, added to x; and h = norm(x), then an MLP with a gated unit, added
    to x. There is no derivative but `backward`. What is written into a tensor shows in the next
    call. Raises OpError for parts that do not fit together.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        norms: Sequence[NormArguments | None],
        linears: Sequence[FrozenLinear],
        activation: str,
        head_size: int,
        scaling: float,
    ) -> None:
        """Take x's dtype and the layer's parts.

        `norms` are that before attention, those of queries and of keys, which may be None, and that
        before the MLP. `linears` are of query, key, value, output, gate, up and down;
        `multiplies_all` takes them. `activation` is a key of `elementwise.ACTIVATIONS`.
        """
        self.dtype, self.head_size = dtype, head_size
        self._activation, self._scaling = activation, scaling
        self._norms, self._linears = tuple(norms), tuple(linears)
        self._made_of = list(_all_of(dtype, self._norms, self._linears))
        self.adapters = [
            matrix
            for each in linears
            for matrix in (each.lora_a, each.lora_b)
            if matrix is not None
        ]
        """A and B of each linear layer that has an adapter."""
        self._prepare()

    def is_made_of(
        self,
        dtype: torch.dtype,
        norms: Sequence[NormArguments | None],
        linears: Sequence[FrozenLinear],
    ) -> bool:
        """Whether it was made of these very tensors and numbers."""
        others = list(_all_of(dtype, norms, linears))
        mine = self._made_of
        return len(mine) == len(others) and all(map(operator.is_, mine, others))

    def forward(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return the output for x [rows, tokens, features], and the activations."""
        out = empty_like(x)
        return out, self._run(x, positions, out)

    def recompute(self, x: Tensor, positions: Positions) -> Tensor:
        """Return the activations that `forward` kept; its last product is left out."""
        return self._run(x, positions, None)

    def _run(self, x: Tensor, positions: Positions, out: Tensor | None) -> Tensor:
        x, positions = x.contiguous(), _compact_positions(positions)
        layer = self._for(x, positions)
        activations = pooled_empty((layer.activation_bytes,), torch.uint8, x.device)
        native.kernels.decoder_layer(
            layer=layer, x=x.data_ptr(), activations=activations.data_ptr(), out=pointer(out)
        )
        return activations

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        activations: Tensor,
        positions: Positions,
        need_x: bool,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradient of x, or None if it needs none, and those of `adapters`."""
        x, grad, activations = x.contiguous(), grad.contiguous(), activations.contiguous()
        positions = _compact_positions(positions)
        layer = self._for(x, positions)
        elementwise.check_alike("decoder_layer", x, grad)
        kept = (activations.dtype, tuple(activations.shape))
        if grad.shape != x.shape or kept != (torch.uint8, (layer.activation_bytes,)):
            raise OpError(
                f"decoder_layer: got a gradient {list(grad.shape)} and {activations.numel()} bytes "
                f"for x {list(x.shape)}; pass what came of the forward pass of the same x"
            )
        grad_x = empty_like(x) if need_x else None
        grads = [
            empty_like(matrix) if need else None
            for matrix, need in zip(self.adapters, needs, strict=True)
        ]
        given = iter(grads)
        pointers = [
            pointer(next(given)) if each.rank else 0 for each in self._linears for _ in "ab"
        ]
        native.kernels.decoder_layer_backward(
            layer=layer,
            x=x.data_ptr(),
            activations=activations.data_ptr(),
            grad_out=grad.data_ptr(),
            grad_x=pointer(grad_x),
            grads=pointers,
        )
        return grad_x, grads

    def _for(self, x: Tensor, positions: Positions) -> native.kernels.DecoderLayer:
        """Check x and its positions, and return the layer as the kernels take it for them."""
        if self._copied or self._memory() != self._prepared_for:
            self._prepare()
        cos, sin, segments = positions
        if x.dtype != self.dtype or x.dim() != 3 or x.shape[2] != self._hidden:
            raise OpError(
                f"decoder_layer: got {word(x.dtype)} {list(x.shape)}; this layer takes "
                f"{word(self.dtype)} [rows, tokens, {self._hidden}]"
            )
        elementwise.check_alike("decoder_layer", x, cos, sin)
        rows, tokens, _ = x.shape
        size = self.head_size
        fits = cos.shape == sin.shape and cos.shape in ((rows, tokens, size), (1, tokens, size))
        if not fits or size % 2:  # it says what does not
            elementwise.check_rotary(x.new_empty((rows, tokens, 0, size)), cos, sin)
        attention.check_segments(segments, rows, tokens)
        return self._layer.for_tokens(
            rows=rows,
            tokens=tokens,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            positions=len(cos) * tokens,
            segments=segments.data_ptr(),
            segment_count=len(segments),
        )

    def _memory(self) -> list[object]:
        """Return where its parameters lie, and how: that changes where .data is assigned."""
        return [
            (each.data_ptr(), each.dtype, each.shape, each.is_contiguous())
            for each in self._parameters
        ]

    def _prepare(self) -> None:
        """Check all parts, and make of them what the kernels take."""
        dtype, size, linears = self.dtype, self.head_size, self._linears
        hidden = self._hidden = linears[0].in_features
        width, key_width, inner = (linears[i].out_features for i in (0, 1, 4))
        heads, key_heads = width // size, key_width // size
        ins, outs = zip(*((each.in_features, each.out_features) for each in linears), strict=True)
        if (
            width % size or key_width % size or not key_heads or heads % key_heads
            or outs != (width, key_width, key_width, hidden, inner, inner, hidden)
            or ins != (hidden, hidden, hidden, width, hidden, hidden, inner)
        ):  # fmt: skip
            raise OpError(
                f"decoder_layer: got projections to {list(outs)} features "
                f"for x of {hidden} and heads of {size}; queries and keys are whole heads, values "
                "are as keys, up is as gate, and output and down are as x"
            )
        held: list[Tensor | None] = []
        made = []
        for each in linears:
            if each.bias is not None:
                each = each._replace(bias=each.bias.to(dtype))
            check_linear(torch.empty((0, each.in_features), dtype=dtype), each)
            each = each.compact(weight_too=True)
            held += [*each[:4], each.bias, each.lora_a, each.lora_b]
            made.append(linear.native_linear(each, 0, dtype))  # of no tokens yet
        norms = []
        for norm, features in zip(self._norms, (hidden, size, size, hidden), strict=True):
            weight, eps, from_one = norm or (None, 0.0, False)
            if weight is not None:
                elementwise.check_rms_norm(torch.empty((0, features), dtype=dtype), weight)
                weight = weight.contiguous()
                held.append(weight)
            norms.append(_native_norm(weight, eps, from_one))
        self._layer = native.kernels.DecoderLayer(
            dtype=CODES[dtype],
            norms=norms,
            linears=made,
            head_size=size,
            scale=self._scaling,
            activation=CODES[self._activation],
        )
        own = set(map(id, self._made_of))
        # of a copy nobody says when the original is written
        self._copied = any(id(each) not in own for each in held)
        # these keep the memory that the kernels were told of, whatever becomes of the tensors
        self._aliases = [each.detach() for each in held if each is not None]
        self._parameters = [each for each in self._made_of if isinstance(each, nn.Parameter)]
        self._prepared_for = self._memory()


def _native_norm(
    weight: Tensor | None, eps: float = 0.0, from_one: bool = False
) -> native.kernels.Norm:
    """Return a norm as the kernels take it, or the one that says that there is none."""
    return native.kernels.Norm(weight=pointer(weight), eps=eps, from_one=from_one)


def _all_of(
    dtype: torch.dtype, norms: Sequence[NormArguments | None], linears: Sequence[FrozenLinear]
) -> Iterator[object]:
    yield dtype
    for norm in norms:
        yield from norm or (None,)
    for each in linears:
        yield from each


def _compact_positions(positions: Positions) -> Positions:
    cos, sin, segments = positions
    return cos.contiguous(), sin.contiguous(), segments.contiguous()


class PreparedLinear:
    """A frozen linear layer on the CPU for calls of one size, everything checked beforehand.

    For decoding, where checking takes longer than multiplying. The layer's tensors are held; what
    is written into them shows in the next call. Has no derivative.
    """

    def __init__(self, tokens: int, dtype: torch.dtype, layer: FrozenLinear) -> None:
        check_linear(torch.empty((tokens, layer.in_features), dtype=dtype), layer)
        self._held = layer = layer.compact()
        self.out_features = layer.out_features
        self._dtype = dtype
        self._s = torch.empty((tokens, layer.rank))
        # as `linear` decides it: a plain weight is the library's to multiply with
        self._own = linear.in_one_call(tokens, dtype, layer.weight, layer.quant_type)
        self._layer: native.kernels.Linear | None = None
        if self._own or layer.rank:
            self._layer = linear.native_linear(layer, tokens, dtype, weight=self._own)

    @property
    def in_one_call(self) -> native.kernels.Linear | None:
        """The layer as the kernels take it, or None where a library has a part in it."""
        return self._layer if self._own else None

    def __call__(self, x: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        """Write x Wᵀ + b [tokens, out_features] to `out`, or add it; both without gaps."""
        if not self._own:
            dense = linear.dense_weight(self._held, self._dtype, dequantize_by_kernel)
            # few tokens are columns to the library: it reads the weight once, at twice the pace
            y = torch.mv(dense, x[0])[None] if len(x) == 1 else (dense @ x.mT).mT
            if self._held.bias is not None:
                y += self._held.bias
            if accumulate:
                out += y
            else:
                out.copy_(y)
            accumulate = True
        if self._layer is not None:
            native.kernels.linear(
                layer=self._layer,
                x=x.data_ptr(),
                s=self._s.data_ptr(),
                y=out.data_ptr(),
                accumulate=accumulate,
            )
        return out


@attrs.frozen(eq=False)
class PreparedNorm:
    """An RMSNorm on the CPU with a frozen weight; arguments are those of `elementwise.rms_norm`."""

    weight: Tensor
    eps: float
    from_one: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., features]; no gradient flows."""
        return elementwise.native_rms_norm(x, self.weight, self.eps, self.from_one)[0]


class PreparedLayers:
    """The layers of a model that is decoded, for one native call a token.

    Tensors are held, and written where a layer's cache is. No gradient flows.
    """

    def __init__(self) -> None:
        self._layers: list[native.kernels.DecodeLayer] = []
        self._held: list[object] = []

    def add(
        self,
        norms: Sequence[PreparedNorm | None],
        linears: Sequence[PreparedLinear],
        keys: Tensor,
        values: Tensor,
        scale: float,
        activation: str,
    ) -> bool:
        """Add a layer: x += attention(norm(x)), then x += MLP(norm(x)).

        `norms` are that before attention, those of each head of the queries and keys, None for
        none, and that before the MLP; `linears` those of query, key, value, output, gate, up and
        down; `keys` and `values` the cache, [rows, key heads, capacity, head size]. Returns False,
        and adds nothing, where a part of it is not for one native call.
        """
        layers = [each.in_one_call for each in linears]
        rows, _, capacity, size = keys.shape
        if None in layers or size > MAX_HEAD_SIZE or size % 2:
            return False
        self._layers.append(
            native.kernels.DecodeLayer(
                dtype=CODES[keys.dtype],
                rows=rows,
                norms=[
                    _native_norm(None)
                    if norm is None
                    else _native_norm(norm.weight, norm.eps, norm.from_one)
                    for norm in norms
                ],
                linears=[layer for layer in layers if layer is not None],
                head_size=size,
                scale=scale,
                activation=CODES[activation],
                keys=keys.data_ptr(),
                values=values.data_ptr(),
                capacity=capacity,
            )
        )
        self._held.append((norms, linears, keys, values))
        return True

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, position: int) -> None:
        """Add to x [rows, hidden] what all layers add; the tokens are at `position` of their rows.

        `cos` and `sin` are [rows, head size], `first` int64 [rows], the first token of each row
        that is none of padding; all without gaps, and `position` below the caches' capacity.
        """
        native.kernels.decode_layers(
            layers=self._layers,
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            first=first.data_ptr(),
            position=position,
        )
