"""The one door to transformers' Auto classes: what is let in, and what is said of the rest.

Nothing that a model brings along runs: no Python beside its weights, no kernel from a hub, no
pickle; unless the user has said so for this model (`trusting`). What is loaded is what the config
needs, all of it and nothing else. Whatever goes wrong is a `ModelError` in words that say what was
found and what to do. See docs/adr/0017-nothing-a-user-downloads-runs.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError
from tunesmith.nn.checkpoint import stored_quantization
from tunesmith.nn.reading import AGAIN, TOKENIZER_BYTES, model_errors, read_object, reason
from tunesmith.nn.tasks import CAUSAL_LM, Task
from tunesmith.nn.weight_files import check_weight_files, headers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "check_keys",
    "check_stored_weights",
    "code_is_trusted",
    "config_of",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "skeleton",
    "trusting",
]

MOST_LAYERS = 4096
"""More layers than any model has; a skeleton of a billion of them would never be built."""

_trusted: ContextVar[bool] = ContextVar("tunesmith_trusted_code", default=False)


@contextmanager
def trusting(code: bool) -> Iterator[None]:
    """Let the code that lies beside a model run, or not, for what is loaded inside."""
    token = _trusted.set(code)
    try:
        yield
    finally:
        _trusted.reset(token)


def code_is_trusted() -> bool:
    """Return whether the code that lies beside a model may run."""
    return _trusted.get()


# --- config.json and the other small files --------------------------------------------------------


def load_config(directory: Path) -> PreTrainedConfig:
    """Return the config of a model directory.

    Errors: `ModelError` if it is damaged, of an architecture that this transformers does not know,
    or needs code that is not trusted.
    """
    from transformers import AutoConfig

    file = directory / "config.json"
    if not file.is_file():
        raise ModelError(
            f"model {directory}: holds no config.json; expected a Hugging Face model directory as "
            "save_pretrained writes it"
        )
    row = read_object(file)
    if not isinstance(row.get("model_type"), str):
        # transformers would go by the directory's name
        raise ModelError(
            f"{file}: 'model_type' is {row.get('model_type')!r}; expected the name of an "
            f'architecture, such as "llama"; {AGAIN}'
        )
    _refuse_code(directory, "config.json", row, "AutoConfig")
    with (
        model_errors(
            f"model {directory}: its config cannot be read",
            "check config.json, and that this transformers knows the architecture",
        ),
        _own_code(directory, f"model {directory}", row),
    ):
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=code_is_trusted()
        )
    return config_of(config, f"model {directory}")


def config_of(config: PreTrainedConfig, what: str) -> PreTrainedConfig:
    """Return a config if a model can be built from it; `ModelError` if it says absurd things."""
    for key, value in _leaves(config.to_dict()):
        number = len(value) if isinstance(value, list) else value
        counts = isinstance(number, int) and not isinstance(number, bool)
        if counts and _LAYERS.search(key) and number > MOST_LAYERS:
            raise ModelError(
                f"{what}: its config says {key}={number:,}; at most {MOST_LAYERS:,} are taken; "
                "take config.json from the model's source again"
            )
    return config


_LAYERS = re.compile(r"(^|_)(n_layers?|layers|layer_types|num_\w*(layers|blocks|experts))$")


def _leaves(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield str(key), value


def _refuse_code(directory: Path, file: str, row: Mapping[str, Any], auto_class: str) -> None:
    """Raise `ModelError` if a file asks for code to run that is not trusted, or is not here."""
    for key, value in _leaves(row):
        if key.strip("_").endswith("_implementation") and re.search(r"[/:@]", str(value)):
            raise ModelError(
                f"{directory / file}: '{key}' is {value!r}, a kernel from a hub, which would be "
                "downloaded and run; take that line out"
            )
    mapping = row.get("auto_map")
    named = mapping.get(auto_class) if isinstance(mapping, Mapping) else mapping
    for name in named if isinstance(named, (list, tuple)) else [named]:
        if code_is_trusted() and isinstance(name, str) and "--" in name:
            raise ModelError(
                f"{directory / file}: 'auto_map' takes code from {name.partition('--')[0]}, not "
                "from this model, so it cannot be written down what runs; download that code, and "
                "put it beside the weights"
            )


@contextmanager
def _own_code(directory: Path, what: str, row: Mapping[str, Any]) -> Iterator[None]:
    """Say in our words that a model needs its own code, where transformers asks for it."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise code_refused(directory, what, str(row.get("auto_map"))) from error


def code_refused(directory: Path, what: str, needed: str) -> ModelError:
    """Return the error for a model that needs its own code, which is not trusted."""
    files = sorted(file.name for file in directory.glob("*.py"))
    return ModelError(
        f"{what}: needs code that comes with it ({', '.join(files) or needed}), and no such code "
        "is run unasked; read it, and pass trust_remote_code=True to Tuner (or write it into the "
        "recipe) if you trust it"
    )


