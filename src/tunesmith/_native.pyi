"""The compiled kernels: pointers in, pointers out, nothing checked. Call `tunesmith.ops` instead.

A stream of None means that the pointers are the CPU's; otherwise they belong to the current CUDA
device, and the work is put on that stream.
"""

from typing import Any

FLOAT32: int
FLOAT16: int
BFLOAT16: int
NF4: int
FP4: int
SILU: int
GELU_TANH: int

def quantize_4bit(
    weight: int,
    dtype: int,
    numel: int,
    blocksize: int,
    type: int,
    packed: int,
    absmax: int,
    stream: int | None,
) -> None:
    """Write uint8 packed [ceil(numel / 2)] and fp32 absmax [blocks], NaN or Inf if a block is."""

def quantize_absmax(
    absmax: int,
    blocks: int,
    nested_offset: int,
    codes: int,
    nested_absmax: int,
    stream: int | None,
) -> None:
    """Write uint8 codes [blocks] and fp32 nested_absmax [ceil(blocks / 256)]."""

def dequantize_4bit(
    packed: int,
    absmax: int,
    nested_absmax: int,
    nested_offset: int,
    numel: int,
    blocksize: int,
    type: int,
    dtype: int,
    out: int,
    stream: int | None,
) -> None:
    """Write out [numel] of that dtype; a nested_absmax of 0 means that absmax is plain fp32."""

class Linear:
    """csrc/kernels.h's tunesmith_linear, of pointers; 0 leaves a part out."""

    def __init__(
        self,
        tokens: int,
        in_features: int,
        out_features: int,
        dtype: int,
        type: int,
        weight: int,
        absmax: int,
        nested_absmax: int,
        nested_offset: int,
        blocksize: int,
        bias: int,
        rank: int,
        adapter_dtype: int,
        lora_a: int,
        lora_b: int,
        scaling: float,
        keep: int,
        keep_scale: float,
    ) -> None: ...

def linear(layer: Linear, x: int, s: int, y: int, accumulate: bool) -> None:
    """Write fp32 s [tokens, rank] and y [tokens, out_features], or add to y. On the CPU."""

def linear_backward(
    layer: Linear,
    x: int,
    s: int,
    grad_y: int,
    grad_x: int,
    grad_a: int,
    grad_b: int,
    accumulate: bool,
) -> None:
    """Write the gradients whose pointer is not 0, or add to grad_x. On the CPU."""

def attention(
    shape: list[int],
    dtype: int,
    q: int,
    k: int,
    v: int,
    scale: float,
    segments: int,
    segment_count: int,
    out: int,
    lse: int,
) -> None:
    """Write out and lse, of the queries of all segments.

    `shape` and `segments` are those of `attention_backward`.
    """

def attention_backward(
    shape: list[int],
    dtype: int,
    q: int,
    k: int,
    v: int,
    out: int,
    grad_out: int,
    lse: int,
    scale: float,
    segments: int,
    segment_count: int,
    grad_q: int,
    grad_k: int,
    grad_v: int,
) -> None:
    """Write the gradients of attention's inputs.

    `shape` is rows, tokens, heads, key heads and head size; `segments` is int64
    [segment_count, 6]: row, start, stop, first key, last key, whether causal.
    """

def attention_decode(
    q: int,
    keys: int,
    values: int,
    first: int,
    dtype: int,
    rows: int,
    heads: int,
    key_heads: int,
    head_size: int,
    capacity: int,
    length: int,
    scale: float,
    out: int,
) -> None:
    """Write out [rows, heads, head size] for one query a row, over keys [first[row], length)."""

def logps(
    logits: int,
    labels: int,
    dtype: int,
    rows: int,
    columns: int,
    gradients: bool,
    logps: int,
    stream: int | None,
) -> None:
    """Write fp32 logps [rows], and with `gradients` their derivatives over the logits."""

def rms_norm(
    x: int,
    weight: int,
    dtype: int,
    rows: int,
    columns: int,
    eps: float,
    from_one: bool,
    y: int,
    scale: int,
    stream: int | None,
) -> None:
    """Write y [rows, columns] and fp32 scale [rows]."""

def rms_norm_backward(
    grad_y: int,
    x: int,
    weight: int,
    scale: int,
    dtype: int,
    rows: int,
    columns: int,
    from_one: bool,
    grad_x: int,
    stream: int | None,
) -> None:
    """Write grad_x [rows, columns]."""

