"""Decoding a token at a time, without what a model ready for training does on the way.

On CUDA `graph_decoder` does it. On the CPU a model whose layers are the usual ones (norm, attention
with rotary embedding, norm, gated MLP, each added to what came in) is run layer by layer from its
own weights, with buffers that stay where they are. Whether a model is that is not known by name:
its parts are looked at, and the last token of each prompt is computed both ways. Where anything
differs, transformers decodes as ever.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import OpError
from tunesmith.nn import fused_layers
from tunesmith.nn.graph_decoder import GraphDecoder
from tunesmith.nn.lora_linear import LoraLinear
from tunesmith.nn.nf4_linear import NF4Linear, as_frozen
from tunesmith.nn.prompt import disagreement, read_prompt
from tunesmith.ops import FrozenLinear, native_status
from tunesmith.ops.attention import attention_decode
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.elementwise import gated, rotary
from tunesmith.ops.layers import PreparedLayers, PreparedLinear, PreparedNorm

__all__ = ["Decoder", "generate"]

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
# what changes the numbers and shows only in places that the first token may not reach
_SETTINGS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}  # the others depend on the length


def generate(model: Any, **options: Any) -> Tensor:
    """Return what `model.generate(**options)` returns, sooner where the model can be decoded here.

    `model` is a transformers model, or PEFT's around one; options are those of its `generate`. The
    numbers are the same but for rounding. Which way was taken is logged.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        why: str | None = "its adapter adds tokens to the prompt"
    else:
        why = _why_not(inner, options)
    log = logging.getLogger("tunesmith")
    if why is None:
        options = {**options, "custom_generate": _Loop()}
        on_cuda = inner.device.type == "cuda"
        way = "one launch a token" if on_cuda else "layer by layer from the model's weights"
        log.debug("decoding: %s", way)
    else:
        log.info("decoding goes as transformers does it (%s)", why)
    ids: Tensor = model.generate(**options)
    return ids