# --- tokenizer ------------------------------------------------------------------------------------


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model directory.

    Errors: `ModelError` if there is none, it is damaged, or it needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    settings = directory / "tokenizer_config.json"
    row = read_object(settings, TOKENIZER_BYTES) if settings.is_file() else {}
    _refuse_code(directory, settings.name, row, "AutoTokenizer")
    whole = directory / "tokenizer.json"
    if whole.is_file():
        read_object(whole, TOKENIZER_BYTES)
    if not any((directory / name).is_file() for name in _VOCABULARIES) and not list(
        directory.glob("*.tiktoken")
    ):
        if "auto_map" in row and not code_is_trusted():
            raise code_refused(directory, f"model {directory}: its tokenizer", str(row["auto_map"]))
        raise ModelError(
            f"model {directory}: has no tokenizer (no tokenizer.json or other vocabulary); copy "
            "the tokenizer's files of the model it was made from into it"
        )
    with (
        model_errors(
            f"model {directory}: its tokenizer cannot be loaded",
            "take tokenizer.json and tokenizer_config.json from the model's source again",
        ),
        _own_code(directory, f"model {directory}: its tokenizer", row),
    ):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=code_is_trusted()
        )
        if not len(tokenizer):
            raise ModelError(
                f"model {directory}: its tokenizer has no tokens; take tokenizer.json from the "
                "model's source again"
            )
    return tokenizer


_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
    "tokenizer.model.v3",
    "bpe.codes",
)


# --- weights --------------------------------------------------------------------------------------


def load_generation_config(directory: Path) -> tuple[Any, str]:
    """Return (generation config, problem): None where there is none, or it cannot be used.

    It says how text is generated, which training does without: a broken one is told, not fatal.
    """
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    if not file.is_file():
        return None, ""
    try:
        read_object(file)
        return GenerationConfig.from_pretrained(directory, local_files_only=True), ""
    except Exception as error:
        text = reason(error).removeprefix(f"{file}: ")
        return None, f"{file}: is left out, as it cannot be used: {text}"


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    task: Task = CAUSAL_LM,
    **options: Any,
) -> PreTrainedModel:
    """Return the model in a directory; `options` go to transformers' `from_pretrained`.

    For a classification a language model will do: its head over the vocabulary is left out, and a
    new one is made, from the random numbers of the moment. Errors: `ModelError` for anything that
    cannot be loaded, and for weights that are missing, unexpected or of another shape, by name.
    """
    import transformers

    options.setdefault("config", None)
    if options["config"] is None:
        options["config"] = load_config(directory)
    config = options["config"]
    what = f"model {directory}"
    stored = stored_quantization(directory)
    if stored is None:
        # some quantizers take a weight of any shape, and transformers one of any type
        skeleton(directory, config, task=task)
    else:
        check_stored_weights(directory, stored)
    generation: dict[str, Any] = {}
    if not task.labels:
        read, _ = load_generation_config(directory)
        made = transformers.GenerationConfig.from_model_config
        generation = {"generation_config": read or made(config)}
    with (
        model_errors(
            f"{what}: cannot be loaded", "check the files, or take the model from its source again"
        ),
        _own_code(directory, what, config.to_dict()),
    ):
        try:
            with _Report(what):
                if task.labels:
                    config.num_labels = task.labels
                cls = getattr(transformers, task.auto_class)
                model, info = cls.from_pretrained(
                    directory,
                    dtype=dtype,
                    device_map={"": device},
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=code_is_trusted(),
                    ignore_mismatched_sizes=True,  # they are named below
                    output_loading_info=True,
                    **generation,
                    **options,
                )
        except Exception as error:
            # what was raised for a weight, not how transformers sums it up
            first = getattr(options.get("quantization_config"), "first_error", None)
            raise (first or error) from error
    check_keys(what, _without_head(info, model, task), type(model).__name__)
    return model


def skeleton(
    directory: Path, config: PreTrainedConfig, *, task: Task = CAUSAL_LM, compare: bool = True
) -> PreTrainedModel:
    """Return the model of a config on the meta device; no weight is read.

    With `compare` its weights are compared with the headers of the directory's files, by
    transformers' own loader: so its renamings, conversions and tied weights are heeded. Errors:
    those of `load_model`.
    """
    import torch

    what = f"model {directory}"
    found = headers(directory) if compare else {}
    with model_errors(
        f"{what}: no model can be built of its config",
        "check config.json, and that this transformers knows the architecture",
    ):
        if task.labels:
            config.num_labels = task.labels
        cls = _class_of(directory, config, task)
        if not compare:
            with torch.device("meta"):
                model = cls._from_config(config)
            model.tie_weights()
            return model
        with _Report(what):
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=found,
                dtype=torch.float32,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    check_keys(what, _without_head(info, model, task), type(model).__name__)
    needed = model.state_dict()
    whole = [
        f"{key} ({str(tensor.dtype).removeprefix('torch.')})"
        for key, tensor in sorted(found.items())
        if not tensor.is_floating_point() and (key not in needed or _is_float(needed[key]))
    ]
    if whole:
        raise ModelError(
            f"{what}: the checkpoint holds whole numbers for {_some(whole)}, and its config.json "
            "says nothing of a quantization; take it from its source again"
        )
    return model


