"""Who meets whom, in what, and what is promised."""

from __future__ import annotations

import json

import attrs

__all__ = [
    "BF16",
    "CASES",
    "GPU_CASES",
    "GROUPS",
    "GROWTH",
    "GROWTH_BASE",
    "OURS",
    "OURS_FP32",
    "PEFT_BNB",
    "TRANSFORMERS_BNB",
    "TRL_BF16",
    "TRL_BNB",
    "TRL_BNB_EAGER",
    "TRL_FP32",
    "UNITS",
    "Bar",
    "Case",
    "Job",
]

OURS = "ours"
OURS_FP32 = "ours, computing in fp32"
TRL_BNB = "TRL + PEFT + bitsandbytes"
TRL_BNB_EAGER = "TRL + PEFT + bitsandbytes, eager attention"
TRL_BF16 = "TRL + PEFT, bf16 base"
TRL_FP32 = "TRL + PEFT, fp32 base"
TRANSFORMERS_BNB = "transformers + bitsandbytes"
PEFT_BNB = "PEFT + bitsandbytes"
BF16 = "transformers, bf16"

UNITS = {
    "tokens/s": "ours over theirs, at least",
    "s": "theirs over ours, at least",
    "MiB": "ours over theirs, at most",
    "loss": "largest difference at a step, at most",
    "relative loss": "largest difference at a step over theirs, at most",
    "kept": "tokens/s over theirs, over the same at 512 tokens, at least",
    "MiB a token": "the most that a doubling of a sample multiplies it by, at most",
}
"""What is measured, and what a bar compares."""


@attrs.frozen
class Bar:
    """What is promised against one other contestant; nothing if `limit` is None."""

    theirs: str
    limit: float | None = None
    """In the sense that `UNITS` gives to the unit of the case."""
    of: str = OURS
    """Whose side is compared with theirs."""


@attrs.frozen
class Case:
    """One thing that ours and others do, measured in one run."""

    name: str
    kind: str
    """What a worker does: a key of `jobs.KINDS`."""
    unit: str
    """A key of `UNITS`; the last two are those of `growth`."""
    bars: tuple[Bar, ...]
    group: str = ""
    """What --only calls it; the name, unless given."""
    checkpointing: bool = False
    """Recompute activations in the backward pass."""
    precision: str = "bf16"
    """"bf16" or "fp32": what ours computes in."""
    quantized: bool = True
    """Whether ours holds the base in NF4."""
    batch: int = 2
    """Sequences, pairs or prompts at once."""
    steps: int = 2
    """Steps in a turn; long ones need no company."""
    rounds: int | None = None
    """Turns a contestant takes; None leaves it to the run."""
    max_length: int | None = None
    """Tokens of a sequence; None leaves it to the run."""
    filled: bool = False
    """Each sequence is one sample that fills it; else SFT packs short ones."""
    tiny: bool = False
    """On a random two-layer Llama, whatever model the run is about."""
    large: bool = False
    """On a random Llama in the shape of an 8B one; on CUDA only."""
    company: str = ""
    """Cases that share it take turns, for what is promised compares one with another."""
    slow: bool = False
    """Only with --slow."""

    @property
    def contestants(self) -> tuple[str, ...]:
        """Everyone in it, ours first."""
        return tuple(dict.fromkeys((OURS, *(bar.theirs for bar in self.bars))))

    @property
    def asked_as(self) -> str:
        """What --only calls it."""
        return self.group or self.name

    @property
    def run_as(self) -> str:
        """What it is called while it runs, by itself or in company."""
        return self.company or self.name

    @property
    def alone(self) -> bool:
        """Whether each has the machine for itself, as its time plays no part."""
        return self.unit in ("MiB", "loss", "relative loss")


@attrs.frozen
class Job:
    """What a worker is started with."""

    kind: str
    contestant: str
    model: str
    """A Hugging Face directory in 16 or 32 bits."""
    rows: str
    """A file that `rows.write_rows` has written."""
    work: str
    """A directory for what trainers write."""
    checkpointing: bool
    precision: str
    quantized: bool
    batch: int
    max_length: int
    """Tokens of a sequence."""
    filled: bool
    """Each sequence is one sample that fills it."""
    turns: int
    steps_per_turn: int
    new_tokens: int
    """Generated in a turn, for each prompt."""
    device: str
    """"cpu" or "cuda"."""

    def to_json(self) -> str:
        """Return it as one argument of a command line."""
        return json.dumps(attrs.asdict(self))


_SFT_16BIT = "sft-16bit"

GROWTH = (256, 512, 1024, 2048, 4096)
"""Tokens of a sample in the cases of the group growth."""
GROWTH_BASE = 512
"""What the other lengths are compared with."""


