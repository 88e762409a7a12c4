"""The built-ins pass the kit that is given to authors of third-party plugins."""

from __future__ import annotations

from tunesmith.testing.conformance import (
    ExporterConformance,
    FormatConformance,
    MethodConformance,
    MetricConformance,
    QuantizerConformance,
    RewardConformance,
    TrainerConformance,
    TransformConformance,
)

BUILTINS = "tunesmith_plugins"


class TestAlpaca(FormatConformance):
    plugin = BUILTINS
    name = "alpaca"
    good_rows = (
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"instruction": "greet", "output": "hello"},
        {"instruction": "greet", "output": "hello", "system": "be kind", "history": [["a", "b"]]},
    )
    bad_rows = ({"instruction": "greet"}, {"instruction": "greet", "output": 3}, {"output": "x"})


class TestMessages(FormatConformance):
    plugin = BUILTINS
    name = "messages"
    good_rows = (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    )
    bad_rows = ({"messages": "a"}, {"messages": []}, {"messages": [{"role": "user"}]})


class TestShareGPT(FormatConformance):
    plugin = BUILTINS
    name = "sharegpt"
    good_rows = (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    )
    bad_rows = (
        {"conversations": None},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"conversations": [{"from": "nobody", "value": "a"}]},
    )


class TestPreference(FormatConformance):
    plugin = BUILTINS
    name = "preference"
    good_rows = (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
    )
    bad_rows = (
        {"prompt": "a", "chosen": "b"},
        {"prompt": None, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": 1, "rejected": "c"},
    )


class TestPrompt(FormatConformance):
    plugin = BUILTINS
    name = "prompt"
    good_rows = (
        {"prompt": "a"},
        {"prompt": [{"role": "user", "content": "a"}], "system": "be kind", "answer": "7"},
    )
    bad_rows = (
        {"prompt": " "},
        {"prompt": None},
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    )


class TestClean(TransformConformance):
    plugin = BUILTINS
    name = "clean"


class TestDeduplicate(TransformConformance):
    plugin = BUILTINS
    name = "deduplicate"


class TestLimit(TransformConformance):
    plugin = BUILTINS
    name = "limit"
    options = {"rows": 2}


class TestSample(TransformConformance):
    plugin = BUILTINS
    name = "sample"
    options = {"share": 0.5}


class TestSampleRepeated(TransformConformance):
    plugin = BUILTINS
    name = "sample"
    options = {"share": 2.5}


class TestSplit(TransformConformance):
    plugin = BUILTINS
    name = "split"
    options = {"held_out": 2}


class TestExactMatch(RewardConformance):
    plugin = BUILTINS
    name = "exact_match"


class TestNF4(QuantizerConformance):
    plugin = BUILTINS
    name = "nf4"


class TestNF4WithoutNesting(QuantizerConformance):
    plugin = BUILTINS
    name = "nf4"
    options = {"nested": False, "blocksize": 128}


class TestFP4(QuantizerConformance):
    plugin = BUILTINS
    name = "fp4"
    tolerance = 0.15  # its sixteen values fit a normal distribution less well than NF4's


class TestBitsAndBytes(QuantizerConformance):
    plugin = BUILTINS
    name = "bitsandbytes"


class TestBitsAndBytes8bit(QuantizerConformance):
    plugin = BUILTINS
    name = "bitsandbytes"
    options = {"bits": 8}


class TestLora(MethodConformance):
    plugin = BUILTINS
    name = "lora"
    options = {"r": 4}


class TestSFT(TrainerConformance):
    plugin = BUILTINS
    name = "sft"


class TestDPO(TrainerConformance):
    plugin = BUILTINS
    name = "dpo"


class TestLoss(MetricConformance):
    plugin = BUILTINS
    name = "loss"


class TestPreferenceAccuracy(MetricConformance):
    plugin = BUILTINS
    name = "preference_accuracy"


class TestMix(ExporterConformance):
    plugin = BUILTINS
    name = "mix"
    options = {"adapters": {"sft": 1.0}}


class TestMerge(ExporterConformance):
    plugin = BUILTINS
    name = "merge"
