"""Typed verbs for the built-in plugins, by tools/write_verbs.py: do not edit by hand.

Each method is `.peft`, `.train` or `.export` with the plugin named, and its options spelled out for
the editor and the type checker. What is not given is not in the recipe.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self, TypedDict, Unpack

from tunesmith.sugar import Chain, sugar

__all__ = ["Verbs"]


class FastTrainerOptions(TypedDict, total=False):
    """Options that trainers share.

    epochs: Passes over the training data; ignored when max_steps is given.
    max_steps: Optimizer steps to take, instead of epochs.
    batch_size: Examples (or packed blocks) in one forward pass on one device.
    gradient_accumulation: Forward passes summed into one optimizer step; 4 x 4 = 16 follows QLoRA
        (arXiv:2305.14314, table 9).
    learning_rate: Peak learning rate; unset takes the trainer's own for the method in use.
    scheduler: Learning rate over time; cosine as Stanford Alpaca's and the alignment handbook's
        recipes.
    warmup: Share of all steps (below 1) or number of steps that warm up; unset takes 0.03, as QLoRA
        and Alpaca, and none with the scheduler "constant", which has no warm-up.
    max_length: Tokens of a sequence, prompt included; longer ones are cut at the end. 1024 as TRL.
    gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third
        more time.
    optimizer: auto takes torch's fused AdamW; bitsandbytes' 8-bit ones round its states.
    weight_decay: AdamW's decoupled weight decay; 0 as QLoRA and Alpaca.
    max_grad_norm: Gradients are scaled down to this norm; 1.0 is transformers' default, QLoRA uses
        0.3.
    seed: Seed of shuffling and dropout; unset takes the recipe's.
    eval_data: Held-out data to evaluate on, read in the same format as the training data.
    on_bad_row: What is done about a row that its format cannot read: "error" stops, naming it, and
        "drop" leaves it out and lists it.
    eval_split: Share (below 1) or number of rows held out of the training data to evaluate on.
    eval_steps: Evaluate every so many optimizer steps; unset evaluates once an epoch.
    early_stopping: Stop after so many evaluations without a better eval loss, and keep the best
        weights.
    save_steps: Take a checkpoint every so many optimizer steps, and keep the last ones; unset, one
        is taken every ten minutes or tenth of the steps, and none is kept but the result.
    save_strategy: epoch takes a checkpoint at the end of each epoch, steps every save_steps, and
        the last ones are kept; no takes none on the way, not by time either. Unset is steps where
        save_steps is.
    save_total_limit: Checkpoints that are kept of those which were asked for, beside the best one;
        unset keeps the last two.
    logging_steps: Log every so many optimizer steps.
    loggers: tensorboard, wandb or none; nothing is ever sent anywhere unless named here.
    deduplicate: Drop rows that say exactly what an earlier row says; they are counted and listed.
    chunked_loss: Compute the loss some tokens at a time, so that the logits of all are never held;
        where the model cannot be taken apart for that, and if false, all are. The loss is the same.
    varlen_attention: Attend to each sample of a batch on its own, not to a whole row under a mask:
        on the CPU, and where the model takes its attention from transformers' registry. The numbers
        are the same.
    fused_layers: Run norms, gated feed-forward blocks and rotary embeddings in one pass each where
        the model's own do the same, and on the CPU whole decoder layers. Less time and memory; the
        numbers are the same.
    compile: Compile the model's layers with torch.compile, which takes a minute or more at first;
        attention and what stands between the linear layers are then torch's to fuse.
    """

    epochs: Annotated[float, 1.0]
    max_steps: Annotated[int | None, None]
    batch_size: Annotated[int, 4]
    gradient_accumulation: Annotated[int, 4]
    learning_rate: Annotated[float | None, None]
    scheduler: Annotated[str, "cosine"]
    warmup: Annotated[float | None, None]
    max_length: Annotated[int, 1024]
    gradient_checkpointing: Annotated[bool, False]
    optimizer: Annotated[str, "auto"]
    weight_decay: Annotated[float, 0.0]
    max_grad_norm: Annotated[float, 1.0]
    seed: Annotated[int | None, None]
    eval_data: Annotated[str | tuple[str, ...] | None, None]
    on_bad_row: Annotated[str, "error"]
    eval_split: Annotated[float | int, 0]
    eval_steps: Annotated[int | None, None]
    early_stopping: Annotated[int | None, None]
    save_steps: Annotated[int | None, None]
    save_strategy: Annotated[str | None, None]
    save_total_limit: Annotated[int | None, None]
    logging_steps: Annotated[int, 1]
    loggers: Annotated[tuple[str, ...], ()]
    deduplicate: Annotated[bool, True]
    chunked_loss: Annotated[bool, True]
    varlen_attention: Annotated[bool, True]
    fused_layers: Annotated[bool, True]
    compile: Annotated[bool, False]


class Verbs(Chain):
    """A verb for each built-in method, trainer and exporter."""

    __slots__ = ()

    @sugar("peft", "lora")
    def lora(
        self,
        *,
        name: str | None = None,
        r: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: str | tuple[str, ...] = "all-linear",
        experts: bool = True,
        bias: str = "none",
        rslora: bool = False,
        dora: bool = False,
    ) -> Self:
        """Low-rank adaptation.

        name: what the adapter is called; unset, the step that makes it.
        r: Rank of the update; 16 as PEFT's QLoRA recipes (QLoRA itself: 64, with no gain above 8).
        alpha: The update is scaled by alpha / r; unset takes 2 r, the ratio of Microsoft's LoRA and
            of "LoRA Learns Less and Forgets Less" (arXiv:2405.09673).
        dropout: Dropout on the adapter's input; 0 as PEFT's default, which keeps DPO's log-probs
            exact.
        targets: What to adapt: names of layers (the end of a full name will do) or of stacked
            weights, or a regular expression. "all-linear" is every linear layer but head and
            routers, as QLoRA.
        experts: Let "all-linear" take in the stacked experts of a mixture, which are no layers of
            their own. dropout and dora cannot be had on those.
        bias: Which biases are trained along.
        rslora: Scale by alpha / sqrt(r) instead (rsLoRA, arXiv:2312.03732).
        dora: Train magnitude and direction apart (DoRA, arXiv:2402.09353).
        """
        return self  # a declaration; the decorator appends the step

    @sugar("train", "dpo")
    def dpo(
        self,
        data: Any,
        *,
        format: str | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        **options: Unpack[FastTrainerOptions],
    ) -> Self:
        """Direct preference optimization.

        data: path or paths, hub id, `datasets.Dataset`, list of dicts, or a `Data`,
            which says what is mixed and what is done with the rows first.
        format: name of the data format; unset detects it from the rows.
        beta: Strength of the pull towards the reference; 0.1 as the paper.
        label_smoothing: Probability that a label is the wrong way round (conservative DPO).
        options: those that trainers share; see `FastTrainerOptions`.
        """
        return self  # a declaration; the decorator appends the step

    @sugar("train", "sft", epochs=3.0, max_grad_norm=0.3)
    def sft(
        self,
        data: Any,
        *,
        format: str | None = None,
        packing: bool = False,
        completion_only_loss: bool = True,
        **options: Unpack[FastTrainerOptions],
    ) -> Self:
        """Supervised fine-tuning.

        data: path or paths, hub id, `datasets.Dataset`, list of dicts, or a `Data`,
            which says what is mixed and what is done with the rows first.
        format: name of the data format; unset detects it from the rows.
        packing: Fill sequences of max_length with several examples, which do not see each other.
        completion_only_loss: Learn the assistant's turns only; false learns every token.
        epochs: Passes over the training data; 3 as Stanford Alpaca and TRL. max_steps overrides it.
        max_grad_norm: Gradients are scaled down to this norm; 0.3 as QLoRA.
        options: those that trainers share; see `FastTrainerOptions`.
        """
        return self  # a declaration; the decorator appends the step

    @sugar("export", "merge")
    def merge(
        self,
        *,
        dtype: str = "auto",
        shard_gb: float = 2.0,
        verify: bool = True,
    ) -> Self:
        """Adapter added into the base.

        dtype: Dtype of the saved weights; auto takes the run's compute dtype.
        shard_gb: Size of a .safetensors file in GiB; one shard and one tensor are in memory at a
            time.
        verify: Open what was written and compare it with the adapter on its base: weight by weight,
            and by the logits of a few rows. It takes about as long again; the two are not in memory
            at once.
        """
        return self  # a declaration; the decorator appends the step

    @sugar("export", "mix")
    def mix(
        self,
        *,
        name: str | None = None,
        adapters: Mapping[str, float],
        rank: int | None = None,
    ) -> Self:
        """Several adapters added up to one.

        name: what the adapter is called; unset, the step that makes it.
        adapters: Names of the adapters, and what the update of each is multiplied by before they
            are added.
        rank: Cut the sum to this rank by singular value decomposition; unset keeps all of it, at
            the sum of the ranks.
        """
        return self  # a declaration; the decorator appends the step
