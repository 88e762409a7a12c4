"""Runs a case: everyone gets ready, shows that the result is right, and is timed in turn."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contestants import Contestant, Entry, Unavailable
from benchmarks.inputs import answer, inputs_of
from benchmarks.limits import Rates, bytes_moved, limit_of
from benchmarks.machine import last_level_cache
from benchmarks.measure import Budget, CudaClock, Timer, WallClock, measure
from benchmarks.results import CaseResult, Timing

__all__ = ["copies_of", "run_case", "take_turns"]

TOLERANCE = 0.2
"""Of the norm; 4 bits cost about 0.1. It tells right from wrong, no more: the tests do the rest."""


def run_case(
    case: Case,
    contestants: Sequence[Contestant],
    *,
    device: str,
    clock: WallClock | CudaClock,
    budget: Budget,
    rates: Rates,
) -> CaseResult:
    """Measure a case; whoever cannot run, fails or is wrong is named in `not_run`."""
    inputs = inputs_of(case, device)
    right = answer(case, inputs)
    copies = copies_of(case, device)
    entries: dict[str, Entry] = {}
    timers: dict[str, Timer] = {}
    not_run: dict[str, str] = {}
    mode = torch.inference_mode if case.op == "decode" else contextlib.nullcontext
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries, about what is not asked here
        for contestant in contestants:
            try:
                entry = contestant.prepare(case, inputs)
                if entry is None:
                    continue
                stack.callback(entry.close)
                call = _several(entry, copies)
                with mode():
                    wrong = _compare(entry.call(), right) if entry.timer is None else ""
                    for _ in range(copies if copies > 1 else 0):
                        call()  # some change their weight the first time
                    timer = entry.timer or _timer(clock, call, copies)
            except Unavailable as why:
                not_run[contestant.name] = str(why)
            except Exception as error:  # a contestant that breaks must not end the run
                not_run[contestant.name] = f"failed: {type(error).__name__}: {error}"
            else:
                if wrong:
                    not_run[contestant.name] = wrong
                    continue
                entries[contestant.name] = entry
                timers[contestant.name] = timer
        with mode():
            samples = measure(timers, budget)
        timings = tuple(
            Timing(
                name,
                [seconds * entries[name].scale for seconds in found],
                samples.repeats[name],
                entries[name].note(),
            )
            for name, found in samples.seconds.items()
        )
    return CaseResult(case, timings, not_run, limit_of(case, rates), copies)


def copies_of(case: Case, device: str) -> int:
    """Return how many weights are taken in turn, so that the next one is not in a cache.

    A model in use streams through all its weights for each token. Only decoding is bound by that.
    """
    if case.suite != "decode":
        return 1
    if device == "cpu":
        enough = min(2 * last_level_cache(), 128 << 20)
    else:
        enough = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(256, -(-enough // bytes_moved(attrs.evolve(case, adapter=False)))))


def _timer(clock: WallClock | CudaClock, call: Callable[[], object], copies: int) -> Timer:
    if isinstance(clock, CudaClock) and copies > 1:
        return clock.graph_timer(call, copies)
    return clock.timer(call)


def take_turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a call that does the next one each time."""
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call


def _several(entry: Entry, copies: int) -> Callable[[], object]:
    if copies == 1:
        return entry.call
    another = entry.another or functools.partial(copy.deepcopy, entry.call)
    return take_turns([entry.call, *(another() for _ in range(copies - 1))])


def _compare(result: object, right: tuple[Tensor, ...] | None) -> str:
    """Return what is wrong with a result; empty if nothing is."""
    if right is None or result is None:
        return ""
    tensors = (result,) if isinstance(result, Tensor) else result
    assert isinstance(tensors, tuple)
    for ours, theirs in zip(tensors, right, strict=True):
        off = float((ours.float() - theirs).norm() / theirs.norm())
        if not off < TOLERANCE:
            return f"wrong result: off by {off:.2g} of the norm"
    return ""
