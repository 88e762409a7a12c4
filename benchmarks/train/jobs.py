"""What a worker does when its turn comes. Imported in a worker only."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from benchmarks.train.cases import Job
from benchmarks.train.contestants import (
    Training,
    import_libraries,
    load_base,
    load_to_decode,
    make_trainer,
)
from benchmarks.train.rows import read_rows

__all__ = ["KINDS", "WAKING", "WARM_UP", "Parent", "PrivateMemory"]

WARM_UP = 2
"""Steps before the first turn, which do not count."""
WAKING = 1
"""Steps of each turn that do not count.

Who has slept through the turns of others finds nothing of its memory at hand, and on a virtual
machine not even mapped: a step of ours takes twice its time then.
"""
_MEMORY_STEPS = 3
_LOSS_STEPS = 30
_CONVERGENCE_STEPS = 200
_HELD_OUT = 100
"""Rows that are not learnt."""
_PROMPT_TOKENS = 32


class Parent(Protocol):
    """Whoever gives the turns."""

    def ready(self) -> None:
        """Say that the first turn may come."""

    def turn(self) -> bool:
        """Wait for a turn; False once there are no more."""

    def answer(self, *values: float, note: str = "") -> None:
        """Say what came out of the turn."""


class _TakesTurns(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Holds a trainer between two steps until its turn comes, and times its turns."""

    def __init__(self, job: Job, training: Training, parent: Parent) -> None:
        self.job = job
        self.training = training
        self.parent = parent
        self.began = 0.0
        self.waking = 0
        """The last step of the turn that does not count."""
        self.last = WARM_UP
        """The step that ends the turn."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer if a turn is over, and wait for the next one."""
        if state.global_step == self.waking:
            _wait_for(self.job)
            self.began = time.perf_counter()
        if state.global_step < self.last:
            return
        if self.last == WARM_UP:
            self.parent.ready()
        else:
            self._answer()
        if self.parent.turn():
            self.waking = self.last + WAKING
            self.last = self.waking + self.job.steps_per_turn
        else:
            control.should_training_stop = True

    def _answer(self) -> None:
        _wait_for(self.job)
        seconds = time.perf_counter() - self.began
        steps = self.job.steps_per_turn
        if self.job.kind == "sft":
            tokens = sum(self.training.tokens[self.last - steps : self.last])
            self.parent.answer(tokens / seconds)
            return
        note = ""
        if self.training.reference is not None:
            self.training.reference(steps)
            alone = seconds
            seconds = time.perf_counter() - self.began
            note = f"reference's pass included; the step alone {alone / steps:.3g} s"
        tokens = sum(self.training.tokens[self.last - steps : self.last]) // steps
        self.parent.answer(seconds / steps, note=f"{note}; {tokens} tokens".lstrip("; "))


def _train(job: Job, parent: Parent) -> None:
    steps = WARM_UP + job.turns * (WAKING + job.steps_per_turn)
    # one more, so that there is a step to be stopped before
    training = make_trainer(job, _rows(job, steps + 1), steps + 1, packing=_packing(job))
    training.trainer.add_callback(_TakesTurns(job, training, parent))
    training.trainer.train()


def _load(job: Job, parent: Parent) -> None:
    load_base(job)
    gc.collect()
    _timed(parent, lambda: load_base(job), lambda seconds: seconds)


