"""From what a user calls a model to a local Hugging Face directory with a content hash.

A hub id is downloaded once by huggingface_hub into its cache; a .gguf file is converted once,
tensor by tensor, into a directory under tunesmith's own cache; a directory is used as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from tunesmith.engine.checks import ModelFindings
from tunesmith.errors import ModelError, TunesmithError, close_matches
from tunesmith.nn import pretrained
from tunesmith.nn.gguf_header import check_gguf
from tunesmith.nn.reading import model_errors
from tunesmith.plugin.recipe_files import is_model_path
from tunesmith.recipe import Recipe
from tunesmith.recipe_model import ModelObject

__all__ = [
    "ModelSource",
    "cache_directory",
    "content_hash",
    "describe_model",
    "find_model",
    "gguf_findings",
    "local_directory",
    "metadata_directory",
    "objects_directory",
]

SMALL_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "tokenizer*")
"""A model's files besides its weights."""
_OTHER_FORM = "take the model as a Hugging Face directory instead"
CONVERSION = 1
"""Raised when the conversion of .gguf files changes, so that old caches are left alone."""


@attrs.frozen
class ModelSource:
    """A model that was found: what kind of thing it is and where."""

    name: str
    """As the user wrote it."""
    kind: str
    """"directory", "gguf", "hub" or "object"."""
    path: Path | None
    """The directory or file; None for a hub id and an object."""
    given: ModelObject | None = None
    """The model in memory, if it is one."""


def find_model(name: str | ModelObject) -> ModelSource:
    """Say what a model name refers to, reading nothing but directory entries.

    Errors: `ModelError` for a path that is not there, a directory without config.json, a file that
    is not .gguf, or text that can be no hub id.
    """
    if isinstance(name, ModelObject):
        return ModelSource(str(name), "object", None, name)
    path = Path(name).expanduser()
    try:
        return _named(name, path)
    except OSError as error:  # a name that is too long for a path, a directory that is not ours
        shown = name if len(name) <= 200 else f"{name[:197]}..."
        raise ModelError(
            f"model {shown}: cannot be looked up: {(error.strerror or str(error)).lower()}; "
            "expected a hub id, a Hugging Face directory or a .gguf file"
        ) from error


def _named(name: str, path: Path) -> ModelSource:
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelSource(name, "directory", path)
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        if ggufs:
            raise ModelError(
                f"model {name}: a directory of .gguf files; name one of them: {', '.join(ggufs)}"
            )
        raise ModelError(
            f"model {name}: the directory holds no config.json; expected a Hugging Face model "
            "directory as save_pretrained writes it"
        )
    if path.is_file():
        if path.suffix == ".gguf":
            return ModelSource(name, "gguf", path)
        raise ModelError(
            f"model {name}: a {path.suffix or 'plain'} file; expected a hub id, a Hugging Face "
            "directory or a .gguf file"
        )
    if not is_model_path(name) and name.count("/") <= 1 and name.strip():
        return ModelSource(name, "hub", None)
    if path.parent == objects_directory():
        raise ModelError(
            f"model {name}: is gone; it was kept of a model that a Tuner was given in memory: "
            "give the same one to the same chain again, which writes it anew"
        )
    hint = ""
    if path.parent.is_dir():
        hint = close_matches(path.name, [entry.name for entry in path.parent.iterdir()])
    raise ModelError(f"model {name}: no such file or directory{hint}")


