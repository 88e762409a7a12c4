"""A model small enough for a test: two layers and its own tokenizer, seeded, saved as any other.

The tokenizer is a byte-level BPE, as those of Llama 3, Qwen and SmolLM2 are, so it takes every
text and gives it back; a few merges keep a token from being a character. The chat template is
ChatML.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data.examples import (
    Conversation,
    Example,
    Labeled,
    Message,
    Preference,
    Prompt,
    Text,
)
from tunesmith.plugin.session import RunRecord, Session

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tunesmith.plugin.methods import Method
    from tunesmith.plugin.quantizers import Quantizer

__all__ = ["CHATML", "tiny_examples", "tiny_llama", "tiny_session", "tiny_tokenizer"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Chat template of the tiny tokenizer."""

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# "Ġ" is how byte-level BPE writes a space; written out, not trained, so that no release of
# tokenizers can change what a test sees
_MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("a", "n"),
    ("e", "r"),
    ("o", "n"),
    ("Ġ", "t"),
    ("Ġ", "a"),
    ("Ġ", "the"),
    ("in", "g"),
    ("an", "d"),
    ("Ġ", "s"),
)


OWN_PAD = "<|endoftext|>"
"""A pad token that stands in no text, as that of Qwen's tokenizers."""
END = "<|im_end|>"
"""The tiny tokenizer's end token, by which many models pad, too."""


def tiny_tokenizer(*, pad_token: str | None = OWN_PAD) -> PreTrainedTokenizerBase:
    """Return a fast tokenizer of 271 tokens with a ChatML template, its eos token "<|im_end|>".

    `pad_token` is None for one that has none, as those of Llama and Mistral.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in _MERGES]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    build: Any = PreTrainedTokenizerFast  # whose constructor has types in some releases only
    fast: PreTrainedTokenizerBase = build(
        tokenizer_object=tokenizer,
        eos_token=END,
        **({} if pad_token is None else {"pad_token": pad_token}),
        chat_template=CHATML,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    return fast


def tiny_llama(
    directory: str | os.PathLike[str],
    tied: bool = True,
    *,
    seed: int = 0,
    pad_token: str | None = OWN_PAD,
    **config: Any,
) -> Path:
    """Save a random LlamaForCausalLM (2 layers, hidden size 32, fp32) with its tokenizer.

    `tied` shares the embedding with the head; `pad_token` is the tokenizer's; `config` overrides
    fields of `LlamaConfig`. The same seed gives the same weights. Returns the directory, which is
    made if it is not there.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(pad_token=pad_token)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        # wide enough that logits differ from token to token, which 0.02 at this size does not give
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        # whose row transformers makes 0: the same one whatever the tokenizer pads with
        "pad_token_id": tokenizer.convert_tokens_to_ids(OWN_PAD),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    if "pad_token_id" not in config:
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    place = Path(directory)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def tiny_session(
    directory: str | os.PathLike[str],
    *,
    quantizer: Quantizer[Any] | None = None,
    method: Method[Any] | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    trains: bool = False,
    pad_token: str | None = None,
    **config: Any,
) -> Session:
    """Return a session over the model in `directory`, which becomes a tiny Llama if it is empty.

    `dtype` is fp32 unless given; `trains` is for a trainer. The tokenizer has no pad token unless
    one is given, for a plugin has to do without; `config` goes to `tiny_llama`.
    """
    import torch
    from transformers import AutoTokenizer

    place = Path(directory)
    if not (place / "config.json").exists():
        tiny_llama(place, seed=seed, pad_token=pad_token, **config)
    session = Session(
        base=place,
        tokenizer=AutoTokenizer.from_pretrained(place, local_files_only=True),
        device=torch.device(device),
        dtype=dtype or torch.float32,
        seed=seed,
        trains=trains,
        record=RunRecord(
            {"tunesmith": 1, "model": str(place), "seed": seed, "steps": []},
            {
                "versions": {},
                "plugins": {},
                "device": device,
                "precision": "fp32",
                "model": {"name": str(place), "sha256": "0" * 64, "code": None},
                "data": {},
                "fingerprints": {},
            },
        ),
    )
    if quantizer is not None:
        session = session.with_quantizer(quantizer)
    return session if method is None else session.with_method(method)


def tiny_examples(shape: str) -> list[Example]:
    """Return four examples of a shape, a key of `EXAMPLE_TYPES`, each of a few dozen tokens.

    They are of several lengths, and each holds the tiny tokenizer's token 0, the "!": a plugin that
    takes 0 for padding does not get away with it.
    """
    facts = [
        ("Where is the moon?", "In the sky!", "Under the sea."),
        ("What sings?", "The thrush!", "The stone."),
        ("Who ate the bread?", "The miller!", "Nobody at all."),
        ("When does the ferry go?", "At nine!", "It has sunk."),
    ]
    made: list[Example] = []
    for number, (question, right, wrong) in enumerate(facts):
        asked = (Message("user", question),)
        good, bad = (Message("assistant", right),), (Message("assistant", wrong),)
        shapes: dict[str, Example] = {
            "conversation": Conversation((*asked, *good)),
            "preference": Preference(asked, good, bad),
            "labeled": Labeled(asked, bad if number % 2 else good, label=number % 2 == 0),
            "prompt": Prompt(asked, {"answer": right}),
            "text": Text(f"{question} {right}"),
        }
        made.append(shapes[shape])
    return made