def gated(
    gate: int, up: int, dtype: int, numel: int, activation: int, y: int, stream: int | None
) -> None:
    """Write y [numel]; the activation is SILU or GELU_TANH."""

def gated_backward(
    grad_y: int,
    gate: int,
    up: int,
    dtype: int,
    numel: int,
    activation: int,
    grad_gate: int,
    grad_up: int,
    stream: int | None,
) -> None:
    """Write the gradients of both factors, [numel]."""

def rotary(
    x: int,
    cos: int,
    sin: int,
    dtype: int,
    tokens: int,
    positions: int,
    heads: int,
    head_size: int,
    backward: bool,
    out: int,
    stream: int | None,
) -> None:
    """Write out [tokens, heads, size]; token t takes row t % positions of cos and sin."""

class Norm:
    """csrc/kernels.h's tunesmith_norm; a weight of 0 for none."""

    def __init__(self, weight: int, eps: float, from_one: bool) -> None: ...

class DecodeLayer:
    """csrc/kernels.h's tunesmith_decode_layer; norms and linears in its order."""

    def __init__(
        self,
        dtype: int,
        rows: int,
        norms: list[Norm],
        linears: list[Linear],
        head_size: int,
        scale: float,
        activation: int,
        keys: int,
        values: int,
        capacity: int,
    ) -> None: ...

def decode_layers(
    layers: list[DecodeLayer], x: int, cos: int, sin: int, first: int, position: int
) -> None:
    """Add to x what all layers add, one after the other. On the CPU."""

class DecoderLayer:
    """csrc/kernels.h's tunesmith_decoder_layer; norms and linears in its order."""

    def __init__(
        self,
        dtype: int,
        norms: list[Norm],
        linears: list[Linear],
        head_size: int,
        scale: float,
        activation: int,
    ) -> None:
        """Of no tokens."""

    def for_tokens(
        self,
        rows: int,
        tokens: int,
        cos: int,
        sin: int,
        positions: int,
        segments: int,
        segment_count: int,
    ) -> DecoderLayer:
        """Return it for some tokens."""

    @property
    def activation_bytes(self) -> int:
        """How many bytes the forward pass fills for the backward pass."""

def decoder_layer(layer: DecoderLayer, x: int, activations: int, out: int) -> None:
    """Write activations, and out unless it is 0. On the CPU."""

def decoder_layer_backward(
    layer: DecoderLayer, x: int, activations: int, grad_out: int, grad_x: int, grads: list[int]
) -> None:
    """Write grad_x and the gradients of A and B of each linear layer, those that are not 0."""

def clip_norm(tensors: list[int], numels: list[int], dtype: int, max_norm: float) -> float:
    """Return the norm of all tensors; scale them if it is more than `max_norm`. On the CPU."""

def linear_small(layer: Linear, x: int, s: int, y: int, stream: int | None) -> None:
    """Do what `linear` does on CUDA, for a 4-bit weight, no mask and few tokens."""

def empty(nbytes: int) -> Any:
    """Return uint8 [nbytes] on the CPU as a DLPack capsule; its memory is used again."""

def isa() -> str:
    """Return the instruction set that the CPU kernels use."""

def isas() -> list[str]:
    """Return every instruction set that this build has and this CPU can run, best first."""

def set_isa(name: str) -> None:
    """Use that one from now on, in every thread; ValueError if it is not in `isas()`."""

def has_openmp() -> bool:
    """Return whether an OpenMP runtime is loaded in this process, by torch or another."""

def has_cuda() -> bool:
    """Return whether the CUDA kernels are compiled in."""

# The scalar arithmetic that CPU and GPU share, one number at a time, for tests.
def float16_to_float32(bits: int) -> float: ...
def float32_to_float16(value: float) -> int: ...
def bfloat16_to_float32(bits: int) -> float: ...
def float32_to_bfloat16(value: float) -> int: ...
def nf4_code(scaled: float) -> int: ...
def nf4_value(code: int) -> float: ...
def fp4_code(scaled: float) -> int: ...
def fp4_value(code: int) -> float: ...
def dynamic_code(scaled: float) -> int: ...
def dynamic_value(code: int) -> float: ...
