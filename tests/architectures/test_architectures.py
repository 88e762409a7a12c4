"""The table of architectures says what is so: of a sample each time, of all in the slow tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.architectures import journey, table
from tools.architectures.families import families, make_model
from tools.architectures.sweep import in_processes

SAMPLE = [
    "bart",  # dropout that no module does
    "falcon",  # linear layers of a class of its own
    "gpt2",  # weights the other way round
    "gpt_oss",  # experts with biases, the other way round
    "qwen3_5_text",  # queries with a gate
]


def check(names: list[str]) -> None:
    kept = table.read()
    found = {(o.family, o.base): o for o in in_processes(names, list(journey.BASES))}
    other = [
        f"{family} on {base}: {outcome.verdict}, the table has {kept.get((family, base))!r}: "
        f"{outcome.text}"
        for (family, base), outcome in found.items()
        if outcome.verdict != kept.get((family, base))
    ]
    assert set(found) == {(name, base) for name in names for base in journey.BASES}
    assert not other, "run `python -m tools.architectures --write`, or mend it:\n" + "\n".join(
        other
    )


def test_the_table_has_every_family_on_every_base() -> None:
    assert set(table.read()) == {(name, base) for name in families() for base in journey.BASES}


def test_a_hundred_families_are_right_or_refused_on_both_bases() -> None:
    kept = table.read()
    sound = [
        name
        for name in families()
        if all(kept[name, base] in ("right", "refused") for base in journey.BASES)
    ]
    assert len(sound) >= 100


def test_a_sample_of_the_table_is_so() -> None:
    check(SAMPLE)


@pytest.mark.slow
def test_all_of_the_table_is_so() -> None:
    check(families())


def test_a_decoder_that_gives_other_tokens_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.nn import decoder

    right = decoder.generate
    monkeypatch.setattr(decoder, "generate", lambda *args, **kw: right(*args, **kw).flip(-1))
    make_model("llama", tmp_path / "model")
    outcome = journey.travel("llama", "plain", tmp_path / "model", tmp_path / "work")
    assert outcome.verdict == "wrong"
    assert "greedy decoding" in outcome.text


def test_a_model_that_the_plan_refuses_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    outcome = journey.travel("llama", "plain", tmp_path / "model", tmp_path / "work")
    assert outcome.verdict == "refused"
