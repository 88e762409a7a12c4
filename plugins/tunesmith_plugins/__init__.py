"""Everything tunesmith can do out of the box, registered through the same hooks as a stranger's.

One line here and one file beside it is a plugin. The config classes are imported here, so they
lie in files that import nothing heavy at their top.
"""

from __future__ import annotations

from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.metrics import MetricConfig
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.exporters.merge import MergeConfig
from tunesmith_plugins.exporters.mix import MixConfig
from tunesmith_plugins.methods.lora import LoraConfig
from tunesmith_plugins.quantizers.bitsandbytes import BitsAndBytesConfig
from tunesmith_plugins.quantizers.fp4 import FP4Config
from tunesmith_plugins.quantizers.nf4 import NF4Config
from tunesmith_plugins.rewards.exact_match import ExactMatchConfig
from tunesmith_plugins.trainers.dpo import DPOConfig
from tunesmith_plugins.trainers.sft import SFTConfig
from tunesmith_plugins.transforms.limit import LimitConfig
from tunesmith_plugins.transforms.sample import SampleConfig
from tunesmith_plugins.transforms.split import SplitConfig

_HERE = "tunesmith_plugins"


@hookimpl
def tunesmith_formats() -> list[Spec]:
    """Register the data formats."""
    at = f"{_HERE}.formats"
    return [
        Spec("alpaca", NoOptions, f"{at}.alpaca:Alpaca", summary="instruction, input, output"),
        Spec("messages", NoOptions, f"{at}.messages:Messages", summary="messages: role, content"),
        Spec(
            "sharegpt", NoOptions, f"{at}.sharegpt:ShareGPT", summary="conversations: from, value"
        ),
        Spec(
            "preference",
            NoOptions,
            f"{at}.preference:PreferencePairs",
            summary="prompt, chosen, rejected",
        ),
        Spec("prompt", NoOptions, f"{at}.prompt:Prompts", summary="prompt, and no answer"),
    ]


@hookimpl
def tunesmith_transforms() -> list[Spec]:
    """Register the transforms."""
    at = f"{_HERE}.transforms"
    return [
        Spec("clean", NoOptions, f"{at}.clean:Clean", summary="rows that say something"),
        Spec("deduplicate", NoOptions, f"{at}.deduplicate:Deduplicate", summary="each row once"),
        Spec("limit", LimitConfig, f"{at}.limit:Limit", summary="the first rows"),
        Spec("sample", SampleConfig, f"{at}.sample:Sample", summary="a share of the rows"),
        Spec("split", SplitConfig, f"{at}.split:Split", summary="rows held out to evaluate on"),
    ]


@hookimpl
def tunesmith_quantizers() -> list[Spec]:
    """Register the quantizers."""
    at = f"{_HERE}.quantizers"
    return [
        Spec("nf4", NF4Config, f"{at}.nf4:NF4", summary="4-bit NormalFloat, tunesmith's kernels"),
        Spec("fp4", FP4Config, f"{at}.fp4:FP4", summary="4-bit floats, for models stored so"),
        Spec(
            "bitsandbytes",
            BitsAndBytesConfig,
            f"{at}.bitsandbytes:BitsAndBytes",
            hint="pip install 'tunesmith[bitsandbytes]'",
            requires=("bitsandbytes",),
            summary="4-bit or 8-bit by the bitsandbytes library",
        ),
    ]


@hookimpl
def tunesmith_methods() -> list[Spec]:
    """Register the PEFT methods."""
    at = f"{_HERE}.methods"
    return [Spec("lora", LoraConfig, f"{at}.lora:Lora", summary="low-rank adaptation")]


@hookimpl
def tunesmith_trainers() -> list[Spec]:
    """Register the trainers."""
    at = f"{_HERE}.trainers"
    return [
        Spec(
            "sft",
            SFTConfig,
            f"{at}.sft:SFT",
            example="conversation",
            summary="supervised fine-tuning",
        ),
        Spec(
            "dpo",
            DPOConfig,
            f"{at}.dpo:DPO",
            example="preference",
            summary="direct preference optimization",
        ),
    ]


@hookimpl
def tunesmith_rewards() -> list[Spec]:
    """Register the rewards."""
    return [
        Spec(
            "exact_match",
            ExactMatchConfig,
            f"{_HERE}.rewards.exact_match:ExactMatch",
            summary="1 for the answer that a column holds",
        )
    ]


@hookimpl
def tunesmith_metrics() -> list[Spec]:
    """Register the metrics."""
    at = f"{_HERE}.metrics"
    return [
        Spec(
            "loss",
            MetricConfig,
            f"{at}.loss:Loss",
            example="conversation",
            summary="mean negative log-likelihood of the answers, and perplexity",
        ),
        Spec(
            "preference_accuracy",
            MetricConfig,
            f"{at}.preference_accuracy:PreferenceAccuracy",
            example="preference",
            summary="share of pairs whose chosen answer is the likelier one",
        ),
    ]


@hookimpl
def tunesmith_exporters() -> list[Spec]:
    """Register the exporters."""
    at = f"{_HERE}.exporters"
    return [
        Spec("merge", MergeConfig, f"{at}.merge:Merge", summary="adapter added into the base"),
        Spec("mix", MixConfig, f"{at}.mix:Mix", summary="several adapters added up to one"),
    ]