def cache_directory() -> Path:
    """Return tunesmith's cache: TUNESMITH_CACHE, or tunesmith/ in the user's cache directory."""
    if given := os.environ.get("TUNESMITH_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tunesmith"


def objects_directory() -> Path:
    """Return where models that were given as objects are kept."""
    return cache_directory() / "objects"


def local_directory(source: ModelSource) -> Path:
    """Return a Hugging Face directory for a model: downloaded, converted or written if need be."""
    if source.given is not None:
        from tunesmith.engine.kept_models import kept_model

        return kept_model(source.given, objects_directory())
    if source.kind == "directory":
        assert source.path is not None
        return source.path
    if source.kind == "gguf":
        assert source.path is not None
        return _converted_gguf(source.path)
    return _downloaded(source, (*SMALL_PATTERNS, "*.safetensors"))


def _downloaded(source: ModelSource, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [*patterns, "*.py"] if pretrained.code_is_trusted() else list(patterns)
    try:
        return Path(snapshot_download(source.name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"model {source.name}: not a local path, and not to be had from the hub: {reason}; "
            "check the spelling, the connection and (for a gated model) your login"
        ) from error


def metadata_directory(source: ModelSource) -> Path:
    """Return where a model's small files lie, downloading them for a hub id; for a .gguf, the file.

    For an object it is where it will be kept.
    Errors: `ModelError` if it is not to be had, or the .gguf file's header does not fit it.
    """
    if source.kind == "hub":
        return _downloaded(source, SMALL_PATTERNS)
    if source.given is not None:
        return objects_directory()
    assert source.path is not None
    if source.kind == "gguf":
        check_gguf(source.path)
    return source.path


def gguf_findings(source: ModelSource) -> ModelFindings:
    """Return what a .gguf file's metadata tells of a model: its config and its skeleton."""
    assert source.path is not None
    found = ModelFindings()
    try:
        found.config = _gguf_config(source.path)
        found.skeleton = pretrained.skeleton(source.path.parent, found.config, compare=False)
    except TunesmithError as error:
        found.problems.append(str(error))
    return found


def _gguf_config(path: Path) -> Any:
    from transformers import AutoConfig

    with model_errors(f"model {path}: its metadata cannot be read", _OTHER_FORM):
        config = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    return pretrained.config_of(config, f"model {path}")


def content_hash(directory: Path) -> str:
    """Return the sha256 over the names and bytes of a model directory's files."""
    digest = hashlib.sha256()
    for file in _model_files(directory):
        digest.update(file.name.encode())
        digest.update(file_hash(file).encode())
    return digest.hexdigest()


def describe_model(directory: Path, recipe: Recipe) -> dict[str, str | None]:
    """Return what a lock keeps of a model: name, hash, and that of its code if that may run."""
    return {
        "name": recipe.model if isinstance(recipe.model, str) else str(directory),
        "sha256": content_hash(directory),
        "code": _code_hash(directory) if recipe.trust_remote_code else None,
    }


def _code_hash(directory: Path) -> str:
    """Return the sha256 over the names and bytes of the Python files beside a model."""
    digest = hashlib.sha256()
    for file in sorted(directory.rglob("*.py")):
        digest.update(str(file.relative_to(directory)).encode())
        digest.update(file_hash(file).encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return a file's sha256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _model_files(directory: Path) -> list[Path]:
    suffixes = {".json", ".safetensors", ".model", ".txt", ".jinja", ".bin"}
    return sorted(file for file in directory.iterdir() if file.suffix in suffixes)


def _converted_gguf(path: Path) -> Path:
    """Return the converted directory of a .gguf file, converting it at first use."""
    import tempfile

    directory = cache_directory() / "gguf" / f"{path.stem}-{file_hash(path)[:16]}-v{CONVERSION}"
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=directory.parent))
    try:
        _convert_gguf(path, work)
        try:
            work.rename(directory)
        except OSError:
            if not directory.is_dir():  # another process may have been first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def _convert_gguf(path: Path, target: Path) -> None:
    """Write a .gguf file as a Hugging Face directory in fp32, which loses nothing of it."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        from tunesmith.errors import MissingExtraError

        raise MissingExtraError(
            "gguf", f"reading {path.name}", "install it with: pip install 'tunesmith[gguf]'"
        ) from error
    check_gguf(path)
    config = _gguf_config(path)
    with model_errors(f"model {path}: transformers cannot read this .gguf file", _OTHER_FORM):
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        streamed = _stream_gguf(path, config)
        if streamed is None:
            _convert_whole(path, target)
        else:
            from tunesmith.nn.checkpoint import ShardWriter

            writer = ShardWriter(target)
            for name, tensor in streamed:
                writer.add(name, tensor)
            writer.close()
        config.dtype = "float32"
        config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        GenerationConfig.from_model_config(config).save_pretrained(target)


def _stream_gguf(path: Path, config: Any) -> Iterator[tuple[str, Any]] | None:
    """Yield (name, fp32 tensor) one by one; None where only transformers' whole load will do.

    transformers' own table of names and its per-architecture tensor processors are used; those
    that rearrange several tensors into one (mixtures of experts) need the whole model at once.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoModelForCausalLM

    try:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            read_field,
        )
    except ImportError:
        return None
    reader = GGUFReader(path)
    architecture = read_field(reader, "general.architecture")[0]
    simple = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"}
    if architecture not in simple:
        return None
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = get_gguf_hf_weights_map(skeleton, processor)
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    plan = [(tensor, names[tensor.name]) for tensor in reader.tensors if tensor.name in names]
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    missing = set(expected) - {name for _, name in plan} - tied
    if missing or getattr(skeleton, "_weight_conversions", None):
        return None
    return _dequantized(plan, processor, expected, dequantize)


def _dequantized(
    plan: list[tuple[Any, str]], processor: Any, expected: dict[str, Any], dequantize: Any
) -> Iterator[tuple[str, Any]]:
    import numpy as np
    import torch

    for tensor, name in plan:
        weights = dequantize(tensor.data, tensor.tensor_type)
        weights = processor.process(weights=weights, name=tensor.name).weights
        value = torch.from_numpy(np.array(weights, dtype=np.float32, order="C"))
        if value.shape != expected[name]:
            raise ModelError(
                f"{tensor.name}: shape {list(value.shape)} in the .gguf file, "
                f"{list(expected[name])} in the model that its metadata describes"
            )
        yield name, value


def _convert_whole(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # older transformers always dequantize
        pass
    AutoModelForCausalLM.from_pretrained(path.parent, **options).save_pretrained(target)
