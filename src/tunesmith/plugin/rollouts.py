"""Answers to chat prompts, for any plugin: a trainer that samples, a metric of texts, a preview.

`tunesmith.nn.rollout` does it on ids; here prompts become ids as inference has them, by the chat
template, and answers become texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from tunesmith.data.examples import Message
from tunesmith.errors import DataError, OpError

if TYPE_CHECKING:
    import torch

    from tunesmith.nn.rollout import Rollout, Sampling

__all__ = ["Answers", "Prompt", "ask", "prompt_ids", "stop_ids"]

Prompt: TypeAlias = "str | Sequence[Mapping[str, Any] | Message]"
"""What a user says, or all messages so far."""


@attrs.frozen(eq=False)
class Answers:
    """What a model said, `samples` answers in a row for each prompt."""

    rollout: Rollout
    texts: tuple[str, ...]
    """Each answer without special tokens, up to the stop string that ended it, and without white
    space around it."""


def ask(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: int | torch.Generator | None = None,
    stop: Sequence[str] = (),
    logps: bool = False,
    sampled_logps: bool = False,
    batch_size: int = 64,
) -> Answers:
    """Let a model answer prompts; `session.model` and `session.tokenizer` will do.

    An answer ends with the tokenizer's end token, with the template's, or as soon as its text holds
    one of the strings `stop`: its ids are kept whole, its text goes up to there. What the seed
    settles, and in what mode the model is asked, is as in `roll_out`. Errors: `DataError` naming a
    prompt that the chat template refuses, `OpError` for an empty stop string.
    """
    from tunesmith.data.pack import padding_id
    from tunesmith.nn.rollout import roll_out

    rollout = roll_out(
        model,
        [prompt_ids(tokenizer, prompt, number) for number, prompt in enumerate(prompts, 1)],
        sampling,
        stop_ids=stop_ids(tokenizer),
        pad_id=padding_id(tokenizer),
        samples=samples,
        seed=seed,
        stops=_stops(tokenizer, stop) if stop else None,
        logps=logps,
        sampled_logps=sampled_logps,
        batch_size=batch_size,
    )
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.completions())
    return Answers(rollout, tuple(_before(text, stop).strip() for text in texts))


def prompt_ids(tokenizer: Any, prompt: Prompt, number: int = 1) -> list[int]:
    """Return the ids of a prompt, up to where the answer begins; `number` is for errors."""
    from tunesmith.data import templates

    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [_plain(turn) for turn in turns]
    try:
        text = templates.render(tokenizer, messages, answer=True)
    except DataError as error:
        raise DataError(f"prompt {number}: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def stop_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's own, and what its template puts."""
    from tunesmith.data.render import Renderer

    return sorted(Renderer(tokenizer, max_length=8).stop_ids)


def _stops(tokenizer: Any, stop: Sequence[str]) -> Callable[[list[int]], bool]:
    if isinstance(stop, str) or not all(stop):
        raise OpError(f"stop: got {stop!r}; expected a list of strings, none of them empty")
    # a token is a byte of text at least, but for special ones, and the first few of a part may be
    # written in another way than in the whole
    window = max(len(each.encode()) for each in stop) + 8

    def stops(ids: list[int]) -> bool:
        # a string may be a special token's, or stand on both sides of one
        tail = ids[-window:]
        texts = (tokenizer.decode(tail, skip_special_tokens=skip) for skip in (True, False))
        return any(each in text for text in texts for each in stop)

    return stops


def _before(text: str, stop: Sequence[str]) -> str:
    found = [at for each in stop if (at := text.find(each)) >= 0]
    return text[: min(found, default=len(text))]


def _plain(turn: Mapping[str, Any] | Message) -> Mapping[str, Any]:
    if isinstance(turn, Message):
        return {"role": turn.role, "content": turn.content, **turn.extra}
    return turn
