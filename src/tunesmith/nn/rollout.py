"""Rollout: sampled continuations of prompts, with the log-probability of every token.

One generator for trainers that learn from what a model says, for metrics of answers, for previews
and for chat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.nn import decoder

__all__ = ["Rollout", "Sampling", "roll_out", "token_logps"]


@attrs.frozen(kw_only=True)
class Sampling:
    """How tokens are chosen."""

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
        if not self.temperature >= 0:
            raise OpError(f"temperature: got {self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise OpError(f"top_p: got {self.top_p}; expected more than 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise OpError(f"repetition_penalty: got {self.repetition_penalty}; expected above 0")

    def options(self) -> dict[str, Any]:
        """Return it in the terms of transformers' `generate`."""
        given: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            # all three said, for a model's own generation config may bring others
            given |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.repetition_penalty != 1.0:
            given["repetition_penalty"] = self.repetition_penalty
        if self.min_new_tokens:
            given["min_new_tokens"] = self.min_new_tokens
        return given


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
    """bool [rows]: whether a stop token came; if not, max_new_tokens had."""
    logps: Tensor | None
    """fp32 [rows, new tokens]: log-probability of each token as the model has it, whatever the
    sampling; 0 where nothing was said. None if it was not asked for."""

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
    seed: int | None = None,
    logps: bool = True,
    batch_size: int = 64,
) -> Rollout:
    """Return what a model says to prompts of ids, each answered `samples` times.

    Rows go through the model `batch_size` at a time; those of other lengths are padded where the
    model gives them the same numbers, and are decoded by length where it does not. With a `seed`
    the same call gives the same rows, and random numbers drawn by others stay as they were. Greedy
    rows (temperature 0) are those of a row alone but for rounding. The model is left in the mode it
    was in; nothing has a gradient. Errors: `OpError` for an empty prompt.
    """
    rows = [tuple(map(int, prompt)) for prompt in prompts for _ in range(samples)]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise OpError(f"prompt {empty[0] // samples + 1} has no tokens; give it one at least")
    device = next(model.parameters()).device
    said: dict[int, list[int]] = {}
    devices = [device] if device.type == "cuda" else []
    with _in_eval(model), torch.no_grad(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for numbers in _batches(model, rows, pad_id, batch_size):
            answers = _decode(model, [rows[n] for n in numbers], sampling, stop_ids, pad_id, device)
            said.update(zip(numbers, answers, strict=True))
        completions = [said[number] for number in range(len(rows))]
        found = None
        if logps:
            found = token_logps(model, rows, completions, pad_id=pad_id, batch_size=batch_size)
    ids, mask = _padded(completions, pad_id, device)
    stops = set(stop_ids)
    finished = torch.tensor([bool(each) and each[-1] in stops for each in completions])
    return Rollout(tuple(rows), ids, mask, finished.to(device), found)


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
    model is in; gradients flow if they are on.
    """
    device = next(model.parameters()).device
    width = max((len(each) for each in completions), default=0)
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = [
            (list(prompt), list(said))
            for prompt, said in zip(
                prompts[start : start + batch_size],
                completions[start : start + batch_size],
                strict=True,
            )
        ]
        # on the right, where no token sees it
        ids, mask = _padded([prompt + said for prompt, said in rows], pad_id, device)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        logits = logits[:, -ids.shape[1] :]  # what is more stands before, of an adapter
        places = torch.zeros_like(mask)
        for number, (prompt, said) in enumerate(rows):
            places[number, len(prompt) : len(prompt) + len(said)] = True
        picked = logits[:, :-1][places[:, 1:]].float()  # [tokens said, vocabulary]
        found = -F.cross_entropy(picked, ids[places], reduction="none")
        lengths = torch.tensor([len(said) for _, said in rows], device=device)
        held = torch.arange(width, device=device)[None] < lengths[:, None]
        part = torch.zeros(len(rows), width, dtype=torch.float32, device=device)
        parts.append(part.masked_scatter(held, found))
    if not parts:
        return torch.zeros(0, 0, dtype=torch.float32, device=device)
    return torch.cat(parts)


def _decode(
    model: Any,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    pad_id: int,
    device: torch.device,
) -> list[list[int]]:
    ids, mask = _padded(rows, pad_id, device, left=True)
    output = decoder.generate(
        model,
        input_ids=ids,
        attention_mask=mask.long(),
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **sampling.options(),
    )
    stops = set(stop_ids)
    answers = []
    for row in output[:, ids.shape[1] :].tolist():
        end = next((at + 1 for at, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])
    return answers


def _batches(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, batch_size: int
) -> Iterator[list[int]]:
    """Yield the numbers of rows that are decoded together."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    padded = len({len(row) for row in rows}) > 1 and _takes_padding(model, pad_id)
    start = 0
    while start < len(order):
        end = min(start + batch_size, len(order))
        if not padded:
            length = len(rows[order[start]])
            end = next((at for at in range(start, end) if len(rows[order[at]]) != length), end)
        yield order[start:end]
        start = end


_PADDED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _takes_padding(model: Any, pad_id: int) -> bool:
    """Whether a row gets the logits it has alone where padding stands before it; tried once."""
    if model not in _PADDED:
        device = next(model.parameters()).device
        size = model.get_input_embeddings().num_embeddings
        short, long = ([(7919 * k + 5) % size for k in range(1, n)] for n in (5, 10))
        ids, mask = _padded([short, long], pad_id, device, left=True)
        alone = torch.tensor([short], device=device)
        try:
            together = _last_logits(model, ids, mask)[0]
            single = _last_logits(model, alone, torch.ones_like(alone, dtype=torch.bool))[0]
        except Exception:  # whatever a stranger's model raises at padding
            _PADDED[model] = False
        else:
            off = float((together - single).abs().max())
            exact = together.dtype == torch.float32
            _PADDED[model] = off <= (1e-4 if exact else 5e-2) * float(single.abs().max())
    return _PADDED[model]


def _last_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    places = (mask.long().cumsum(-1) - 1).clamp_min(0)
    asked: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        asked["position_ids"] = places
    try:
        logits: Tensor = model(**asked).logits
    except TypeError:  # it has no positions to be told
        asked.pop("position_ids", None)
        logits = model(**asked).logits
    return logits[:, -1]


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
def _in_eval(model: Any) -> Iterator[None]:
    """Let a model say what it says without dropout, and leave every module in its mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
