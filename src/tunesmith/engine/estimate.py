"""What a training step will take: peak memory and time, predicted from shapes alone.

The model is built on torch's meta device, so no weight is read or allocated. Memory follows the
counting of Korthikanti et al. 2022 (arXiv:2205.05198), with what PEFT and fp32 losses add; time is
floating-point operations over a matmul rate that is measured here for a fraction of a second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import attrs

from tunesmith.data.examples import Conversation, Preference, Sourced
from tunesmith.plugin.conditions import Conditions, Piece
from tunesmith.plugin.fast import fuses_layers, why_all_logits
from tunesmith.plugin.methods import Method
from tunesmith.plugin.optimizers import optimizer_called
from tunesmith.plugin.quantizers import Quantizer
from tunesmith.plugin.trainers import Trainer

__all__ = ["Estimate", "Shapes", "estimate_step", "model_shapes", "optimizer_steps"]

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
CHARACTERS_PER_TOKEN = 3.6
"""English text in a byte-pair vocabulary of 32k to 150k, template tokens counted in."""
EFFICIENCY = 0.35
"""Share of the measured matmul rate that a whole training step reaches (SmolLM2-135M on a CPU)."""
SLACK = 1.25
"""What the allocator holds beyond the tensors, fitted on SmolLM2-135M with 128 to 512 tokens."""


@attrs.frozen
class Shapes:
    """The sizes of a model that memory and time depend on."""

    model: Any = attrs.field(repr=False)
    """The skeleton on the meta device."""
    linears: tuple[tuple[int, int], ...]
    """[out_features, in_features] of every linear layer but the head."""
    other_parameters: int
    """Embeddings, norms, biases, head."""
    hidden: int
    layers: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(out * into for out, into in self.linears) + self.other_parameters


@attrs.frozen
class Estimate:
    """Prediction for one training step."""

    weights_bytes: int
    adapter_bytes: int
    """Trained weights, their gradients and optimizer states."""
    activations_bytes: int
    tokens: int
    """Tokens of all passes over the data."""
    steps: int
    """Optimizer steps."""
    seconds: float
    trainable: int
    """Trained parameters."""
    rows: int
    """Rows that an update is over, of all processes."""
    speed: tuple[Piece, ...] = ()
    """What runs faster than the stock way, and what does not and why."""

    @property
    def memory_bytes(self) -> int:
        """Peak memory beyond the interpreter and its libraries."""
        return self.weights_bytes + self.adapter_bytes + self.activations_bytes


def model_shapes(model: Any) -> Shapes:
    """Return the shapes of a model, which may be on the meta device."""
    from torch import nn

    head = model.get_output_embeddings()
    linears = tuple(
        (module.out_features, module.in_features)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    text = model.config.get_text_config()
    return Shapes(
        model,
        linears,
        total - sum(out * into for out, into in linears),
        text.hidden_size,
        text.num_hidden_layers,
        text.vocab_size,
    )


def estimate_step(
    trainer: Trainer[Any],
    examples: Sequence[Sourced],
    quantizer: Quantizer[Any] | None,
    method: Method[Any] | None,
    shapes: Shapes,
    conditions: Conditions,
    device: str,
) -> Estimate:
    """Predict one training step's memory in bytes and time in seconds, for each process.

    `device` is a torch device string.
    """
    config = trainer.config
    itemsize = ITEMSIZE[conditions.precision]
    full = conditions.trains_base
    if quantizer is not None:
        found = quantizer.split(shapes.model)
        held = list(shapes.linears if found is None else found.targets.values())
        weights = sum(quantizer.nbytes(shape, itemsize) for shape in held)
        weights += (shapes.other_parameters if found is None else found.plain) * itemsize
        # one layer at a time, or one expert, is dequantized for its product
        workspace = max(shape[-2] * shape[-1] for shape in held) * itemsize
    else:
        weights = shapes.parameters * (4 if full else itemsize)
        workspace = 0
    if method is not None:
        wrapped = method.wrap(shapes.model)
        trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        method.unwrap(wrapped)  # the skeleton is used again for the next step
    else:
        trainable = shapes.parameters
    # fp32 weight (held already by full fine-tuning), gradient, and what the optimizer keeps
    states = optimizer_called(config.optimizer).state_bytes
    adapter = trainable * (4 * (1 if full else 2) + states)

    lengths = [_tokens(row) for row in examples]
    longest = min(max(lengths), config.max_length)
    rows_a_pass = config.batch_size * _sequences(examples[0])
    batch_tokens = rows_a_pass * (
        config.max_length if getattr(config, "packing", False) else longest
    )
    # Korthikanti et al. count 34 bytes a token and hidden unit in 16 bits, without the attention
    # matrix (fused attention does not keep it); what scales is the compute dtype. A fused LoRA
    # layer keeps its input and s = x At, and no copies of its input; fused norms and gated MLPs
    # keep what comes in and nothing in between
    linear_inputs = sum(into for _, into in shapes.linears) / max(1, shapes.layers)
    between = 0.8 if fuses_layers(config, device, adapter=not full) else 4.5
    a_layer = batch_tokens * itemsize * (1.6 * linear_inputs + between * shapes.hidden)
    kept = shapes.layers * batch_tokens * itemsize * shapes.hidden
    # a layer that is recomputed holds its activations and their gradients, and the allocator much
    # of the one before
    recomputed = 3 * a_layer + kept
    activations = recomputed if config.gradient_checkpointing else shapes.layers * a_layer
    # logits in the compute dtype; in fp32 shifted, their log-softmax, and two gradients
    logits = batch_tokens * shapes.vocabulary * (itemsize + 16)
    if why_all_logits(config, conditions) is None:
        from tunesmith.nn.head_logps import CHUNK_BYTES  # imports torch

        # those of a chunk, and what flows back into the hidden states
        chunk = CHUNK_BYTES // 4 * (itemsize + 16)
        logits = min(logits, chunk) + batch_tokens * shapes.hidden * itemsize
    epochs_tokens = sum(min(length, config.max_length) for length in lengths) * _sequences(
        examples[0]
    )
    per_step = config.batch_size * config.gradient_accumulation * conditions.processes
    steps, steps_an_epoch = optimizer_steps(config, len(lengths), conditions.processes)
    tokens = round(epochs_tokens * steps / steps_an_epoch)
    # forward 2, gradient of the input 2, gradient of the weights 2 where they are trained
    passes = 2 + 2 + (2 if method is None else 0) + (2 if config.gradient_checkpointing else 0)
    rate = _matmul_rate(device, conditions.precision) * EFFICIENCY
    seconds = tokens / conditions.processes * shapes.parameters * passes / rate
    return Estimate(
        weights_bytes=int(weights + workspace),
        adapter_bytes=int(adapter),
        activations_bytes=int((activations + logits) * SLACK),
        tokens=tokens,
        steps=steps,
        seconds=seconds,
        trainable=trainable,
        rows=per_step,
        speed=trainer.explain(conditions),
    )


def optimizer_steps(config: Any, rows: int, processes: int) -> tuple[int, int]:
    """Return the optimizer steps of a training over so many rows, and those of an epoch."""
    per_step = config.batch_size * config.gradient_accumulation * processes
    an_epoch = max(1, -(-rows // per_step))
    return config.max_steps or max(1, round(config.epochs * an_epoch)), an_epoch


def _sequences(row: Sourced) -> int:
    """Return how many sequences an example becomes in a batch."""
    return 2 if isinstance(row.example, Preference) else 1


def _tokens(row: Sourced) -> int:
    """Estimate the tokens of one sequence of an example."""
    example = row.example
    if isinstance(example, Conversation):
        characters = sum(len(message.content) for message in example.messages)
        turns = len(example.messages)
    elif isinstance(example, Preference):
        prompt = sum(len(message.content) for message in example.prompt)
        answers = max(
            sum(len(message.content) for message in side)
            for side in (example.chosen, example.rejected)
        )
        characters, turns = prompt + answers, len(example.prompt) + 1
    else:
        characters, turns = len(str(example)), 1
    return int(characters / CHARACTERS_PER_TOKEN) + 5 * turns + 12


@cache
def _matmul_rate(device: str, precision: str) -> float:
    """Measure floating-point operations a second of a matrix product, for about 0.2 s."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 1024 if device == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=dtype)

    def sync() -> None:
        if a.device.type == "cuda":
            torch.cuda.synchronize(a.device)

    a @ a
    sync()
    best = float("inf")
    stop = time.perf_counter() + 0.2
    while time.perf_counter() < stop:
        begin = time.perf_counter()
        a @ a
        sync()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