def _why_not(inner: Any, options: dict[str, Any]) -> str | None:
    """Return why a call of generate is not for the decoder, or None."""
    if (why := native_status().why_slow_on(inner.device.type)) is not None:
        return why
    if inner.training:
        return "the model is in training mode"
    given = {name for name, value in options.items() if value is not None}
    if unknown := given - _TAKEN:
        return f"the option {min(unknown)} is given, which only transformers knows"
    config = inner.generation_config
    for name in ("num_beams", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens"):
        if options.get(name, getattr(config, name, None)) not in (None, 1):
            return f"{name} is set, which only transformers knows"
    return None


# what generate() works into logits processors and stopping criteria before the loop starts, and
# what the loop itself minds
_TAKEN = {
    "input_ids",
    "attention_mask",
    "max_new_tokens",
    "min_new_tokens",
    "max_length",
    "eos_token_id",
    "pad_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "num_return_sequences",
    "use_cache",
    "logits_processor",
    "stopping_criteria",
}


class _Loop:
    """The loop that transformers' generate() calls in the place of its own."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Return input_ids [rows, tokens] with the new tokens behind them."""
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        decoder = _decoder(model, input_ids, mask, int(generation_config.max_length))
        if isinstance(decoder, str):
            logging.getLogger("tunesmith").info(
                "decoding goes as transformers does it (%s)", decoder
            )
            ids: Tensor = model._sample(
                input_ids=input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **model_kwargs,
            )
            return ids
        logits = decoder.logits
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        pad = generation_config._pad_token_tensor
        while True:
            scores = logits_processor(input_ids, logits.float())
            if generation_config.do_sample:
                chosen = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                chosen = scores.argmax(-1)
            if pad is not None:
                chosen = torch.where(unfinished, chosen, pad)
            input_ids = torch.cat([input_ids, chosen[:, None]], dim=-1)
            unfinished &= ~stopping_criteria(input_ids, None)
            if not unfinished.any():
                return input_ids
            logits = decoder.step(chosen)


def _decoder(
    model: Any, input_ids: Tensor, mask: Tensor, capacity: int
) -> Decoder | GraphDecoder | str:
    """Return what decodes on the model's device, having read input_ids, or why nothing does."""
    if mask.shape != input_ids.shape or bool((mask.diff(dim=-1) < 0).any() | ~mask[:, -1].all()):
        return "padding is not in front only"
    kind: type[Decoder] | type[GraphDecoder]
    kind = Decoder if input_ids.device.type == "cpu" else GraphDecoder
    try:
        return kind.of(model, input_ids, mask, capacity)
    except Exception as error:  # whatever a stranger's model raises when it is looked at
        first = (str(error).splitlines() or [""])[0]
        return f"its parts are not what they look like: {type(error).__name__}: {first}"


class _Layer:
    """One layer of a model, for `rows` tokens at a time."""

    def __init__(self, layer: Any, rows: int, capacity: int, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        self.attention_norm = _norm(layer.input_layernorm, dtype)
        self.mlp_norm = _norm(layer.post_attention_layernorm, dtype)
        self.size, self.scale = int(attention.head_dim), float(attention.scaling)
        self.head_norms = [
            _norm(norm, dtype) if (norm := getattr(attention, name, None)) is not None else None
            for name in ("q_norm", "k_norm")
        ]
        self.query, self.key, self.value, self.output = (
            _linear(getattr(attention, f"{name}_proj"), rows, dtype) for name in "qkvo"
        )
        activation = fused_layers.gated_mlp(layer.mlp)
        if activation is None:
            raise _UnknownError(f"{type(layer.mlp).__name__} is no gated MLP")
        self.activation = activation
        self.gate, self.up, self.down = (
            _linear(getattr(layer.mlp, f"{name}_proj"), rows, dtype)
            for name in ("gate", "up", "down")
        )
        self.of_queries, self.of_keys, self.of_values, self.of_gate, self.of_up = (
            torch.empty((rows, linear.out_features), dtype=dtype)
            for linear in (self.query, self.key, self.value, self.gate, self.up)
        )
        shape = (rows, self.key.out_features // self.size, capacity, self.size)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype) for _ in range(2))

    def add_to(self, layers: PreparedLayers) -> bool:
        """Add the layer to those that run in one native call, if it can be one of them."""
        return layers.add(
            (self.attention_norm, *self.head_norms, self.mlp_norm),
            (self.query, self.key, self.value, self.output, self.gate, self.up, self.down),
            self.keys,
            self.values,
            self.scale,
            self.activation,
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, position: int) -> None:
        """Add to x [rows, hidden] what the layer adds for tokens at `position` of their rows."""
        h = self.attention_norm(x)
        q, k = (
            linear(h, out).view(len(x), 1, -1, self.size)
            for linear, out in ((self.query, self.of_queries), (self.key, self.of_keys))
        )
        of_q, of_k = self.head_norms
        q, k = q if of_q is None else of_q(q), k if of_k is None else of_k(k)
        self.keys[:, :, position] = rotary(k, cos, sin)[:, 0]
        self.values[:, :, position] = self.value(h, self.of_values).view(len(x), -1, self.size)
        q = rotary(q, cos, sin)[:, 0]
        attention_out = attention_decode(q, self.keys, self.values, first, position + 1, self.scale)
        self.output(attention_out.view(len(x), -1), x, accumulate=True)
        h = self.mlp_norm(x)
        intermediate = gated(self.gate(h, self.of_gate), self.up(h, self.of_up), self.activation)
        self.down(intermediate, x, accumulate=True)


class Decoder:
    """A model that has read a prompt; `logits` [rows, vocabulary] are those of the next token."""

    @classmethod
    def of(cls, model: Any, input_ids: Tensor, mask: Tensor, capacity: int) -> Decoder | str:
        """Return a decoder that has read input_ids, or why this model or prompt has none.

        `mask` [rows, tokens] is 1 for tokens and 0 for padding, which comes first; `capacity` is
        how many tokens a row may have in the end.
        """
        try:
            decoder = cls(model, input_ids, mask, capacity)
        except _UnknownError as unknown:
            return str(unknown)
        except OpError as error:
            return f"a layer is not for the kernels: {error}"
        ours = decoder._read(model, input_ids, mask)
        return disagreement(ours, decoder.logits, decoder._dtype) or decoder

    def __init__(self, model: Any, input_ids: Tensor, mask: Tensor, capacity: int) -> None:
        rows, tokens = input_ids.shape
        backbone = model.base_model
        _expect(model, {model.base_model_prefix, "lm_head"})
        _expect(backbone, {"embed_tokens", "layers", "norm", "rotary_emb"})
        for name in _SETTINGS:
            value = getattr(model.config, name, None)
            if value is not None and not (name == "sliding_window" and value >= capacity):
                raise _UnknownError(f"its config has {name}")
        kind = getattr(backbone.rotary_emb, "rope_type", None)
        if not isinstance(kind, str) or kind not in _FIXED_ROPE:
            raise _UnknownError("its rotary embedding depends on the length")
        for layer in backbone.layers:
            _expect(layer, _LAYER)
            _expect(layer.self_attn, _PROJECTIONS, _HEAD_NORMS)
            if "position_ids" in inspect.signature(type(layer.self_attn).forward).parameters:
                # such as a scale that grows with the position, which the first token may not show
                raise _UnknownError("its attention goes by positions")
        for module in (model, *model.modules()):
            if module._forward_hooks or module._forward_pre_hooks:
                raise _UnknownError(f"a hook on {type(module).__name__} wants to be called")
        if torch.is_autocast_enabled("cpu"):
            raise _UnknownError("autocast is on")
        self._embed = backbone.embed_tokens
        self._dtype = self._embed(input_ids[:1, :1]).dtype
        if self._dtype not in DTYPES:
            raise _UnknownError(f"it computes in {self._dtype}")
        self._norm = _norm(backbone.norm, self._dtype)
        self._head = _linear(model.lm_head, rows, self._dtype)
        self._of_head = torch.empty((rows, self._head.out_features), dtype=self._dtype)
        self._layers = [_Layer(layer, rows, capacity, self._dtype) for layer in backbone.layers]
        layers = PreparedLayers()
        self._at_once = layers if all(layer.add_to(layers) for layer in self._layers) else None
        every = torch.arange(capacity)[None]
        cos, sin = backbone.rotary_emb(torch.empty((1, 1), dtype=self._dtype), position_ids=every)
        self._cos, self._sin = cos[0], sin[0]  # [capacity, head size]
        self._first = tokens - mask.sum(-1)
        self._position = tokens
        self.logits = torch.empty(0)

    def step(self, ids: Tensor) -> Tensor:
        """Read one more token of each row, ids [rows]; return the logits of the next.

        The next call writes over them.
        """
        x = self._embed(ids).contiguous()
        positions = self._position - self._first
        cos, sin = self._cos[positions], self._sin[positions]
        if self._at_once is not None:
            self._at_once(x, cos, sin, self._first, self._position)
        else:
            for layer in self._layers:
                layer(x, cos[:, None], sin[:, None], self._first, self._position)
        self._position += 1
        return self._head(self._norm(x), self._of_head)

    def _read(self, model: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Let the model read the prompt; return our logits, or infinity if its cache is odd."""
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        # the last of several tokens has gaps around it, and torch would multiply row by row
        compact = model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        self.logits = read_prompt(model, input_ids, mask, cache)
        compact.remove()
        tokens = input_ids.shape[1]
        for layer, cached in zip(self._layers, cache.layers, strict=True):
            if cached.keys.shape[::3] != layer.keys.shape[::3] or cached.keys.shape[2] != tokens:
                return torch.full_like(self.logits, torch.inf)
            layer.keys[:, :, :tokens], layer.values[:, :, :tokens] = cached.keys, cached.values
        self._position = tokens - 1
        return self.step(input_ids[:, -1])


class _UnknownError(Exception):
    """Why a model has no decoder."""


def _expect(module: nn.Module, children: set[str], more: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    found = {name for name, _ in module.named_children()}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if not children <= found or found - children - more or own:
        odd = sorted((found ^ children) - more | own)
        raise _UnknownError(f"{type(module).__name__} is made otherwise ({', '.join(odd)})")


def _norm(module: nn.Module, dtype: torch.dtype) -> PreparedNorm:
    found = fused_layers.norm(module)
    weight = getattr(module, "weight", None)
    if found is None or not isinstance(weight, Tensor) or weight.dtype != dtype:
        raise _UnknownError(f"{type(module).__name__} is no RMSNorm in {dtype}")
    return PreparedNorm(weight.detach().contiguous(), *found)


def _linear(module: nn.Module, rows: int, dtype: torch.dtype) -> PreparedLinear:
    layer: FrozenLinear | None = None
    if isinstance(module, LoraLinear):
        layer = module.as_frozen()
    elif type(module) is NF4Linear or (type(module) is nn.Linear and module.weight.dtype == dtype):
        layer = as_frozen(module)
    if layer is None:
        raise _UnknownError(f"{type(module).__name__} is no layer for this")
    if layer.bias is not None:
        layer = layer._replace(bias=layer.bias.detach().to(dtype))
    return PreparedLinear(rows, dtype, layer)
