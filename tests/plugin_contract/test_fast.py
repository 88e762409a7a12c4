"""What explain() says about speed is what the trainer then does."""

from __future__ import annotations

import logging
from typing import Any

import attrs
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig
from transformers.models.auto import AutoModelForCausalLM

from tunesmith.ops import native_status
from tunesmith.plugin.conditions import Conditions
from tunesmith.plugin.fast import FastTrainer, FastTrainerConfig, fast, prepare
from tunesmith.plugin.trainers import Trainer, TrainerConfig

pytestmark = pytest.mark.skipif(
    native_status().isa in ("", "scalar"), reason="there are no vector kernels on this machine"
)

LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = LlamaConfig(**LLAMA_SIZES)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)


class Plain(Trainer[Any]):
    def build(self, session: Any, data: Any, directory: Any) -> Any:
        raise NotImplementedError


class Quick(FastTrainer[Any]):
    def build(self, session: Any, data: Any, directory: Any) -> Any:
        raise NotImplementedError


def foretold_by(
    config: TrainerConfig,
    model: Any,
    device: str = "cpu",
    *,
    adapter: bool = True,
    processes: int = 1,
) -> tuple[str, ...]:
    kind = Quick if isinstance(config, FastTrainerConfig) else Plain
    conditions = Conditions(
        device=device,
        precision="bf16",
        trains_base=not adapter,
        processes=processes,
        model=model,
    )
    return tuple(map(str, kind(config).explain(conditions)))


def model_of(config: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_config(config, **options)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("compile_", [True, False])
def test_explain_foretells_what_is_logged(
    config: Any,
    attention: str,
    on: bool,
    adapter: bool,
    compile_: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = FastTrainerConfig(varlen_attention=on, fused_layers=on, compile=compile_)
    with torch.device("meta"):
        skeleton = model_of(config, attn_implementation=attention)
    _, *foretold = foretold_by(options, skeleton, adapter=adapter)
    del foretold[3]  # the optimizer is not made here
    model = model_of(config, attn_implementation=attention).requires_grad_(not adapter)
    with caplog.at_level(logging.INFO, logger="tunesmith"):
        prepare(model, options)
    logged = [record.getMessage() for record in caplog.records if record.name == "tunesmith"]
    # the same choice; where it is no, reasons may be worded otherwise
    assert len(logged) == len(foretold) == 3 + compile_
    if config is LLAMA and on and adapter and attention == "sdpa" and not compile_:
        assert "up to 2 in one pass each" in foretold[2]
        assert "in 4 bits" in logged[2]  # which only shows when it is loaded
        del logged[2], foretold[2]
    for line, said in zip(logged, foretold, strict=True):
        assert line.split(" (")[0] == said.split(" (")[0]


def test_each_reason_is_named() -> None:
    model = model_of(LLAMA, attn_implementation="sdpa")
    on = FastTrainerConfig()

    def lines(config: TrainerConfig = on, device: str = "cpu", adapter: bool = True) -> str:
        return "\n".join(foretold_by(config, model, device, adapter=adapter))

    assert "in one pass each: 5 norms, 2 gated MLPs, the rotary embedding" in lines()
    assert "optimizer: torch's fused AdamW (auto: what is trained is small" in lines()
    other = lines(device="xpu")
    assert other.count("as the model has it (there are no kernels for xpu)") == 1
    # decoder layers need the attention that is not there
    assert other.count("as the model has them (there are no kernels for xpu)") == 2
    assert ("no CUDA kernels" in lines(device="cuda")) is not native_status().cuda
    assert "but not 5 norms, whose weights are trained" in lines(adapter=False)
    assert "decoder layers: as the model has them (their norms are trained)" in lines(adapter=False)
    assert "(auto: 8 bytes of states for each weight; adamw_8bit would round" in lines(
        adapter=False
    )
    assert "mixed precision" in lines(adapter=False)
    assert "chunked_loss is off" in lines(attrs.evolve(on, chunked_loss=False))
    assert "bitsandbytes" in lines(attrs.evolve(on, optimizer="adamw_8bit"))


def test_of_a_trainer_without_the_pieces_nothing_is_claimed() -> None:
    model = model_of(LLAMA, attn_implementation="sdpa")
    [line] = foretold_by(TrainerConfig(), model)
    assert line.startswith("optimizer:")


def test_with_several_processes_no_loss_from_hidden_states_is_claimed() -> None:
    with torch.device("meta"):
        model = model_of(LLAMA)
    loss, *_ = foretold_by(FastTrainerConfig(), model, processes=2)
    assert loss == (
        "loss: from the logits of all tokens at once (with several processes the model is wrapped "
        "as a whole)"
    )


def test_what_is_off_says_what_switches_it_on_and_only_that() -> None:
    with torch.device("meta"):
        model = model_of(LLAMA, attn_implementation="eager")

    def slow(**options: Any) -> dict[str, str]:
        config = FastTrainerConfig(**options)
        pieces = Quick(config).explain(Conditions(precision="bf16", model=model))
        return {each.text.split(":")[0]: each.remedy for each in pieces if not each.fast}

    # an attention that is not torch's is no matter of our options
    assert slow() == {"attention": "", "decoder layers": ""}
    assert slow(chunked_loss=False)["loss"] == "chunked_loss=True"
    off = slow(varlen_attention=False, fused_layers=False)
    assert off["attention"] == "varlen_attention=True"
    assert off["norms, gated MLPs, rotary embedding"] == "fused_layers=True"
    assert off["decoder layers"] == "fused_layers=True"
    assert slow(compile=True) == {}


def test_a_loss_with_further_terms_is_foretold() -> None:
    experts = MixtralConfig(**LLAMA_SIZES, num_local_experts=2, output_router_logits=True)
    with torch.device("meta"):
        model = model_of(experts)
    loss, *_ = foretold_by(FastTrainerConfig(), model)
    assert loss == "loss: from the logits of all tokens at once (its own loss has further terms)"
    experts.router_aux_loss_coef = 0.0
    loss, *_ = foretold_by(FastTrainerConfig(), model)
    assert "from hidden states" in loss


def test_a_librarys_trainer_is_made_faster_and_computes_the_same(tmp_path: Any) -> None:
    import transformers

    class Theirs(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kw: Any) -> Any:
            return model(**inputs).loss

    rows = [{"input_ids": list(range(n, n + 8)), "labels": list(range(n, n + 8))} for n in range(8)]

    def trained(cls: Any, place: Any, quick: bool) -> Any:
        torch.manual_seed(0)
        model = model_of(LLAMA, attn_implementation="sdpa")
        if quick:
            prepare(model, FastTrainerConfig())
        arguments = transformers.TrainingArguments(
            str(place), max_steps=2, use_cpu=True, report_to="none", learning_rate=1e-2
        )
        trainer = cls(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=transformers.default_data_collator,
        )
        trainer.train()
        return trainer

    ours = trained(fast(Theirs), tmp_path / "ours", True)
    theirs = trained(Theirs, tmp_path / "theirs", False)
    assert isinstance(ours, Theirs)
    assert type(ours).__name__ == "FastTheirs"
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
