"""4-bit arithmetic, and what stands around it: torch tensors in, torch tensors out.

`quantize_nf4`, `quantize_fp4` and `dequantize_4bit` are the two ends; `linear_nf4` and
`lora_linear` multiply with a frozen weight, and add a LoRA adapter in the same pass.

A module holds some ops: schema, check, derivative, plain PyTorch, and the compiled kernels that
take its place where there are any. `four_bit` quantizes, `linear` multiplies, `attention` and
`elementwise` are the rest of a layer; `layers` runs whole ones. `dispatch` is how an op is called,
`native` what all need to call a kernel.
"""

from tunesmith.ops import attention, elementwise  # registers their ops
from tunesmith.ops.frozen import FrozenLinear, LoraWeights
from tunesmith.ops.linear import frozen_linear, linear_nf4, lora_linear
from tunesmith.ops.native import NativeStatus, native_status
from tunesmith.ops.weights import (
    KINDS,
    FP4Weight,
    NF4Weight,
    Weight4Bit,
    dequantize_4bit,
    dequantize_nf4,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)

__all__ = [
    "KINDS",
    "FP4Weight",
    "FrozenLinear",
    "LoraWeights",
    "NF4Weight",
    "NativeStatus",
    "Weight4Bit",
    "attention",
    "dequantize_4bit",
    "dequantize_nf4",
    "elementwise",
    "frozen_linear",
    "linear_nf4",
    "lora_linear",
    "native_status",
    "quantize_4bit",
    "quantize_fp4",
    "quantize_nf4",
]