def _grown(name: str, length: int, *, company: str = "", steps: int = 1, rounds: int = 1) -> Case:
    memory = not company
    return Case(
        name,
        "memory" if memory else "sft",
        "MiB" if memory else "tokens/s",
        (Bar(TRL_BNB),),  # what is promised is about all of them: see `growth`
        company or "growth-memory",
        checkpointing=memory,
        batch=1,
        steps=steps,
        rounds=rounds,
        max_length=length,
        filled=True,
        company=company,
        slow=True,
    )


def _growth_of_speed(length: int) -> tuple[Case, ...]:
    """Return a length, and the base that it takes turns with.

    A ratio to TRL moves by a fifth with the state of the machine, which lasts for minutes. Turns
    are of as many tokens at both lengths: what the turns of others leave behind, which may be all
    of the memory, then weighs alike.
    """
    # short turns, and many of them where they are short
    tokens = max(length, 1024)
    rounds = 15 if length <= 1024 else 7
    return tuple(
        _grown(name, each, company=f"growth-{length}", steps=tokens // each, rounds=rounds)
        for each, name in (
            (length, f"growth, {length} tokens"),
            (GROWTH_BASE, f"growth, {GROWTH_BASE} beside {length} tokens"),
        )
    )


CASES: tuple[Case, ...] = (
    Case("sft", "sft", "tokens/s", (Bar(TRL_BNB, 2.3),)),
    Case("sft-checkpointing", "sft", "tokens/s", (Bar(TRL_BNB, 2.0),), checkpointing=True),
    Case("dpo", "dpo", "s", (Bar(TRL_BNB, 2.0),), steps=1),
    Case(_SFT_16BIT, "sft", "tokens/s", (Bar(TRL_BF16, 1.5),)),
    Case("sft-16bit, memory", "memory", "MiB", (Bar(TRL_BF16, 0.5),), _SFT_16BIT, rounds=1),
    Case("memory", "memory", "MiB", (Bar(TRL_BNB, 0.5),), rounds=1),
    Case("load", "load", "s", (Bar(TRANSFORMERS_BNB, 3.0),)),
    Case(
        "decode, 1 prompt",
        "decode",
        "tokens/s",
        (Bar(BF16, 2.0), Bar(PEFT_BNB, 1.3)),
        "decode",
        batch=1,
        rounds=9,  # a turn is about a second
    ),
    Case(
        "decode, 8 prompts",
        "decode",
        "tokens/s",
        (Bar(BF16), Bar(PEFT_BNB, 2.0)),
        "decode",
        batch=8,
        rounds=9,
    ),
    Case(
        "loss, fp32, tiny Llama",
        "losses",
        "loss",
        (Bar(TRL_FP32, 1e-5),),
        "loss",
        precision="fp32",
        quantized=False,
        rounds=1,
        tiny=True,
    ),
    Case(
        "loss, bf16",
        "losses",
        "relative loss",
        # what fp32 makes of the same 4-bit weights shows whose rounding a difference is
        # and so does how far TRL is from itself with its other attention
        (Bar(TRL_BNB, 1e-2), Bar(OURS_FP32, 1e-2), Bar(TRL_BNB_EAGER, of=TRL_BNB)),
        "loss",
        rounds=1,
        slow=True,
    ),
    Case(
        "convergence",
        "convergence",
        "relative loss",
        (Bar(TRL_BNB, 5e-3),),
        batch=4,
        rounds=1,
        slow=True,
    ),
    *(case for length in GROWTH if length != GROWTH_BASE for case in _growth_of_speed(length)),
    *(_grown(f"growth, {length} tokens, memory", length) for length in GROWTH),
)


def _trained_8b(name: str, kind: str, unit: str, limit: float, rounds: int | None = None) -> Case:
    return Case(
        name,
        kind,
        unit,
        (Bar(TRL_BNB, limit),),
        "8B",
        checkpointing=True,
        batch=4,
        steps=1,
        rounds=rounds,
        max_length=2048,
        filled=True,
        large=True,
    )


GPU_CASES: tuple[Case, ...] = (
    _trained_8b("8B, sft-checkpointing", "sft", "tokens/s", 1.5),
    _trained_8b("8B, memory", "memory", "MiB", 0.7, rounds=1),
    Case(
        "8B, decode, 1 prompt",
        "decode",
        "tokens/s",
        (Bar(PEFT_BNB, 2.0),),
        "decode",
        batch=1,
        large=True,
    ),
)
"""What --device cuda runs."""

GROUPS = tuple(dict.fromkeys(case.asked_as for case in (*CASES, *GPU_CASES)))
"""What --only takes."""
