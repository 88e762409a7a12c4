"""What can be found wrong with a model and its tokenizer before a weight is read.

The same for `run` as for `explain`: each file is read once, and all problems are told at once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tunesmith.data.chat_template import set_chat_template
from tunesmith.data.examples import Conversation, Message
from tunesmith.errors import DataError, ModelError
from tunesmith.nn import pretrained
from tunesmith.nn.weight_files import check_weight_files

__all__ = ["ModelFindings", "Use", "examine"]

FEW_TOKENS = 0.5
"""A tokenizer that fills less of the embedding than this may well be another model's."""


@attrs.frozen
class Use:
    """What a step will do with the model: how long its sequences are, and its texts."""

    here: str
    """The step, as problems name it."""
    max_length: int | None
    examples: Sequence[Any]


@attrs.define
class ModelFindings:
    """What a model directory holds, and what is wrong with it."""

    config: Any = None
    skeleton: Any = None
    """The model on the meta device."""
    tokenizer: Any = None
    problems: list[str] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)


def examine(
    directory: Path,
    *,
    chat_template: str | None,
    uses: Iterable[Use],
    stored: Mapping[str, Any] | None,
    weights: bool = True,
) -> ModelFindings:
    """Look at a model directory: config, weights' headers, tokenizer, and how they fit.

    `stored` says how the weights are stored quantized, if they are: then their shapes are not the
    config's. `weights=False` says that they are not here yet. Nothing is raised.
    """
    found = ModelFindings()
    used = list(uses)
    try:
        found.config = pretrained.load_config(directory)
        _check_kind(directory, found.config)
        if weights and stored is not None:
            pretrained.check_stored_weights(directory, stored)
        elif weights:
            check_weight_files(directory)
        found.skeleton = pretrained.skeleton(
            directory, found.config, compare=weights and stored is None
        )
        _check_one_way(directory, found.skeleton)
    except ModelError as error:
        found.problems.append(str(error))
    if found.config is None:
        return found  # transformers goes by it for all that follows
    _, problem = pretrained.load_generation_config(directory)
    if problem:
        found.notes.append(problem)
    try:
        found.tokenizer = pretrained.load_tokenizer(directory)
        _check_fast(directory, found.tokenizer)
    except ModelError as error:
        found.problems.append(str(error))
    if found.skeleton is not None:
        _check_positions(found, used)
    if found.tokenizer is not None:
        _check_template(found, chat_template)
    if found.skeleton is not None and found.tokenizer is not None:
        _check_ids(directory, found, used)
    return found


_SEES_AHEAD = (
    "an encoder: each token sees those after it, and predicting them teaches nothing; take a "
    "causal language model"
)
_NO_TEXT = "a decoder of audio codes; take a model of text"
_DRAFTS = "a model that drafts tokens from the hidden states of another one; train that other one"
_UNFIT: Mapping[str, str] = {
    "cpmant": _SEES_AHEAD,
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "git": "a model that captions images, and its loss leaves out as many tokens as an image has; "
    "take a model of text",
    "musicgen": _NO_TEXT,
    "musicgen_melody": _NO_TEXT,
    "prophetnet": "a decoder that computes a token otherwise where rows of its batch are longer; "
    "take a model whose rows stand alone",
    "reformer": "trained on rows of one length alone, the product of its axial_pos_shape; take a "
    "model that takes rows of any length",
    "xlnet": _SEES_AHEAD,
}
"""Families that transformers opens as causal language models and that none can be trained as."""


def _check_kind(directory: Path, config: Any) -> None:
    if unfit := _UNFIT.get(config.model_type):
        raise ModelError(f"model {directory}: is a {config.model_type}, {unfit}")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model {directory}: is a {config.model_type}, an encoder-decoder; a causal language "
            "model (a decoder alone) is needed"
        )
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        raise ModelError(
            f"{directory / 'config.json'}: 'transformers_weights' takes the weights from "
            f"{named!r}; call that file model.safetensors, and take the line out"
        )


def _check_one_way(directory: Path, model: Any) -> None:
    """Raise `ModelError` for a model whose tokens see what comes after them, as in an encoder."""
    config = model.config
    encoder = getattr(config, "is_decoder", None) is False and "is_decoder=True" in _source(model)
    if encoder or getattr(config, "causal", None) is False:
        raise ModelError(f"model {directory}: is a {config.model_type}, {_SEES_AHEAD}")


def _source(model: Any) -> str:
    try:
        return inspect.getsource(type(model))
    except (OSError, TypeError):
        return ""


