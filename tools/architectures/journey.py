"""One family's way through everything: plan, sft, dpo, merge, reload, resume, generate.

Each step is checked against what is known without it: DPO's first loss is ln 2, the merged model
that stock transformers opens has the loss of adapter on base, a training that was interrupted ends
in the same bytes, and greedy decoding gives the tokens of transformers' own generate.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import attrs

__all__ = ["BASES", "VERDICTS", "Outcome", "as_json", "travel"]

BASES = ("plain", "nf4")
VERDICTS = ("right", "refused", "wrong", "not tried")

_TOPICS = ("moon", "thrush", "ferry", "bread")
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"Where is the {topic}?"},
            {"role": "assistant", "content": f"In the {topic} house."},
        ]
    }
    for topic in _TOPICS
]
PREFERENCES = [
    {"prompt": f"Where is the {topic}?", "chosen": f"By the {topic}.", "rejected": "No idea."}
    for topic in _TOPICS
]
TRAINING = {
    "max_steps": 2,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "max_length": 64,
    "learning_rate": 1e-2,
    "scheduler": "constant",
    "warmup": 0,
}
SAME_LOSS = 2e-4
"""Losses in nats that count as equal: fp32 sums in another order."""
NEW_TOKENS = 8


@attrs.frozen
class Outcome:
    """What became of a family on a base."""

    family: str
    base: str
    verdict: str
    """One of `VERDICTS`."""
    text: str = ""
    """Why it was refused or not tried, or what is wrong."""

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        """Return what `as_json` has written."""
        return cls(**json.loads(line))


class _WrongError(Exception):
    """Something came out otherwise than it has to."""


def travel(family: str, base: str, model: Path, work: Path) -> Outcome:
    """Take the model of a family through everything; never raises for what the family does."""
    from tunesmith.errors import PlanError

    shutil.rmtree(work, ignore_errors=True)
    try:
        remark = _travel(base, model, work)
    except PlanError as error:
        return Outcome(family, base, "refused", "; ".join(error.problems))
    except _WrongError as wrong:
        return Outcome(family, base, "wrong", str(wrong))
    except Exception as error:  # whatever a family's own code raises
        notes = " ".join(getattr(error, "__notes__", ()))
        where = notes.rpartition("in stage ")[2].partition(" of ")[0]
        text = f"{type(error).__name__}{f' in {where}' if where else ''}: {error}"
        return Outcome(family, base, "wrong", " ".join(text.split()))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Outcome(family, base, "right", remark)


def _travel(base: str, model: Path, work: Path) -> str:
    """Raise for what does not hold; return what could not be asked."""
    tuner = _tuner(base, model)
    sft = tuner.sft(CONVERSATIONS, save_steps=1, **TRAINING)
    whole = (
        sft.dpo(PREFERENCES, **TRAINING)
        .evaluate("loss", CONVERSATIONS, max_length=64)
        .merge()
        .evaluate("loss", CONVERSATIONS, max_length=64)
    )
    result = whole.run(work / "run", progress=False)
    metrics = list(result.metrics.items())
    values = {name.partition("-")[2]: found for name, found in metrics}
    first = values["dpo"]["loss_first"]
    if abs(first - math.log(2)) > 1e-4:
        raise _WrongError(f"dpo begins at a loss of {first:.5f}, not at ln 2")
    with_adapter, merged = (found["loss"] for name, found in metrics if "evaluate" in name)
    if not math.isfinite(merged) or abs(with_adapter - merged) > SAME_LOSS:
        raise _WrongError(f"the loss is {with_adapter:.5f} with the adapter, {merged:.5f} merged")
    if result.model_path is None:
        raise _WrongError("there is no merged model")
    _check_resuming(sft, result.adapters["sft"], work / "again")
    return _check_reloading(result.model_path, merged, values["sft"]["loss_first"])


def _tuner(base: str, model: Path) -> Any:
    from tunesmith import Tuner

    tuner = Tuner(str(model), precision="fp32", device="cpu")
    return (tuner if base == "plain" else tuner.quantize(base)).lora(r=4)


class _StoppedError(Exception):
    """The interruption that a resumed training is to survive."""


def _check_resuming(tuner: Any, expected: Path, work: Path) -> None:
    """Train again, stop in step 2, go on, and compare the adapters' bytes."""
    from tunesmith.plugin.events import Progress

    def stop(_: Any, event: Any) -> None:
        if isinstance(event, Progress) and event.step == 2:
            raise _StoppedError

    try:
        tuner.run(work, progress=False, listeners=[stop])
    except _StoppedError:
        pass
    else:
        raise _WrongError("the training was not to be interrupted")
    resumed = tuner.run(work, progress=False).adapters["sft"]
    files = "adapter_model.safetensors"
    if (resumed / files).read_bytes() != (expected / files).read_bytes():
        raise _WrongError("a training that was interrupted and resumed ends in another adapter")


def _check_reloading(merged: Path, loss: float, before: float) -> str:
    """Open the merged model as stock transformers does; decode by us and by it.

    Returns why it could not be decoded, if stock transformers cannot do so on its own.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.nn import decoder, fused_layers

    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    model, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True, **options)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise _WrongError(f"the merged model has {what}: {sorted(info[what])[:3]}")
    if abs(loss - before) < 1e-4:
        raise _WrongError(f"training changes nothing: {before:.5f} before, {loss:.5f} after")
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    ids = torch.tensor([tokenizer("Where is the moon?")["input_ids"]])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.no_grad():
        try:
            theirs = model.generate(**given)
        except Exception as error:  # in transformers' own code for this family
            return f"stock transformers does not generate: {type(error).__name__}: {error}"
        fused_layers.use(model)
        ours = decoder.generate(model, **given)
    if ours.tolist() != theirs.tolist():
        raise _WrongError(f"greedy decoding gives {ours.tolist()}, transformers {theirs.tolist()}")
    return ""


def as_json(outcome: Outcome) -> str:
    """Return an outcome as a line of JSON."""
    return json.dumps(attrs.asdict(outcome))
