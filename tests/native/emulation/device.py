"""Builds csrc/cuda for the CPU, and calls it like a device: each tensor in guarded memory.

cuda_runtime.h and emulation.cpp say how the emulation works and what it finds.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

EMULATION = Path(__file__).parent
CSRC = EMULATION.parents[2] / "csrc"
KERNELS = ("quantize", "dequantize", "elementwise", "linear_small")

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, "nf4": 3, "fp4": 4}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}

FLAGS = [
    *("-std=c++17", "-O0", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    # one rounding per operation, as nvcc is told, too
    "-ffp-contract=off",
    # CUDA reads memory by vectors of another type
    "-fno-strict-aliasing",
    # longjmp goes from fiber to fiber, which the checked one takes for an error
    "-U_FORTIFY_SOURCE",
    # emulation.cpp catches the traps
    *("-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error"),
    "-DTUNESMITH_CUDA",
]


def int64(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


class EmulationError(Exception):
    """What a kernel did that no device would forgive."""


def build(folder: Path, sources: list[Path]) -> Path:
    """Compile .cu files and the emulation to one library in `folder`."""
    compile_ = ["g++", *FLAGS, f"-I{EMULATION}", "-c"]
    objects, jobs = [], []
    for source in [*sources, EMULATION / "emulation.cpp"]:
        target = folder / f"{source.stem}.o"
        objects.append(target)
        # the emulation itself is not under test, and jumps in ways that the sanitizer need not like
        extra = ["-fno-sanitize=all"] if source.suffix == ".cpp" else []
        command = [*compile_, *extra, "-x", "c++", str(source), "-o", str(target)]
        jobs.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for command, job in jobs:
        error = job.communicate()[1]
        if job.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{error}")
    library = folder / "emulated.so"
    subprocess.run(["g++", "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library


class Linear(ctypes.Structure):
    """`tunesmith_linear` of kernels.h."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("type", ctypes.c_int),
        ("weight", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_offset", ctypes.c_void_p),
        ("blocksize", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("adapter_dtype", ctypes.c_int),
        ("lora_a", ctypes.c_void_p),
        ("lora_b", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("keep", ctypes.c_void_p),
        ("keep_scale", ctypes.c_float),
    )


class Device:
    """The kernels of one library, each call on buffers made for it."""

    STREAM = 0x5EED

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self.lib.emulation_allocate.restype = pointer
        self.lib.emulation_allocate.argtypes = [size, size]
        self.lib.emulation_free.argtypes = [pointer]
        self.lib.emulation_set_only_block.argtypes = [ctypes.c_int64]

    def set_order(self, order: int) -> None:
        """Let the threads of a block run ascending (0), descending (1) or shuffled (a seed)."""
        self.lib.emulation_set_order(order)

    def set_multiprocessors(self, count: int) -> None:
        """Change how large the device says that it is."""
        self.lib.emulation_set_multiprocessors(count)

    @contextlib.contextmanager
    def only_block(self, block: int) -> Iterator[None]:
        """Run only one block of each grid."""
        self.lib.emulation_set_only_block(block)
        try:
            yield
        finally:
            self.lib.emulation_set_only_block(-1)

    @contextlib.contextmanager
    def buffers(self) -> Iterator[Buffers]:
        """Yield an empty set of buffers, freed at the end."""
        buffers = Buffers(self.lib)
        try:
            yield buffers
        finally:
            buffers.free()

    def call(self, name: str, *args: object) -> None:
        """Call a function of kernels.h on the stream; raises what it returns."""
        function = getattr(self.lib, name)
        function.restype = ctypes.c_char_p
        error = function(*args, ctypes.c_void_p(self.STREAM))
        if error is not None:
            raise EmulationError(error.decode())

    def launches(self) -> tuple[int, int, int]:
        """Return launches since last asked, those on another stream, and most bytes shared."""
        on_another, shared_bytes = ctypes.c_int(), ctypes.c_size_t()
        count = self.lib.emulation_launches(
            ctypes.c_void_p(self.STREAM), ctypes.byref(on_another), ctypes.byref(shared_bytes)
        )
        return count, on_another.value, shared_bytes.value

    def quantize_4bit(
        self, weight: Tensor, blocksize: int, quant_type: str, misaligned: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """`misaligned` names tensors that shall lie an element beside a multiple of 16 bytes."""
        numel = weight.numel()
        with self.buffers() as put:
            packed = put.space((numel + 1) // 2, "packed" in misaligned)
            absmax = put.space(-(-numel // blocksize) * 4)
            self.call(
                "tunesmith_quantize_4bit_cuda",
                put.copy(weight, weight.element_size() * ("weight" in misaligned)),
                CODES[weight.dtype],
                *int64(numel, blocksize),
                CODES[quant_type],
                packed,
                absmax,
            )
            return put.read(packed, torch.uint8), put.read(absmax, torch.float32)

    def quantize_absmax(self, absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        blocks = absmax.numel()
        with self.buffers() as put:
            codes, nested_absmax = put.space(blocks), put.space(-(-blocks // 256) * 4)
            self.call(
                "tunesmith_quantize_absmax_cuda",
                put.copy(absmax),
                ctypes.c_int64(blocks),
                put.copy(offset),
                codes,
                nested_absmax,
            )
            return put.read(codes, torch.uint8), put.read(nested_absmax, torch.float32)

    def dequantize_4bit(
        self,
        packed: Tensor,
        scales: tuple[Tensor, Tensor | None, Tensor | None],
        numel: int,
        blocksize: int,
        quant_type: str,
        dtype: torch.dtype,
        misaligned: tuple[str, ...] = (),
    ) -> Tensor:
        size = dtype.itemsize
        with self.buffers() as put:
            out = put.space(numel * size, size * ("out" in misaligned))
            self.call(
                "tunesmith_dequantize_4bit_cuda",
                put.copy(packed, "packed" in misaligned),
                *map(put.copy, scales),
                *int64(numel, blocksize),
                CODES[quant_type],
                CODES[dtype],
                out,
            )
            return put.read(out, dtype)

    def linear_small(
        self,
        x: Tensor,
        packed: Tensor,
        scales: tuple[Tensor, Tensor | None, Tensor | None],
        out_features: int,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        misaligned: tuple[str, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        tokens, in_features = x.shape
        rank = 0 if lora_a is None else lora_a.shape[0]
        adapter_dtype = torch.float32 if lora_a is None else lora_a.dtype

        def beside(name: str, dtype: torch.dtype) -> int:
            return dtype.itemsize if name in misaligned else 0

        with self.buffers() as put:
            s = put.space(tokens * rank * 4)
            y = put.space(tokens * out_features * x.element_size(), beside("y", x.dtype))
            absmax, nested_absmax, nested_offset = map(put.copy, scales)
            linear = Linear(
                tokens,
                in_features,
                out_features,
                CODES[x.dtype],
                CODES[quant_type],
                put.copy(packed, beside("packed", packed.dtype)),
                absmax,
                nested_absmax,
                nested_offset,
                blocksize,
                put.copy(bias),
                rank,
                CODES[adapter_dtype],
                put.copy(lora_a, beside("lora_a", adapter_dtype)),
                put.copy(lora_b, beside("lora_b", adapter_dtype)),
                scaling,
                None,
                1.0,
            )
            self.call(
                "tunesmith_linear_small_cuda",
                ctypes.byref(linear),
                put.copy(x, beside("x", x.dtype)),
                s,
                y,
            )
            return (
                put.read(y, x.dtype).view(tokens, out_features),
                put.read(s, torch.float32).view(tokens, rank),
            )

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, from_one: bool, misaligned: bool = False
    ) -> tuple[Tensor, Tensor]:
        rows, columns = x.shape
        size = x.element_size()
        with self.buffers() as put:
            y, scale = put.space(x.numel() * size, size * misaligned), put.space(rows * 4)
            self.call(
                "tunesmith_rms_norm_cuda",
                put.copy(x),
                put.copy(weight),
                CODES[x.dtype],
                *int64(rows, columns),
                ctypes.c_float(eps),
                from_one,
                y,
                scale,
            )
            return put.read(y, x.dtype).view(x.shape), put.read(scale, torch.float32)

    def rms_norm_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        from_one: bool,
        misaligned: bool = False,
    ) -> Tensor:
        size = x.element_size()
        with self.buffers() as put:
            grad_x = put.space(x.numel() * size, size * misaligned)
            self.call(
                "tunesmith_rms_norm_backward_cuda",
                put.copy(grad_y),
                put.copy(x),
                put.copy(weight),
                put.copy(scale),
                CODES[x.dtype],
                *int64(*x.shape),
                from_one,
                grad_x,
            )
            return put.read(grad_x, x.dtype).view(x.shape)

    def gated(self, gate: Tensor, up: Tensor, activation: str, misaligned: bool = False) -> Tensor:
        size = gate.element_size()
        with self.buffers() as put:
            y = put.space(gate.numel() * size, size * misaligned)
            self.call(
                "tunesmith_gated_cuda",
                put.copy(gate),
                put.copy(up),
                CODES[gate.dtype],
                *int64(gate.numel()),
                ACTIVATIONS[activation],
                y,
            )
            return put.read(y, gate.dtype)

    def gated_backward(
        self, grad_y: Tensor, gate: Tensor, up: Tensor, activation: str, misaligned: bool = False
    ) -> tuple[Tensor, Tensor]:
        size = gate.element_size()
        with self.buffers() as put:
            grads = [put.space(gate.numel() * size, size * misaligned) for _ in range(2)]
            self.call(
                "tunesmith_gated_backward_cuda",
                *map(put.copy, (grad_y, gate, up)),
                CODES[gate.dtype],
                *int64(gate.numel()),
                ACTIVATIONS[activation],
                *grads,
            )
            grad_gate, grad_up = (put.read(grad, gate.dtype) for grad in grads)
            return grad_gate, grad_up

    def rotary(
        self, x: Tensor, cos: Tensor, sin: Tensor, backward: bool, misaligned: bool = False
    ) -> Tensor:
        """`x` is [tokens, heads, size], `cos` and `sin` [positions, size]."""
        tokens, heads, size = x.shape
        bytes_ = x.element_size()
        with self.buffers() as put:
            out = put.space(x.numel() * bytes_, bytes_ * misaligned)
            self.call(
                "tunesmith_rotary_cuda",
                *map(put.copy, (x, cos, sin)),
                CODES[x.dtype],
                *int64(tokens, len(cos), heads, size),
                backward,
                out,
            )
            return put.read(out, x.dtype).view(x.shape)

    def logps(
        self, logits: Tensor, labels: Tensor, slopes: bool, misaligned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities, and what is in the place of the logits then."""
        rows, columns = logits.shape
        with self.buffers() as put:
            place = put.copy(logits, logits.element_size() * misaligned)
            logps = put.space(rows * 4)
            self.call(
                "tunesmith_logps_cuda",
                place,
                put.copy(labels),
                CODES[logits.dtype],
                *int64(rows, columns),
                slopes,
                logps,
            )
            left = put.read(place, logits.dtype).view(logits.shape)
            return put.read(logps, torch.float32), left


class Buffers:
    """Buffers of one call. All that is handed out is ctypes pointers."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        self._sizes: dict[int, int] = {}

    def space(self, nbytes: int, misaligned: int = 0) -> ctypes.c_void_p:
        address = self._lib.emulation_allocate(nbytes, misaligned % 16)
        if address is None:
            raise MemoryError(f"no {nbytes} bytes for the emulation")
        self._sizes[address] = nbytes
        return ctypes.c_void_p(address)

    def copy(self, tensor: Tensor | None, misaligned: int = 0) -> ctypes.c_void_p | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        space = self.space(tensor.numel() * tensor.element_size(), misaligned)
        self.write(space, tensor)
        return space

    def write(self, space: ctypes.c_void_p, tensor: Tensor, start: int = 0) -> None:
        """Write from byte `start` on."""
        nbytes = tensor.numel() * tensor.element_size()
        assert start + nbytes <= self._sizes[space.value]
        ctypes.memmove(space.value + start, tensor.data_ptr(), nbytes)

    def read(self, space: ctypes.c_void_p, dtype: torch.dtype, start: int = 0) -> Tensor:
        """Read from byte `start` on."""
        nbytes = self._sizes[space.value] - start
        tensor = torch.empty(nbytes // dtype.itemsize, dtype=dtype)
        ctypes.memmove(tensor.data_ptr(), space.value + start, nbytes)
        return tensor

    def free(self) -> None:
        for address in self._sizes:
            self._lib.emulation_free(address)
        self._sizes.clear()