def _decode(job: Job, parent: Parent) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    rows = read_rows(Path(job.rows)).answers
    texts = (tokenizer(f"{prompt} {answer}")["input_ids"] for prompt, answer in rows)
    # of one length: padding would be work that only some leave out
    prompts = [ids[:_PROMPT_TOKENS] for ids in texts if len(ids) >= _PROMPT_TOKENS][: job.batch]
    ids = torch.tensor(prompts, device=job.device)  # [prompts, tokens]
    decode = load_to_decode(job)

    def generate() -> Any:
        with torch.no_grad():
            found = decode(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job.new_tokens,
                min_new_tokens=job.new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        _wait_for(job)
        return found

    new = generate().numel() - ids.numel()
    assert new == job.batch * job.new_tokens
    _timed(parent, generate, lambda seconds: new / seconds)


def _wait_for(job: Job) -> None:
    """Wait until all that was asked of the device is done."""
    if job.device == "cuda":
        torch.cuda.synchronize()


def _timed(parent: Parent, call: Callable[[], object], answer: Callable[[float], float]) -> None:
    parent.ready()
    while parent.turn():
        call()  # see WAKING
        gc.collect()
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result  # a model is let go of outside of what is timed
        gc.collect()
        parent.answer(answer(seconds))


def _memory(job: Job, parent: Parent) -> None:
    import_libraries(job.contestant)
    parent.ready()
    while parent.turn():
        with PrivateMemory() as memory:
            rows = _rows(job, _MEMORY_STEPS)
            training = make_trainer(job, rows, _MEMORY_STEPS, packing=_packing(job))
            training.trainer.train()
        if job.device == "cuda":
            reserved = torch.cuda.max_memory_reserved() / 2**20
            parent.answer(
                torch.cuda.max_memory_allocated() / 2**20, note=f"reserved {reserved:.0f}"
            )
            continue
        resident = f"resident, with mapped files, {memory.resident / 2**20:.0f} MiB"
        parent.answer(memory.peak / 2**20, note=resident)


class PrivateMemory:
    """Watches how far the process's own memory rises above what it was at the start, in bytes.

    Pages of a file that is mapped can be dropped at any time and do not count in `peak`;
    in `resident` they do.
    """

    def __enter__(self) -> PrivateMemory:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
        self._before, self._before_resident = _status("RssAnon"), _status("VmRSS")
        self.peak = self.resident = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(1e-3):
            self.peak = max(self.peak, _status("RssAnon") - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.resident = _status("VmHWM") - self._before_resident


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _losses(job: Job, parent: Parent) -> None:
    training = make_trainer(job, _rows(job, _LOSS_STEPS), _LOSS_STEPS, packing=False)
    trainer = training.trainer
    _start_alike(trainer.model, "lora_")
    step = trainer.training_step
    losses: list[float] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        losses.append(float(loss))  # the log would round it
        return loss

    trainer.training_step = noted
    parent.ready()
    while parent.turn():
        trainer.train()
        mean = statistics.fmean(losses)
        parent.answer(*losses, note=f"{losses[0]:.4f} to {losses[-1]:.4f}, mean {mean:.4f}")


def _start_alike(model: torch.nn.Module, which: str) -> None:
    """Give the adapters that are called so the weights that everyone's begin with."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if which in name:
            start = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(start)


def _convergence(job: Job, parent: Parent) -> None:
    answers = _rows(job, _CONVERGENCE_STEPS)
    held_out, learnt = answers[:_HELD_OUT], answers[_HELD_OUT:]
    trainer = make_trainer(job, learnt, _CONVERGENCE_STEPS, packing=False).trainer
    _start_alike(trainer.model, "lora_A")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    parent.ready()
    while parent.turn():
        before = _held_out_loss(trainer.model, tokenizer, held_out, job.max_length)
        trainer.train()
        after = _held_out_loss(trainer.model, tokenizer, held_out, job.max_length)
        steps = trainer.state.global_step
        parent.answer(after, note=f"from {before:.4f} to {after:.4f} in {steps} steps")


def _held_out_loss(
    model: torch.nn.Module, tokenizer: Any, answers: Sequence[tuple[str, ...]], max_length: int
) -> float:
    """Return the mean negative log-likelihood of the answers' tokens, from fp32 logits.

    The model is in training mode, as no dropout is set: in the other one bitsandbytes repacks its
    weights for good.
    """
    model.train()
    total, count = 0.0, 0
    for prompt, answer in answers:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"][:max_length]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        wanted = ids[0, start:]
        logps = logits[start - 1 : -1].float().log_softmax(-1)
        total -= float(logps.gather(1, wanted[:, None]).sum())
        count += len(wanted)
    return total / count


def _rows(job: Job, steps: int) -> list[tuple[str, ...]]:
    """Return what a trainer that takes so many steps learns from."""
    rows = read_rows(Path(job.rows))
    if job.kind == "dpo":
        return list(rows.pairs[: job.batch * steps])
    if job.filled:
        return [(prompt, chosen) for prompt, chosen, _ in rows.pairs[: job.batch * steps]]
    return list(rows.answers)


def _packing(job: Job) -> bool:
    return job.kind != "dpo" and not job.filled


KINDS: dict[str, Callable[[Job, Parent], None]] = {
    "sft": _train,
    "dpo": _train,
    "load": _load,
    "decode": _decode,
    "memory": _memory,
    "losses": _losses,
    "convergence": _convergence,
}
"""What a case's kind stands for."""