def _check_fast(directory: Path, tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise ModelError(
            f"model {directory}: its tokenizer ({type(tokenizer).__name__}) does not tell which "
            "characters a token stands for; a fast tokenizer (one with a tokenizer.json) is "
            "needed: load it with `AutoTokenizer` and save it beside the model"
        )


# --- positions ------------------------------------------------------------------------------------


def _check_positions(found: ModelFindings, uses: Sequence[Use]) -> None:
    """Tell steps whose sequences are longer than the model has, or was trained on, positions."""
    text = found.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return
    table = _position_table(found.skeleton, limit)
    for use in uses:
        if use.max_length is None or use.max_length <= limit:
            continue
        if table is not None:
            found.problems.append(
                f"{use.here}: max_length={use.max_length}, and the model has {limit} positions "
                f"({table}), no more; pass max_length={limit} or less"
            )
        else:
            found.notes.append(
                f"{use.here}: max_length={use.max_length} is beyond the {limit} positions that "
                "the model was made for; rows longer than that may be learned badly"
            )


_POSITIONS = re.compile(
    r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_encoding)(\.weight)?$"
)


def _position_table(model: Any, limit: int) -> str | None:
    """Return the name of a table with a row for each position; None if positions are computed."""
    for name, tensor in _tensors(model):
        if not _POSITIONS.search(name) or tensor.dim() != 2:
            continue
        # OPT and its like have two rows more than positions
        if limit <= tensor.shape[0] <= limit + 2:
            return name
    return None


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


# --- chat template and ids ------------------------------------------------------------------------

_PROBE = (Message("user", "a"), Message("assistant", "b"))


def _check_template(found: ModelFindings, chat_template: str | None) -> None:
    from tunesmith.data.render import Renderer

    tokenizer = found.tokenizer
    try:
        set_chat_template(tokenizer, chat_template)
        if tokenizer.is_fast and tokenizer.eos_token_id is None:
            # without one, what ends a turn has to come from the template
            Renderer(tokenizer, 1024).conversation(Conversation(_PROBE))
    except DataError as error:
        found.problems.append(str(error))


def _check_ids(directory: Path, found: ModelFindings, uses: Sequence[Use]) -> None:
    """Tell tokens that the embedding has no row for, if they can come up."""
    tokenizer = found.tokenizer
    embedding = found.skeleton.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if not isinstance(rows, int):
        return
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    beyond = {token: number for token, number in vocabulary.items() if number >= rows}
    if not beyond:
        if len(vocabulary) < FEW_TOKENS * rows:
            found.notes.append(
                f"model {directory}: its tokenizer has {len(vocabulary):,} tokens, and the model "
                f"{rows:,}; make sure that it is the model's own"
            )
        return
    added = set(tokenizer.get_added_vocab())
    used = _used(tokenizer, beyond, added, uses)
    if used:
        shown = ", ".join(f"{token!r} (id {beyond[token]})" for token in sorted(used)[:3])
        more = f" and {len(used) - 3:,} more" if len(used) > 3 else ""
        found.problems.append(
            f"model {directory}: its embedding has rows for ids below {rows:,}, and its tokenizer "
            f"makes {shown}{more}; take the tokenizer that belongs to the model"
        )
    else:
        shown = ", ".join(sorted(map(repr, beyond))[:3])
        found.notes.append(
            f"model {directory}: the embedding has no row for {shown}, which nothing in the data "
            "needs; padding takes another id"
        )


def _used(
    tokenizer: Any, beyond: Mapping[str, int], added: set[str], uses: Sequence[Use]
) -> set[str]:
    """Return which of the tokens without a row can come up in training."""
    # a text's own words may become any token of the vocabulary, added ones only where they stand
    used = {token for token in beyond if token not in added}
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    used |= {token for token in named if token in beyond}
    rare = [token for token in beyond if token in added and token not in used]
    if rare:
        pattern = re.compile("|".join(map(re.escape, rare)))
        template = tokenizer.chat_template
        texts: list[Any] = [template, *(row.example for use in uses for row in use.examples)]
        for text in texts:
            used.update(match for piece in _pieces(text) for match in pattern.findall(piece))
    return used


def _pieces(value: Any) -> Iterator[str]:
    """Return every text in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.items():
            yield from _pieces(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _pieces(part)
    elif attrs.has(type(value)):
        for field in attrs.fields(type(value)):
            yield from _pieces(getattr(value, field.name))
