"""What the package can do: a line each."""

from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.options import NoOptions
from tunesmith_growth.answers import AnswersConfig
from tunesmith_growth.bitfit import BitFitConfig
from tunesmith_growth.orpo import OrpoConfig
from tunesmith_growth.prompt_tuning import PromptTuningConfig
from tunesmith_growth.release_note import ReleaseNoteConfig
from tunesmith_growth.reward_head import RewardHeadConfig
from tunesmith_growth.short_first import ShortFirstConfig
from tunesmith_growth.trl_grpo import TrlGrpoConfig
from tunesmith_growth.two_adapters import TwoAdaptersConfig

AT = "tunesmith_growth"


@hookimpl
def tunesmith_methods():
    """Register the methods."""
    return [
        Spec("bitfit", BitFitConfig, f"{AT}.bitfit:BitFit", summary="biases and norms alone"),
        Spec(
            "prompt_tuning",
            PromptTuningConfig,
            f"{AT}.prompt_tuning:PromptTuning",
            summary="learned embeddings before a row",
        ),
    ]


@hookimpl
def tunesmith_transforms():
    """Register the transform."""
    return [
        Spec(
            "short_first",
            ShortFirstConfig,
            f"{AT}.short_first:ShortFirst",
            summary="short rows first",
        )
    ]


@hookimpl
def tunesmith_trainers():
    """Register the trainers."""
    return [
        Spec(
            "orpo",
            OrpoConfig,
            f"{AT}.orpo:Orpo",
            example="preference",
            summary="preferences and answers in one loss",
        ),
        Spec(
            "reward_head",
            RewardHeadConfig,
            f"{AT}.reward_head:RewardHead",
            example="preference",
            summary="a head of one number, by pairs",
        ),
        Spec(
            "trl_grpo",
            TrlGrpoConfig,
            f"{AT}.trl_grpo:TrlGrpo",
            example="conversation",
            requires="trl",
            hint="pip install trl",
            summary="GRPO by TRL's own trainer",
        ),
        Spec(
            "two_adapters",
            TwoAdaptersConfig,
            f"{AT}.two_adapters:TwoAdapters",
            example="conversation",
            summary="policy gradients, held near a named adapter",
        ),
    ]


@hookimpl
def tunesmith_exporters():
    """Register the exporters."""
    return [
        Spec("checksums", NoOptions, f"{AT}.checksums:Checksums", summary="SHA-256 of the base"),
        Spec(
            "release_note",
            ReleaseNoteConfig,
            f"{AT}.release_note:ReleaseNote",
            summary="a note with figures and checksums",
        ),
    ]


@hookimpl
def tunesmith_metrics():
    """Register the metrics."""
    return [
        Spec(
            "answers",
            AnswersConfig,
            f"{AT}.answers:Answers",
            example="conversation",
            summary="words of the reference that are said",
        ),
    ]
