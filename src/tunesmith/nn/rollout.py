"""Rollout: sampled continuations of prompts, with the log-probability of every token.

One generator for trainers that learn from what a model says, for metrics of answers, for previews
and for chat.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tunesmith.data.render import IGNORE_INDEX
from tunesmith.errors import OpError
from tunesmith.modes import in_mode
from tunesmith.nn import decoder
from tunesmith.nn.head_logps import Headless
from tunesmith.nn.logps import logps_of_logits

__all__ = ["LOGITS_BYTES", "Rollout", "Sampling", "roll_out", "token_logps"]

LOGITS_BYTES = 1 << 30
"""How much the logits of a pass without gradients may take in fp32, unless one row takes more."""


@attrs.frozen(kw_only=True)
class Sampling:
    """How tokens are chosen; all there is to it, whatever a model's own generation config says."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Of the likeliest tokens only so many are chosen from as sum up to this probability."""
    top_k: int = 0
    """Only so many of the likeliest tokens are chosen from; 0 is all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that have come up are divided by it, or multiplied if below 0 (CTRL,
    arXiv:1909.05858)."""
    min_new_tokens: int = 0
    """No row ends before."""

    def __attrs_post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0)):
            if getattr(self, name) < least:
                raise OpError(f"{name}: got {getattr(self, name)}; expected {least} or more")
        if self.min_new_tokens > self.max_new_tokens:
            raise OpError(
                f"min_new_tokens: got {self.min_new_tokens}; expected at most max_new_tokens, "
                f"which is {self.max_new_tokens}"
            )
        if not self.temperature >= 0:
            raise OpError(f"temperature: got {self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise OpError(f"top_p: got {self.top_p}; expected more than 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise OpError(f"repetition_penalty: got {self.repetition_penalty}; expected above 0")


@attrs.frozen(eq=False)
class Rollout:
    """What a model said to each prompt: a row for each, `samples` rows in a row for one prompt."""

    prompts: tuple[tuple[int, ...], ...]
    """The prompt of each row."""
    completion_ids: Tensor
    """int64 [rows, new tokens], filled up with the padding id on the right."""
    completion_mask: Tensor
    """bool [rows, new tokens]: true for what was said, the token that stopped it included."""
    finished: Tensor
    """bool [rows]: whether a stop token came, or `stops` held; if not, max_new_tokens had."""
    logps: Tensor | None
    """fp32 [rows, new tokens]: log-probability of each token as the model has it, whatever the
    sampling (logits at temperature 1, no token left out); 0 where nothing was said. None if it was
    not asked for."""
    sampled_logps: Tensor | None = None
    """fp32 [rows, new tokens]: log-probability with which each token was drawn, after penalty,
    temperature, top_k and top_p; 0 where nothing was said, and everywhere at temperature 0. None if
    it was not asked for."""

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """Why each row ended: "stop", or "length" for one that had all its max_new_tokens."""
        return tuple("stop" if each else "length" for each in self.finished.tolist())

    def completions(self) -> list[list[int]]:
        """Return what was said in each row, as ids, the stop token included."""
        pairs = zip(self.completion_ids.tolist(), self.completion_mask.tolist(), strict=True)
        return [[i for i, said in zip(ids, mask, strict=True) if said] for ids, mask in pairs]


def roll_out(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    samples: int = 1,
    seed: int | torch.Generator | None = None,
    stops: Callable[[list[int]], bool] | None = None,
    logps: bool = True,
    sampled_logps: bool = False,
    batch_size: int = 64,
) -> Rollout:
    """Return what a model says to prompts of ids, each answered `samples` times.

    A row ends with one of `stop_ids`, or where `stops` is true of its ids so far (asked after each
    token). Rows go through the model `batch_size` at a time; those of other lengths are padded
    where the model gives them the same numbers, and are decoded by length where it does not. The
    model is left as it was; nothing has a gradient.

    Each row has random numbers of its own. They come from `seed`, the ids of its prompt and how
    many rows before it have the same prompt, and from nothing else: not from other prompts and
    their order, not from batch_size, not from the device, and no other random number is drawn.
    `samples=2` is as the prompt given twice. What rounding does remains: logits of a row differ in
    their last bits from batch to batch, and a token at the very border of its chance may then be
    another. A `seed` that is a torch.Generator gives one number a call; None takes that one from
    torch's own, for the CPU. Greedy rows (temperature 0) draw nothing.

    Errors: `OpError` for an empty prompt, one longer than the model has positions, and numbers that
    make no sense.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise OpError(f"{name}: got {value}; expected 1 or more")
    rows = [tuple(map(int, prompt)) for prompt in prompts for _ in range(samples)]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise OpError(f"prompt {empty[0] // samples + 1} has no tokens; give it one at least")
    model = _bare(model)
    device = next(model.parameters()).device
    draws = _draws(rows, sampling, seed)  # [rows, max_new_tokens]
    said: list[_Said] = [_Said([], False, []) for _ in rows]
    with in_mode(model, training=False), _without_defaults(model), torch.no_grad():
        for numbers in _batches(model, rows, pad_id, batch_size):
            try:
                answers = _decode(
                    model,
                    [rows[number] for number in numbers],
                    sampling,
                    _Chooser(sampling, None if draws is None else draws[numbers].to(device)),
                    _Ends(len(numbers), set(stop_ids), stops, sampling.min_new_tokens),
                    pad_id,
                    device,
                )
            except IndexError as error:
                longest = max(numbers, key=lambda number: len(rows[number]))
                beyond = _beyond(model, len(rows[longest]), sampling.max_new_tokens)
                if beyond is None:
                    raise
                raise OpError(f"prompt {longest // samples + 1} {beyond}") from error
            for number, answer in zip(numbers, answers, strict=True):
                said[number] = answer
        completions = [each.ids for each in said]
        found = None
        if logps:
            found = token_logps(model, rows, completions, pad_id=pad_id, batch_size=batch_size)
    ids, mask = _padded(completions, pad_id, device)
    drawn = None
    if sampled_logps:
        drawn = torch.zeros(mask.shape, dtype=torch.float32)
        for number, each in enumerate(said):
            drawn[number, : len(each.logps)] = torch.tensor(each.logps)
        drawn = drawn.to(device)
    finished = torch.tensor([each.finished for each in said], dtype=torch.bool, device=device)
    return Rollout(tuple(rows), ids, mask, finished, found, drawn)


def token_logps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int = 64,
) -> Tensor:
    """Return the log-probability of each token of completions: fp32 [rows, longest completion].

    0 where a completion has ended. Prompt and completion are read in one pass, in the mode that the
    model is in; gradients flow if they are on. A pass has `batch_size` rows, fewer without
    gradients where their logits would take more than LOGITS_BYTES. `model` may be a `Headless`
    (`split_head`), whose logits are never held.
    """
    if len(prompts) != len(completions):
        raise OpError(
            f"completions: got {len(completions)} of {len(prompts)} prompts; give one to each"
        )
    inner = model.body if isinstance(model, Headless) else model
    device = next(inner.parameters()).device
    width = max((len(each) for each in completions), default=0)
    parts = []
    for part in _passes(model, prompts, completions, batch_size):
        rows = [(list(prompts[number]), list(completions[number])) for number in part]
        # on the right, where no token sees it
        ids, mask = _padded([prompt + said for prompt, said in rows], pad_id, device)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for number, (prompt, said) in enumerate(rows):
            if said and not prompt:
                raise OpError(f"prompt {part[number] + 1} has no tokens; give it one at least")
            place = slice(len(prompt), len(prompt) + len(said))
            labels[number, place] = ids[number, place]
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if isinstance(model, Headless):
            found, _ = model.token_logps(inputs, labels)
        else:
            found, _ = logps_of_logits(model(**inputs, use_cache=False).logits, labels)
        lengths = torch.tensor([len(said) for _, said in rows], device=device)
        held = torch.arange(width, device=device)[None] < lengths[:, None]
        empty = torch.zeros(len(rows), width, dtype=torch.float32, device=device)
        parts.append(empty.masked_scatter(held, found))
    if not parts:
        return torch.zeros(0, 0, dtype=torch.float32, device=device)
    return torch.cat(parts)


def _passes(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], most: int
) -> Iterator[range]:
    """Yield the numbers of rows that are read together."""
    lengths = [len(a) + len(b) for a, b in zip(prompts, completions, strict=True)]
    a_token = 0
    if not isinstance(model, Headless) and not torch.is_grad_enabled():
        a_token = 4 * _bare(model).get_input_embeddings().num_embeddings
    start = 0
    while start < len(lengths):
        end, longest = start + 1, lengths[start]
        while end < min(len(lengths), start + most):
            longest = max(longest, lengths[end])
            if (end + 1 - start) * longest * a_token > LOGITS_BYTES:
                break
            end += 1
        yield range(start, end)
        start = end


@attrs.frozen(eq=False)
class _Said:
    """A row's answer: its ids, whether it stopped by itself, and how likely each was drawn."""

    ids: list[int]
    finished: bool
    logps: list[float]


def _without_cache(
    model: Any,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    eos_token_id: list[int] | None,
    pad_token_id: int,
    stopping_criteria: Sequence[_Ends],
    logits_processor: Sequence[_Chooser] = (),
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    **_: Any,
) -> Tensor:
    """Do what generate() does with such options, by a pass over all tokens for each that comes."""
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    prompts = [
        [i for i, real in zip(ids, mask, strict=True) if real]
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
    ]
    rows, device = [list(prompt) for prompt in prompts], input_ids.device
    output = input_ids
    for step in range(max_new_tokens):
        ids, mask = _padded(rows, pad_token_id, device)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        last = mask.sum(-1) - 1 + logits.shape[1] - ids.shape[1]
        scores = logits[torch.arange(len(rows), device=device), last].float()
        if repetition_penalty != 1.0:
            penalty = RepetitionPenaltyLogitsProcessor(repetition_penalty)
            scores = penalty(torch.where(mask, ids, ids[:, :1]), scores)
        if step < min_new_tokens and eos_token_id:
            scores[:, eos_token_id] = -torch.inf
        for processor in logits_processor:
            scores = processor(output, scores)
        chosen = scores.argmax(-1)
        output = torch.cat([output, chosen[:, None]], 1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)
        if all(bool(each(output, None).all()) for each in stopping_criteria):
            break
    return output


def _bare(model: Any) -> Any:
    # DistributedDataParallel has none of a model's methods, and is for gradients only
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def _decode(
    model: Any,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    chooser: _Chooser,
    ends: _Ends,
    pad_id: int,
    device: torch.device,
) -> list[_Said]:
    ids, mask = _padded(rows, pad_id, device, left=True)
    options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens}
    if sampling.repetition_penalty != 1.0:
        options["repetition_penalty"] = float(sampling.repetition_penalty)
    if sampling.min_new_tokens:
        options["min_new_tokens"] = sampling.min_new_tokens
    if sampling.temperature > 0:  # else the likeliest of what is left of the logits is taken
        options["logits_processor"] = [chooser]
    cached = _takes_cache(model, pad_id)
    if ends.stops is not None or not cached:  # generate() minds stop_ids by itself
        options["stopping_criteria"] = [ends]
    how = decoder.generate if cached else _without_cache
    output = how(
        model,
        input_ids=ids,
        attention_mask=mask.long(),
        do_sample=False,
        eos_token_id=sorted(ends.stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **options,
    )
    logps = chooser.logps()
    answers = []
    for number, row in enumerate(output[:, ids.shape[1] :].tolist()):
        end = ends.end(number, row)
        said = row if end is None else row[:end]
        answers.append(_Said(said, end is not None, logps[number][: len(said)] if logps else []))
    return answers


def _beyond(model: Any, tokens: int, more: int) -> str | None:
    """Return what is wrong with a prompt if a model's table of positions is too short for it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or tokens + more - 1 <= limit:
        return None
    if tokens > limit:
        return f"has {tokens} tokens, and the model has {limit} positions, no more; shorten it"
    return (
        f"has {tokens} tokens and max_new_tokens is {more}, but the model has {limit} positions, "
        f"no more; ask for {limit + 1 - tokens} new tokens or less, or shorten the prompt"
    )


def _draws(
    rows: Sequence[tuple[int, ...]], sampling: Sampling, seed: int | torch.Generator | None
) -> Tensor | None:
    """Return a number from 0 to 1 for each token that may come: fp64 [rows, max_new_tokens]."""
    if sampling.temperature == 0 or not rows:
        return None
    if not isinstance(seed, int):
        where = "cpu" if seed is None else seed.device
        seed = int(torch.randint(1 << 62, (), generator=seed, device=where))
    before: Counter[tuple[int, ...]] = Counter()
    draws = []
    for row in rows:
        name = repr((int(seed), row, before[row])).encode()
        before[row] += 1
        own = torch.Generator()
        own.manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little"))
        draws.append(torch.randint(1 << 32, (sampling.max_new_tokens,), generator=own))
    return torch.stack(draws).double() / (1 << 32)


class _Chooser:
    """Draws tokens, as the last of the logits' processors: what it returns has one left to take.

    So every loop that takes the likeliest token takes the one that was drawn.
    """

    def __init__(self, sampling: Sampling, draws: Tensor | None) -> None:
        from transformers.generation import logits_process as stock

        self._draws = draws
        self._warpers: list[Any] = []
        if sampling.temperature not in (0, 1):
            self._warpers.append(stock.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._warpers.append(stock.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(stock.TopPLogitsWarper(float(sampling.top_p)))
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [rows, vocabulary]: 0 for the token drawn, -inf for all others."""
        assert self._draws is not None
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        logps = scores.float().log_softmax(-1)
        # the first token whose chance and those before it reach beyond the number drawn
        reach = logps.double().exp().cumsum(-1)
        draw = self._draws[:, len(self._logps), None] * reach[:, -1:]
        chosen = torch.searchsorted(reach, draw, right=True)  # [rows, 1]
        self._logps.append(logps.gather(1, chosen))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def logps(self) -> list[list[float]]:
        """Return the log-probability of each token drawn, by row; those after a row's end too."""
        return torch.cat(self._logps, 1).tolist() if self._logps else []


class _Ends:
    """Says which rows are to end, as a stopping criterion, and keeps after how many tokens."""

    def __init__(
        self,
        rows: int,
        stop_ids: set[int],
        stops: Callable[[list[int]], bool] | None,
        least: int,
    ) -> None:
        self.stop_ids = stop_ids
        self.at: dict[int, int] = {}
        self.stops, self._least = stops, least
        self._said: list[list[int]] = [[] for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return bool [rows]: whether each has ended. Called once after each new token."""
        for number, token in enumerate(input_ids[:, -1].tolist()):
            if number in self.at:
                continue
            said = self._said[number]
            said.append(token)
            if len(said) < self._least:
                continue
            if token in self.stop_ids or (self.stops is not None and self.stops(list(said))):
                self.at[number] = len(said)
        ended = [number in self.at for number in range(len(self._said))]
        return torch.tensor(ended, device=input_ids.device)

    def end(self, number: int, said: list[int]) -> int | None:
        """Return after how many of its tokens a row ended, or None if it was cut."""
        if self._said[number]:  # it was asked
            return self.at.get(number)
        return next((at for at, token in enumerate(said, 1) if token in self.stop_ids), None)


def _batches(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, batch_size: int
) -> Iterator[list[int]]:
    """Yield the numbers of rows that are decoded together."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    apart = (
        len({len(row) for row in rows}) > 1
        and _takes_cache(model, pad_id)
        and not _takes_padding(model, pad_id)
    )
    start = 0
    while start < len(order):
        end = min(start + batch_size, len(order))
        if apart:
            length = len(rows[order[start]])
            end = next((at for at in range(start, end) if len(rows[order[at]]) != length), end)
        yield order[start:end]
        start = end


@attrs.define
class _Tried:
    """What generate() was found to be good for; None is what was not tried yet."""

    cached: bool | None = None
    padded: bool | None = None


_TRIED: WeakKeyDictionary[Any, _Tried] = WeakKeyDictionary()
_SHORT, _LONG, _MORE = 4, 9, 3


def _takes_cache(model: Any, pad_id: int) -> bool:
    """Whether decoding with a cache has the logits of a pass over all tokens; tried once.

    Some families count positions in another way there, or put tokens of their own at the end.
    """
    tried = _TRIED.setdefault(model, _Tried())
    if tried.cached is None:
        off = _off(model, [_LONG], pad_id)
        tried.cached = off <= (1e-3 if _exact(model) else 0.25)
        if not tried.cached:
            logging.getLogger("tunesmith").warning(
                "decoding: every token anew from the whole row, which is slow: of a %s, "
                "transformers' generate() has other logits than a pass over all tokens",
                type(model).__name__,
            )
    return tried.cached


def _takes_padding(model: Any, pad_id: int) -> bool:
    """Whether a row gets the logits it has alone where padding stands before it; tried once."""
    tried = _TRIED.setdefault(model, _Tried())
    if tried.padded is None:
        tried.padded = _off(model, [_SHORT, _LONG], pad_id) <= (1e-3 if _exact(model) else 5e-2)
    return tried.padded


def _exact(model: Any) -> bool:
    return model.get_input_embeddings().weight.dtype in (torch.float32, torch.float64)


def _off(model: Any, lengths: Sequence[int], pad_id: int) -> float:
    """Return how far decoding together is from a pass over each row, as a share of the logits."""
    device = next(model.parameters()).device
    size = model.get_input_embeddings().num_embeddings
    rows = [[(7919 * k + 5) % size for k in range(1, length + _MORE)] for length in lengths]
    made_up = _MadeUp([row[1 - _MORE :] for row in rows])
    ids, mask = _padded([row[: 1 - _MORE] for row in rows], pad_id, device, left=True)
    try:
        decoder.generate(
            model,
            input_ids=ids,
            attention_mask=mask.long(),
            do_sample=False,
            max_new_tokens=_MORE,
            pad_token_id=pad_id,
            use_cache=True,
            logits_processor=[made_up],
        )
    except Exception:  # whatever a stranger's model raises at made-up tokens
        return float("inf")
    off = 0.0
    for number, row in enumerate(rows):
        whole = torch.tensor([row], device=device)
        mask = torch.ones_like(whole)
        right = model(input_ids=whole, attention_mask=mask, use_cache=False).logits[0, -_MORE:]
        ours = torch.stack([scores[number] for scores in made_up.scores])
        ours, right = ours.double(), right.double()
        off = max(off, float(((ours - right).norm(dim=-1) / right.norm(dim=-1)).max()))
    return off


class _MadeUp:
    """Lets decoding go along given tokens, as the last of the logits' processors."""

    def __init__(self, tokens: list[list[int]]) -> None:
        self._tokens = tokens
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [rows, vocabulary] that have one token left, and keep those that came."""
        step = len(self.scores)
        self.scores.append(scores.clone())
        if step >= len(self._tokens[0]):
            return scores
        chosen = torch.tensor([[row[step]] for row in self._tokens], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ids int64 [rows, longest] and where they are none of padding, bool."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, part] = torch.tensor(list(row), dtype=torch.int64)
        mask[number, part] = True
    return ids.to(device), mask.to(device)


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Keep a model's own generation config out of it: what it suppresses, penalises, stops at."""
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.generation_config
    bare = GenerationConfig()
    for name in _KEPT:
        setattr(bare, name, getattr(before, name, None))
    inner.generation_config = bare
    try:
        yield
    finally:
        inner.generation_config = before


# of a model's own generation config: how it is computed, not which tokens come
_KEPT = ("cache_implementation", "cache_config", "compile_config", "disable_compile")
