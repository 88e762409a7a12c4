"""Both plugins against tunesmith's conformance kit: everything a plugin of their kind must do."""

from __future__ import annotations

from tunesmith.testing.conformance import FormatConformance, MethodConformance


class TestDolly(FormatConformance):
    plugin = "tunesmith_example.plugin"
    name = "dolly"
    good_rows = (
        {
            "instruction": "Name a bird.",
            "context": "",
            "response": "Thrush.",
            "category": "open_qa",
        },
        {"instruction": "Who sang?", "context": "The thrush sang.", "response": "The thrush."},
        {"instruction": "Name a bird.", "context": None, "response": "Thrush."},
        {"instruction": "Name a bird.", "response": "Thrush."},
    )
    bad_rows = (
        {"instruction": "Name a bird."},
        {"response": "Thrush."},
        {"instruction": None, "response": "Thrush."},
        {"instruction": "Name a bird.", "response": 7},
        {"instruction": "Name a bird.", "response": "Thrush.", "context": ["a", "list"]},
    )


class TestLoraFA(MethodConformance):
    plugin = "tunesmith_example.plugin"
    name = "lora_fa"
