"""The compiled kernels: pointers in, pointers out, nothing checked. Call `tunesmith.ops` instead.

A stream of None means that the pointers are the CPU's; otherwise they belong to the current CUDA
device, and the work is put on that stream.
"""

FLOAT32: int
FLOAT16: int
BFLOAT16: int

def quantize_nf4(
    weight: int,
    dtype: int,
    numel: int,
    blocksize: int,
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

def dequantize_nf4(
    packed: int,
    absmax: int,
    nested_absmax: int,
    nested_offset: int,
    numel: int,
    blocksize: int,
    dtype: int,
    out: int,
    stream: int | None,
) -> None:
    """Write out [numel] of that dtype; a nested_absmax of 0 means that absmax is plain fp32."""

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
def nf4_encode(scaled: float) -> int: ...
def nf4_decode(code: int) -> float: ...
def dynamic_encode(scaled: float) -> int: ...
def dynamic_decode(code: int) -> float: ...
