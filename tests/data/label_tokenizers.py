"""Small tokenizers of the kinds that models have, trained on the text that tests render."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

KINDS = ("byte-level", "across words", "metaspace", "unigram", "wordpiece")
EXACT = ("byte-level", "across words")
"""Kinds that give every text back as it was; the others put spaces in, or leave them out."""

# how Qwen and Llama 3 cut text before merging: line breaks go together, with what space is around
_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501


@cache
def _trained(kind: str, corpus: tuple[str, ...]) -> str:
    """Return a tokenizer without special tokens, as JSON."""
    size = {"vocab_size": 700, "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind in ("byte-level", "across words"):
        inner = Tokenizer(models.BPE())
        cut = pre_tokenizers.Split(Regex(_PIECES), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = (
            pre_tokenizers.Sequence([cut, whole]) if kind == "byte-level" else whole
        )
        inner.decoder = decoders.ByteLevel()
        inner.train_from_iterator(corpus, trainers.BpeTrainer(initial_alphabet=alphabet, **size))
        inner.post_processor = processors.ByteLevel(trim_offsets=kind == "across words")
        return inner.to_str()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "metaspace":
        inner = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer: Any = trainers.BpeTrainer(special_tokens=["<unk>", *fallback], **size)
    elif kind == "unigram":
        inner = Tokenizer(models.Unigram(byte_fallback=True))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(
            special_tokens=["<unk>", *fallback], unk_token="<unk>", **size
        )
    else:
        inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece(cleanup=False)
        inner.train_from_iterator(
            corpus, trainers.WordPieceTrainer(special_tokens=["<unk>"], **size)
        )
        return inner.to_str()
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.train_from_iterator(corpus, trainer)
    return _without_special(inner, fallback)


def _without_special(inner: Tokenizer, fallback: Sequence[str]) -> str:
    """Return a tokenizer as JSON, whose bytes are no longer special tokens but pieces."""
    import json

    state = json.loads(inner.to_str())
    state["model"]["byte_fallback"] = True  # which training forgets
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in fallback]
    return json.dumps(state)


def tokenizer_of(
    kind: str,
    corpus: tuple[str, ...],
    template: str,
    specials: Sequence[str],
    *,
    bos: str | None,
    eos: str,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind with a template's special tokens; it writes its bos itself."""
    inner = Tokenizer.from_str(_trained(kind, corpus))
    names = dict.fromkeys([*filter(None, [bos, eos]), *specials])
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if bos is not None:
        processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
        own = inner.post_processor
        inner.post_processor = processor if own is None else processors.Sequence([own, processor])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        **({} if bos is None else {"bos_token": bos}),
        additional_special_tokens=list(specials),
    )
    made.chat_template = template
    return made
