"""8-bit weights, a scale for each row (absmax; Dettmers et al. 2022, arXiv:2208.07339)."""

import math

import attrs

from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.quantizers import Quantizer


@attrs.frozen(kw_only=True)
class NewNameConfig:
    """Options of `.quantize("newname")`."""

    skip: tuple[str, ...] = ("lm_head",)
    """Names of linear layers that stay as they are."""


class NewName(Quantizer[NewNameConfig]):
    """Holds a linear layer's weight as int8 codes, W = codes x scale of the row."""

    def load(self, directory, *, dtype, device, task):
        """Return the model, its linear layers but for those to skip in 8 bits."""
        from torch import nn

        model = self.from_pretrained(directory, dtype=dtype, device=device, task=task)
        head = model.get_output_embeddings()
        for name, linear in list(model.named_modules()):
            parent, _, child = name.rpartition(".")
            if type(linear) is nn.Linear and linear is not head and child not in self.config.skip:
                setattr(model.get_submodule(parent), child, _layer(linear))
        return model

    def dense_weight(self, module):
        """Return a linear layer's weight [out_features, in_features] in fp32."""
        if not hasattr(module, "scale"):
            return super().dense_weight(module)
        return module.weight.detach().float() * module.scale

    def nbytes(self, shape, itemsize):
        """Return what such a weight takes: a byte each, and four for the scale of a row."""
        return math.prod(shape) + 4 * shape[0]


def _layer(linear):
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Linear8Bit(nn.Linear):
        """A linear layer to everyone else; gradients pass to its input, and not to its weight."""

        def forward(self, x):
            weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
            return F.linear(x, weight, self.bias)

    layer = Linear8Bit(linear.in_features, linear.out_features, bias=False, device="meta")
    weight = linear.weight.detach().float()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127  # [out_features, 1]
    codes = (weight / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.bias = linear.bias
    layer.register_buffer("scale", scale)
    return layer


@hookimpl
def tunesmith_quantizers():
    """Register the quantizer."""
    return [
        Spec(
            "newname",
            NewNameConfig,
            f"{__name__}:NewName",
            summary="8 bits, by rows",
        )
    ]
