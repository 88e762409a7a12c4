"""Decoding by one pass over a static cache gives transformers' tokens, or is left to transformers.

Without a CUDA device the pass is called and not captured: everything else is as it is there.
"""

from __future__ import annotations

import logging
import re

import pytest
import torch
from test_decoder import KNOWN, PROMPTS, STRANGE, both, log, model_of, with_adapter  # noqa: F401

from tunesmith.nn import decoder
from tunesmith.nn.graph_decoder import GraphDecoder

MODELS = {
    **{name: config for name, config in KNOWN.items() if "window" not in name},
    **{name: STRANGE[name][0] for name in ("gate and up in one", "gpt2")},
}


@pytest.fixture(autouse=True)
def no_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder.Decoder, "of", GraphDecoder.of)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(name: str, log: pytest.LogCaptureFixture) -> None:  # noqa: F811
    theirs, ours = both(model_of(MODELS[name]), pad_token_id=0)
    assert torch.equal(ours, theirs)
    assert "as transformers" not in log.text


@pytest.mark.parametrize("quantized", [False, True])
def test_with_an_adapter(quantized: bool, log: pytest.LogCaptureFixture) -> None:  # noqa: F811
    theirs, ours = both(with_adapter(model_of(KNOWN["llama"]), quantized))
    assert torch.equal(ours, theirs)
    assert "as transformers" not in log.text


def test_padded_prompts(log: pytest.LogCaptureFixture) -> None:  # noqa: F811
    mask = torch.ones_like(PROMPTS)
    mask[1, :4] = 0
    mask[2, :1] = 0
    model = model_of(KNOWN["llama"])
    theirs, ours = both(model, input_ids=PROMPTS * mask, attention_mask=mask)
    assert torch.equal(ours, theirs)
    assert "as transformers" not in log.text


def test_a_prompt_of_one_token(log: pytest.LogCaptureFixture) -> None:  # noqa: F811
    theirs, ours = both(model_of(KNOWN["llama"]), input_ids=PROMPTS[:, :1])
    assert torch.equal(ours, theirs)
    assert "as transformers" not in log.text


@pytest.mark.parametrize(
    ("name", "why"),
    [("window", "its cache has StaticSliding"), ("soft caps", "its attention is not torch")],
)
def test_other_caches_are_left_to_transformers(
    name: str,
    why: str,
    log: pytest.LogCaptureFixture,  # noqa: F811
) -> None:
    theirs, ours = both(model_of(STRANGE[name][0]))
    assert torch.equal(ours, theirs)
    [line] = [r.getMessage() for r in log.records if "as transformers" in r.getMessage()]
    assert re.search(why, line)


def test_another_attention_is_left_to_transformers(log: pytest.LogCaptureFixture) -> None:  # noqa: F811
    model = model_of(KNOWN["llama"])
    model.set_attn_implementation("eager")
    theirs, ours = both(model)
    assert torch.equal(ours, theirs)
    assert "attention is not torch's" in log.text


def test_a_pass_that_gives_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="tunesmith")
    forward = GraphDecoder._forward

    def shifted(self: GraphDecoder) -> torch.Tensor:
        self._positions += 1
        return forward(self)

    monkeypatch.setattr(GraphDecoder, "_forward", shifted)
    theirs, ours = both(model_of(KNOWN["llama"]))
    assert torch.equal(ours, theirs)
    assert "logits differ" in caplog.text


def test_a_pass_that_cannot_be_captured_is_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="tunesmith")

    def waits(self: GraphDecoder) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(GraphDecoder, "_forward", waits)
    theirs, ours = both(model_of(KNOWN["llama"]))
    assert torch.equal(ours, theirs)
    assert "cannot be captured: operation not permitted when stream is capturing)" in caplog.text
