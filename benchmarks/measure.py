"""Takes the time: everyone in turn, round after round, in one process."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import attrs
import torch

__all__ = ["Budget", "CudaClock", "Samples", "Spread", "WallClock", "measure", "order", "ratio"]

Timer = Callable[[int], float]
"""Runs something that many times and returns the seconds that all of them took."""


@attrs.frozen
class Budget:
    """How long a case is measured: at least so many rounds and seconds, unless `limit` is hit."""

    rounds: int = 11
    seconds: float = 2.0
    limit: float = 30.0
    """From here on three rounds will do; who takes half of it for one call is called once."""
    sample: float = 2e-2
    """What is faster than this is called several times a round."""


@attrs.frozen
class Spread:
    """The median of some numbers, and their quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarize at least one number."""
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0])
        q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, q1, q3)


@attrs.frozen
class Samples:
    """Seconds per call, by contestant and round; only one of who is too slow to be repeated."""

    seconds: dict[str, list[float]]
    repeats: dict[str, int]
    """How often each was called in a round."""


class WallClock:
    """Time as a caller on the CPU sees it who makes the same call again and again.

    Libraries that bring an OpenMP runtime of their own leave threads that spin for a while after a
    call, and would take a core from whoever is next; so there is a pause first, and then a call
    that does not count, for threads to be awake.
    """

    def __init__(self, pause: float = 0.02) -> None:
        self._pause = pause

    def timer(self, call: Callable[[], object]) -> Timer:
        """Return a timer of `call`; each result is dropped before the next call."""

        def timed(repeats: int) -> float:
            if self._pause:
                time.sleep(self._pause)
                call()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return time.perf_counter() - start

        return timed


class CudaClock:
    """Time on the GPU between two events, with a cold L2 before each call.

    The GPU is kept waiting until the call is enqueued, so that this is the GPU's own time: in
    training it runs behind the host, unless the model is small.
    """

    _WAIT = 10_000_000
    """GPU cycles, about 6 ms: more than the host takes for any call."""

    def __init__(self, device: str) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._cold = torch.empty(max(4 * l2, 1 << 28), dtype=torch.uint8, device=device)

    def timer(self, call: Callable[[], object]) -> Timer:
        """Return a timer of `call`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def timed(repeats: int) -> float:
            milliseconds = 0.0
            for _ in range(repeats):
                self._cold.zero_()
                torch.cuda._sleep(self._WAIT)  # type: ignore[no-untyped-call]  # torch's own
                start.record()
                call()
                end.record()
                end.synchronize()
                milliseconds += start.elapsed_time(end)
            return milliseconds / 1e3

        return timed

    def graph_timer(self, call: Callable[[], object], calls: int) -> Timer:
        """Return a timer of one of `calls` calls that are captured in a CUDA graph and replayed.

        So decoding runs where it is fast: what the host takes for a launch is out of the picture.
        """
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(calls):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        replays = self.timer(graph.replay)

        def timed(repeats: int, of: Callable[[], object] = call) -> float:
            # `of` keeps alive the weights that the graph reads
            return replays(repeats) / calls

        return timed


_Name = TypeVar("_Name")


def order(names: Sequence[_Name], turn: int) -> list[_Name]:
    """Return who runs after whom in a round.

    Others begin and others precede each time, for who comes after a large copy finds cold caches.
    """
    first = turn % len(names) if names else 0
    rotated = [*names[first:], *names[:first]]
    return rotated[::-1] if turn % 2 else rotated


def measure(timers: Mapping[str, Timer], budget: Budget) -> Samples:
    """Warm all up, then time them in turn."""
    repeats: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    for name, timer in timers.items():
        once = timer(1)
        seconds[name] = []
        if once > budget.limit / 2:
            seconds[name] = [once]
            continue
        once = min(once, timer(1)) or 1e-9
        repeats[name] = min(max(1, math.ceil(budget.sample / once)), 10_000)
    names = list(repeats)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        turn = 0
        while names and not _enough(turn, time.perf_counter() - start, budget):
            for name in order(names, turn):
                seconds[name].append(timers[name](repeats[name]) / repeats[name])
            turn += 1
    finally:
        gc.enable()
    return Samples(seconds, {**dict.fromkeys(seconds, 1), **repeats})


def _enough(rounds: int, seconds: float, budget: Budget) -> bool:
    if seconds >= budget.limit:
        return rounds >= min(3, budget.rounds)
    return rounds >= budget.rounds and seconds >= budget.seconds


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Return how many times as long they take as we do, from what each round says of both.

    Who was called only once is compared with the other's median.
    """
    if len(theirs) == 1 or len(ours) == 1:
        return Spread.of([Spread.of(theirs).median / Spread.of(ours).median])
    return Spread.of(a / b for a, b in zip(theirs, ours, strict=True))
