"""Each plugin of the growth package passes the kit of its kind."""

from __future__ import annotations

from tunesmith.testing.conformance import (
    MethodConformance,
    TrainerConformance,
    TransformConformance,
)

PLUGIN = "tunesmith_growth.plugin"


class TestPromptTuning(MethodConformance):
    plugin = PLUGIN
    name = "prompt_tuning"
    options = {"tokens": 4}
    identity_at_start = False


class TestBitFit(MethodConformance):
    plugin = PLUGIN
    name = "bitfit"


class TestRewardHead(TrainerConformance):
    plugin = PLUGIN
    name = "reward_head"


class TestOrpo(TrainerConformance):
    plugin = PLUGIN
    name = "orpo"


class TestShortFirst(TransformConformance):
    plugin = PLUGIN
    name = "short_first"
