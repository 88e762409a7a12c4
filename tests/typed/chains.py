"""Chains as users write them, for the type checker alone: `make lint` reads this, nothing runs it.

Each line that is wrong says which error it has to be. One that mypy let pass would make the comment
superfluous, which is an error of its own (warn_unused_ignores).
"""

from __future__ import annotations

from typing import assert_type

from tunesmith import Data, Tuner

start = Tuner("org/model", seed=3)

# every option by its name and type, own and shared; the chain stays a Tuner
assert_type(start.quantize("nf4").lora(r=8, alpha=16, targets=("q_proj",), name="zh"), Tuner)
assert_type(start.sft("a.json", packing=True, epochs=2, learning_rate=1e-4, eval_steps=5), Tuner)
assert_type(start.dpo(Data("a.json").split(0.1), beta=0.2, warmup=10, loggers=("wandb",)), Tuner)
assert_type(start.sft([{"prompt": "a"}], format="alpaca", max_grad_norm=1.0, seed=None), Tuner)
assert_type(start.use("zh").evaluate("loss", "b.json").merge(dtype="bf16"), Tuner)
assert_type(start.mix(adapters={"zh": 0.5, "en": 0.5}, name="both"), Tuner)

# an option that there is not, own or shared
Tuner("m", load_in_4bit=True)  # type: ignore[call-arg]
Tuner("m", seed="3")  # type: ignore[arg-type]
start.lora(rank=8)  # type: ignore[call-arg]
start.sft("a.json", num_train_epochs=2)  # type: ignore[call-arg]
start.sft("a.json", beta=0.1)  # type: ignore[call-arg]
start.merge(packing=True)  # type: ignore[call-arg]

# a value of another type
start.lora(r="8")  # type: ignore[arg-type]
start.sft("a.json", packing=1)  # type: ignore[arg-type]
start.sft("a.json", max_steps="10")  # type: ignore[arg-type]
start.dpo("a.json", loggers="wandb")  # type: ignore[arg-type]

# data is needed, and nothing else goes by its place
start.sft()  # type: ignore[call-arg]
start.sft("a.json", 2)  # type: ignore[call-arg, arg-type]
start.lora(8)  # type: ignore[call-arg, arg-type]

# verbs that there are not
start.orpo("a.json")  # type: ignore[attr-defined]
start.SUGAR  # type: ignore[attr-defined] # noqa: B018
