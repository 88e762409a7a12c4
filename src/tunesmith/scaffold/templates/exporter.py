"""The adapter in 16 bits as safetensors, with a model card of what it was made from."""

import shutil

import attrs

from tunesmith.errors import ModelError
from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.exporters import Exporter
from tunesmith.plugin.options import one_of


@attrs.frozen(kw_only=True)
class NewNameConfig:
    """Options of `.export("newname")`."""

    dtype: str = attrs.field(default="float16", validator=one_of("float16", "bfloat16", "float32"))
    """What the weights are written in."""
    title: str = "A fine-tuned adapter"
    """First line of the card."""


class NewName(Exporter[NewNameConfig]):
    """Writes what PEFT opens, the tokenizer, and README.md: recipe, hashes and figures."""

    reads_run = True  # the card depends on the record of the run, so its stage does as well

    def export(self, session, directory):
        """Return the artefacts "weights" and "card"."""
        import torch
        from safetensors.torch import load_file, save_file

        if session.current is None:
            raise ModelError("newname: there is no adapter; train one before, as .lora().sft(...)")
        source = session.adapter(session.current).directory
        files = sorted(source.glob("*.safetensors"))
        if not files:
            raise ModelError(f"newname: {source} holds no safetensors file; use a PEFT method")
        dtype = getattr(torch, self.config.dtype)
        for file in files:
            tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
            if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
                raise ModelError(f"newname: {bad[0]} is too large for {self.config.dtype}")
            save_file(tensors, directory / file.name, metadata={"format": "pt"})
        for file in source.glob("*.json"):
            shutil.copyfile(file, directory / file.name)
        session.tokenizer.save_pretrained(directory)
        card = directory / "README.md"
        card.write_text(self._card(session), encoding="utf-8")
        return {"weights": directory / files[0].name, "card": card}

    def _card(self, session):
        from tunesmith.recipe import Recipe

        lock = session.run.lock
        lines = ["---", "library_name: peft", f"base_model: {lock['model']['name']}", "---"]
        lines += [f"# {self.config.title}", "", "## Recipe", "", "```yaml"]
        lines += [Recipe.from_dict(session.run.recipe).to_yaml().strip(), "```", ""]
        lines += ["## Made from", "", f"- base model: sha256 {lock['model']['sha256']}"]
        for stage, data in lock["data"].items():
            lines.append(f"- {stage}: {data['rows']} rows, sha256 {data['sha256']}")
        lines += [f"- {name} {version}" for name, version in lock["versions"].items()]
        lines += ["", "## Figures", ""]
        for stage, figures in session.metrics.items():
            lines += [f"- {stage}: {name} {value:.4g}" for name, value in figures.items()]
        return "\n".join(lines) + "\n"


@hookimpl
def tunesmith_exporters():
    """Register the exporter."""
    return [
        Spec(
            "newname",
            NewNameConfig,
            f"{__name__}:NewName",
            summary="adapter and model card",
        )
    ]
