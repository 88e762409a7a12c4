"""Proof of a merge: what was written computes what the adapter on its base computes.

Three questions, each by another way than the merge went:

- Does each merged weight do what the adapter's layer does? Its own forward pass is asked, in fp32,
  so that an update of any size is seen to be missing, doubled or turned round.
- Do the files hold those weights? Stock transformers opens them, and each weight is compared byte
  by byte by a digest taken when it was written.
- Does the model that was opened give the logits that the adapter on its base gave? That takes in
  all that is no weight, such as a setting in config.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError
from tunesmith.modes import in_mode
from tunesmith.nn.checkpoint import within
from tunesmith.nn.merging import Adapted, Dense, Merging, dense_shell, standing_in

__all__ = ["Proof", "compare_logits", "row_logits", "tolerance"]

_UPDATE = 0.03
"""Share of an update that may be missing; adapters kept in 16 bits differ by some 0.01."""
_ROUNDING = 2e-6
"""Share of the base that fp32 sums may differ by."""

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


class Proof:
    """Looks at each weight as it is written, and keeps what the opened model is compared with."""

    def __init__(
        self, merging: Merging, dense: Dense, dtype: torch.dtype, in_fp32: Sequence[str] = ()
    ) -> None:
        self.merging = merging
        self.dense = dense
        self.dtype = dtype
        self.in_fp32 = in_fp32
        """Names of modules that the model computes in fp32 whatever its dtype."""
        self.digests: dict[str, str] = {}

    def weights(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Return the merged weights in the saved dtype; each is looked at when it is made."""
        return {name: self._looked_at(name, make) for name, make in self.merging.weights.items()}

    def _looked_at(self, name: str, make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def looked_at() -> torch.Tensor:
            value = make()
            if name in self.merging.adapted:
                check_weight(name, self.merging.adapted[name], value, self.dense)
            saved = self._saved(name, value)
            self.digests[name] = _digest(saved)
            return saved

        return looked_at

    def _saved(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        return value.to(torch.float32 if _within_any(name, self.in_fp32) else self.dtype)

    def compare_weights(self, opened: Any) -> None:
        """Compare every weight of the model that was opened with what was to be written.

        Errors: `ModelError` naming those that differ.
        """
        wrong = []
        state = opened.state_dict()
        twins = dict(getattr(opened, "all_tied_weights_keys", None) or {})
        for name, tensor in state.items():
            # a weight that was not written is its twin
            source = name if name in self.digests else twins.get(name, name)
            if source not in self.digests:
                wrong.append(f"{name} (was not written)")
                continue
            if _digest(self._saved(source, tensor)) != self.digests[source]:
                wrong.append(name)
        wrong += [f"{name} (is not there)" for name in self.digests if name not in state]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ModelError(
                f"what stock transformers reads of the merged model is not what was to be "
                f"written: {', '.join(wrong[:5])}{more}; nothing of it is kept"
            )


def check_weight(name: str, each: Adapted, merged: torch.Tensor, dense: Dense) -> None:
    """Compare a merged weight with what the adapter's layers compute in their own forward pass.

    `merged` is fp32, as the plain model has it. Errors: `ModelError` naming the weight.
    """
    with torch.no_grad(), in_mode(each.layers[0], training=False):
        value = dense.dense_parameter(each.module, each.name)
        shell = dense_shell(each, value, dense)
        plain = value.T if each.transposed else value
        if merged.shape != plain.shape:
            raise ModelError(
                f"{name}: merged to {list(merged.shape)}, and the plain model has "
                f"{list(plain.shape)} there"
            )
        with standing_in(each, shell):
            found = _compared(each, shell, merged, plain)
    if found is None:
        return
    error, update, size = (part.flatten() for part in found)
    allowed = _UPDATE * update + _ROUNDING * size
    worst = int((error - allowed).argmax())
    if not bool((error <= allowed).all()):
        share = float(error[worst] / update[worst].clamp(min=1e-30))
        raise ModelError(
            f"{name}: the merged weight does not do what the adapter does (it differs by "
            f"{share:.2g} of the adapter's update"
            + (f", in part {worst}" if error.numel() > 1 else "")
            + "); the merged model is not kept: use the adapter on its base, and please report this"
        )


_Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Norms of the error, of the adapter's update, and of all; of each expert apart."""


def _compared(
    each: Adapted, shell: nn.Module, merged: torch.Tensor, plain: torch.Tensor
) -> _Found | None:
    parameter = [layer for layer in each.own if hasattr(layer, "parameter_name")]
    if parameter:
        with _activated(parameter):
            expected = getattr(shell, each.name).detach().clone()
        dims = tuple(range(1, merged.dim())) if merged.dim() > 2 else tuple(range(merged.dim()))
        return (
            torch.linalg.vector_norm(merged - expected, dim=dims),
            torch.linalg.vector_norm(expected - plain, dim=dims),
            torch.linalg.vector_norm(expected, dim=dims),
        )
    layer: Any = each.layers[0]
    generator = torch.Generator().manual_seed(0)
    if isinstance(each.module, nn.Embedding):
        rows = merged.shape[0]
        ids = torch.randint(rows, (min(rows, 512),), generator=generator).to(merged.device)
        if each.name != "weight":
            return None
        plain_rows, merged_rows, expected = plain[ids], merged[ids], layer(ids).float()
        return _norms(merged_rows - expected, expected - plain_rows, expected)
    if not isinstance(each.module, (nn.Linear, Conv1D)):
        return None  # no built-in adapts it; its digest and the logits are compared all the same
    # y is an affine map of x: what it gives for x = 0 is the bias, the rest is the weight's
    held: Any = shell.weight
    features = held.shape[0 if isinstance(shell, Conv1D) else 1]
    x = torch.randn(8, features, generator=generator).to(merged.device)
    at_zero = layer(torch.zeros_like(x[:1])).float()
    if each.name == "bias":
        return _norms(merged - at_zero[0], at_zero[0] - plain, at_zero[0])
    expected = layer(x).float() - at_zero
    w, w0 = (part if isinstance(each.plain, Conv1D) else part.T for part in (merged, plain))
    return _norms(x @ w - expected, expected - x @ w0, expected)


def _norms(*parts: torch.Tensor) -> _Found:
    error, update, size = (torch.linalg.vector_norm(part) for part in parts)
    return error, update, size


@contextmanager
def _activated(layers: Sequence[Any]) -> Iterator[None]:
    """Let adapters of parameters change them, as they do while their module runs."""
    if not layers:
        yield
        return
    with layers[0]._activate_lora(layers[0].active_adapters), _activated(layers[1:]):
        yield


def _within_any(name: str, modules: Sequence[str]) -> bool:
    return any(within(name, module) for module in modules)


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"  # type: ignore[arg-type]


def tolerance(*dtypes: torch.dtype) -> float:
    """Return the share of a row's logits that two dtypes' rounding may move, by the median token.

    fp32 sums in another order move it by some 1e-5, weights and activations in 16 bits by a
    hundredth a model of any depth; each has about ten times that.
    """
    return max(_TOLERANCE.get(dtype, 0.1) for dtype in dtypes)


def row_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the logits [tokens, vocabulary] of each row of ids, in fp32 on the CPU."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad(), in_mode(model, training=False):
        for row in rows:
            ids = torch.tensor([list(row)], device=device)
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            found.append(out.logits[0].float().cpu())
    return found


def compare_logits(
    expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor], allowed: float
) -> float:
    """Return by how much logits differ at the median token, as a share of their spread.

    The median, because a router that is undecided sends single tokens elsewhere in 16 bits.
    Errors: `ModelError` above `allowed`, or for numbers that are not finite.
    """
    shares = []
    for ours, theirs in zip(got, expected, strict=True):
        spread = (theirs - theirs.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-30)
        shares.append((ours - theirs).norm(dim=-1) / spread)
    found = float(torch.cat(shares).median()) if shares else 0.0
    if not found <= allowed:
        raise ModelError(
            f"the merged model does not compute what the adapter on its base computes: at the "
            f"median token logits differ by {found:.3g} of their spread, where rounding allows "
            f"{allowed:.3g}; it is not kept: use the adapter on its base, and please report this"
        )
    return found
