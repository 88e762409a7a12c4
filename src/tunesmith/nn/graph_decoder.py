"""Decoding on CUDA with one launch a token: the model's own forward pass, captured as a graph.

A small batch is decoded faster by a GPU than Python can launch its kernels. Here the pass of one
token over a static cache is recorded once for each call of generate() and then replayed. It is the
model's own code, so this is for every model that transformers' StaticCache is for; the first token
is computed both ways, and where they differ transformers decodes as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.nn import varlen_attention
from tunesmith.nn.prompt import disagreement, read_prompt

__all__ = ["GraphDecoder"]

_ATTENTION = ("sdpa", varlen_attention.NAME)


class GraphDecoder:
    """A model that has read a prompt; `logits` [rows, vocabulary] are those of the next token.

    On another device than CUDA nothing is captured, and each step is the model's pass.
    """

    @classmethod
    def of(cls, model: Any, input_ids: Tensor, mask: Tensor, capacity: int) -> GraphDecoder | str:
        """Return a decoder that has read input_ids, or why this model has none.

        `mask` [rows, tokens] is 1 for tokens and 0 for padding, which comes first; `capacity` is
        how many tokens a row may have in the end.
        """
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        if getattr(model.config, "_attn_implementation", None) not in _ATTENTION:
            return "its attention is not torch's"
        cache = StaticCache(config=model.config, max_cache_len=capacity)
        odd = {type(layer) for layer in cache.layers} - {StaticLayer}
        if odd or not cache.layers:
            return (
                f"its cache has {', '.join(sorted(kind.__name__ for kind in odd)) or 'no layers'}"
            )
        decoder = cls(model, cache, input_ids, mask, capacity)
        decoder.logits = read_prompt(model, input_ids, mask, cache)
        for layer in cache.layers:
            layer.cumulative_length -= 1  # the last token is read again
        try:
            ours = decoder._first_step(input_ids[:, -1])
        except (RuntimeError, TypeError, ValueError) as error:
            return f"a token's pass cannot be captured: {str(error).splitlines()[0]}"
        return disagreement(ours, decoder.logits, model.dtype) or decoder

    def __init__(
        self, model: Any, cache: Any, input_ids: Tensor, mask: Tensor, capacity: int
    ) -> None:
        rows, tokens = input_ids.shape
        device = input_ids.device
        self._model, self._cache = model, cache
        # what the captured pass reads and moves on, in place
        self._ids = input_ids[:, -1:].clone()
        self._positions = mask.sum(-1, keepdim=True) - 1
        self._at = torch.tensor([tokens - 1], device=device)
        self._seen = torch.zeros((rows, 1, 1, capacity), dtype=torch.bool, device=device)
        self._seen[:, 0, 0, :tokens] = mask.bool()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out = torch.empty(0)  # of the captured pass
        self.logits = torch.empty(0)

    def step(self, ids: Tensor) -> Tensor:
        """Read one more token of each row, ids [rows]; return the logits of the next.

        The next call writes over them.
        """
        self._ids.copy_(ids[:, None])
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        return self._out

    def _forward(self) -> Tensor:
        """Do the pass of one token, with nothing that the host would have to wait for."""
        self._seen.index_fill_(3, self._at, True)
        logits: Tensor = self._model(
            input_ids=self._ids,
            attention_mask=self._seen,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        self._at += 1
        self._positions += 1
        return logits

    def _first_step(self, ids: Tensor) -> Tensor:
        """Read the prompt's last token, and capture what that takes; return the logits."""
        if ids.device.type != "cuda":
            return self.step(ids)
        # libraries allocate what they need in the first pass, outside of the graph
        stream = torch.cuda.Stream(ids.device)  # type: ignore[no-untyped-call]  # torch has no types
        stream.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(stream):
            logits = self.step(ids)
        torch.cuda.current_stream(ids.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._out = self._forward()
        self._graph = graph
        return logits