def check_stored_weights(directory: Path, stored: Mapping[str, Any]) -> None:
    """Raise `ModelError` if what is said to be quantized by bitsandbytes is plain weights."""
    method = stored.get("quant_method") or "bitsandbytes"
    if method == "bitsandbytes" and all(map(_is_float, headers(directory).values())):
        bits = 8 if stored.get("load_in_8bit") else 4
        raise ModelError(
            f"model {directory}: config.json says that it is stored in {bits} bits, and no weight "
            "in its safetensors files is; take quantization_config out of it, or take the model "
            "from its source again"
        )
    check_weight_files(directory)


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()


class _Report(logging.Filter):
    """Takes what transformers would print of a checkpoint: it is raised, not printed."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.lines += _COLOUR.sub("", record.getMessage()).splitlines()
        return False

    def __enter__(self) -> None:
        logging.getLogger(_REPORTS).addFilter(self)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        logging.getLogger(_REPORTS).removeFilter(self)
        if isinstance(error, RuntimeError) and "above report" in str(error):
            told = [line.replace("|", " ").split() for line in self.lines]
            names = [line[0] for line in told if line[1:2] == ["CONVERSION"]]
            causes = [" ".join(line) for line in told if line and line[0].endswith("Error:")]
            raise ModelError(
                f"{self.what}: weights that belong together do not fit each other: "
                f"{_some(names) or reason(error)} ({_some(causes[:1])}); one of them is missing or "
                "of another model: take it from its source again"
            ) from error


_REPORTS = "transformers.modeling_utils"
_COLOUR = re.compile("\x1b" + r"\[[0-9;]*m")


def _class_of(directory: Path, config: PreTrainedConfig, task: Task) -> Any:
    """Return the class of models of a task that a config is for."""
    import transformers
    from transformers.models.auto import modeling_auto

    mapping = {
        "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }[task.name]
    if type(config) in mapping:
        return mapping[type(config)]
    if not code_is_trusted():
        if getattr(config, "auto_map", None):
            raise code_refused(directory, f"model {directory}", str(config.auto_map))
        kind = "classifier" if task.labels else "causal language model"
        raise ModelError(
            f"model {directory}: is a {config.model_type}, of which transformers has no {kind}; a "
            "decoder such as llama, qwen3 or gpt2 is needed"
        )
    import torch

    with torch.device("meta"):
        auto = getattr(transformers, task.auto_class)
        return type(auto.from_config(config, trust_remote_code=True))


def _without_head(info: Mapping[str, Any], model: PreTrainedModel, task: Task) -> Mapping[str, Any]:
    """Return what did not fit, without what a classifier over a language model is to lack.

    That is a head of its own, all of it, and a place for that over the vocabulary.
    """
    if not task.labels:
        return info
    body = f"{model.base_model_prefix}."
    head = {name for name, _ in model.named_parameters() if not name.startswith(body)}
    if not head or not head <= set(info.get("missing_keys") or ()):
        return info
    unexpected = info.get("unexpected_keys") or ()
    return {
        **info,
        "missing_keys": set(info["missing_keys"]) - head,
        "unexpected_keys": {key for key in unexpected if key.startswith(body)},
    }


def check_keys(what: str, info: Mapping[str, Any], model: str) -> None:
    """Raise `ModelError` unless a checkpoint held what a model needs and nothing else.

    `info` is what `from_pretrained(output_loading_info=True)` returns, from which transformers has
    taken tied weights and what an architecture declares ignorable.
    """
    missing = sorted(info.get("missing_keys") or ())
    unexpected = sorted(
        key for key in info.get("unexpected_keys") or () if not _COMPUTED.search(key)
    )
    mismatched = sorted(info.get("mismatched_keys") or ())
    problems = []
    if missing:
        problems.append(f"holds no weight for {_some(missing)}, which would be random numbers")
    if unexpected:
        problems.append(f"holds weights that {model} has no place for: {_some(unexpected)}")
    if mismatched:
        texts = [f"{key} is {list(got)}, {list(wanted)} needed" for key, got, wanted in mismatched]
        problems.append(f"holds weights of another shape: {_some(texts)}")
    if problems:
        raise ModelError(
            f"{what}: the checkpoint {', and '.join(problems)}; it is of another model than its "
            "config.json says, was renamed or is incomplete: take it from its source again, or "
            "mend config.json"
        )


# Causal masks and rotary tables that old releases of transformers wrote as buffers: they are
# computed, and hold nothing that was learned.
_COMPUTED = re.compile(
    r"(\.attn(\.attention)?\.(masked_)?bias|\.masked_bias|\.causal_mask|(^|\.)position_ids"
    r"|\.inv_freq|\.(cos|sin)_cached)$"
)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
