"""Figures that do not depend on how rows were batched: each is a mean over all that it is of.

transformers' own evaluation is a mean of batch means, and its own log a mean of step means, so that
a batch of one short answer weighs as much as one of three long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from tunesmith.plugin.fast import fast

if TYPE_CHECKING:
    import torch

__all__ = ["ROWS", "RowNames", "Sums", "counted"]

Gathered: TypeAlias = "dict[str, list[torch.Tensor]]"
"""Sums of batches by name, and under `COUNT` how many items each is over."""
COUNT = "count"

ROWS = "rows"
"""Key of a batch under which the numbers of its rows stand; no model is given them."""
TOKENS = "tokens"
"""Key of a batch under which the number of its tokens stands, without padding; as `ROWS`. A packed
block has no mask that would tell, and a padding token may be one of the text's."""


@attrs.frozen(eq=False)
class Sums:
    """What was measured on a batch, as sums: `loss` and whatever else is reported."""

    sums: Mapping[str, torch.Tensor]
    """Scalars; a gradient flows through "loss" alone."""
    count: torch.Tensor
    """How many items the sums are over: trained tokens, or pairs."""


class RowNames:
    """Makes batches by another collator, and notes in each which rows it is of.

    `names` holds (row, where it stands); a row may be an item of the data set, or one in a list
    that is an item (a packed block). A row that is not among them has no name.
    """

    def __init__(
        self, collator: Callable[[Sequence[Any]], dict[str, Any]], names: list[tuple[Any, str]]
    ) -> None:
        self.collator = collator
        self.names = [name for _, name in names]
        self._kept = [row for row, _ in names]  # so that no other object gets the id of one
        self._numbers = {id(row): number for number, row in enumerate(self._kept)}

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """Return the batch, with int64 [rows] under `ROWS` and int64 [1] under `TOKENS`."""
        import torch

        batch = self.collator(items)
        rows = [row for item in items for row in (item if isinstance(item, list) else [item])]
        known = [self._numbers[id(row)] for row in rows if id(row) in self._numbers]
        batch[ROWS] = torch.tensor(known, dtype=torch.int64)
        batch[TOKENS] = torch.tensor([sum(map(_tokens_of, rows))], dtype=torch.int64)
        return batch

    def named(self, batch: Mapping[str, Any]) -> list[str]:
        """Return where the rows of a batch stand, such as "train.jsonl, row 3"."""
        return [self.names[int(number)] for number in batch.get(ROWS, ())]


def counted(cls: Any = None) -> Any:
    """Return a subclass of a `transformers.Trainer` whose steps and figures are means over items.

    `cls` is what it derives from; unset, transformers' own, made faster (`plugin.fast.fast`). A
    function, so that listing trainers imports no torch.
    """
    import torch

    from tunesmith.plugin.shares import UNCOUNTED, share_rows

    base: Any = fast() if cls is None else cls

    class CountedTrainer(base):  # type: ignore[misc]
        """A subclass says what is measured on a batch and how many items are in one.

        An optimizer step minimises the sum over all items of its forward passes, divided by their
        number. What is logged is the same over all steps since the last log, and `loss_over` beside
        it is the number of items; an evaluation is over all that it has seen. With several
        processes all of this is over the rows of all, each of which is in one of them.
        """

        shares_rows = True
        """Whether no row counts twice with several processes."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            # the loss of a step is divided here, by what is in it
            self.model_accepts_loss_kwargs = True
            self.loss_is_scaled_for_ga = True
            # what was measured since the last log: a checkpoint keeps it under this name
            self._measured: dict[str, Gathered] = {"train": {}, "eval": {}}

        def measure(self, model: Any, inputs: dict[str, Any], *, training: bool) -> Sums:
            raise NotImplementedError

        def items_in(self, batch: Mapping[str, Any]) -> Any:
            """Return how many items a batch has."""
            raise NotImplementedError

        def rows_of(self, batch: Mapping[str, Any]) -> list[str]:
            """Return where the rows of a batch stand: file and row."""
            names = getattr(self.data_collator, "named", None)
            return names(batch) if names is not None else []

        def get_train_dataloader(self) -> Any:
            return share_rows(super().get_train_dataloader())

        def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
            return share_rows(super().get_eval_dataloader(*args, **kwargs))

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
            samples, _ = super().get_batch_samples(*args, **kwargs)
            count = sum(self.items_in(batch) for batch in samples if UNCOUNTED not in batch)
            if self.args.world_size > 1:
                held = torch.as_tensor(count, device=self.args.device)
                count = self.accelerator.gather(held).sum()
            return samples, count

        def compute_loss(
            self,
            model: torch.nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            measured = self._measured_on(model, inputs, training=True)
            _add(self._measured["train"], measured)
            count = measured.count if num_items_in_batch is None else num_items_in_batch
            loss = measured.sums["loss"] / count
            if self.args.world_size > 1:  # gradients are averaged over processes
                loss = loss * self.accelerator.num_processes
            return (loss, {}) if return_outputs else loss

        def prediction_step(
            self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, None, None]:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                measured = self._measured_on(model, inputs, training=False)
            _add(self._measured["eval"], measured)
            loss = measured.sums["loss"] / measured.count.clamp(min=1)
            return loss.detach(), None, None

        def _measured_on(self, model: Any, inputs: dict[str, Any], *, training: bool) -> Sums:
            beside = (ROWS, TOKENS, UNCOUNTED)
            given = {name: value for name, value in inputs.items() if name not in beside}
            measured = self.measure(model, given, training=training)
            if UNCOUNTED not in inputs:
                return measured
            # the other processes wait for its gradients, which are none
            nothing = {name: value * 0.0 for name, value in measured.sums.items()}
            return Sums(nothing, torch.zeros_like(measured.count))

        def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
            if TOKENS not in inputs or self.args.include_num_input_tokens_seen == "no":
                super()._track_num_input_tokens(inputs)
                return
            count = inputs[TOKENS].to(self.args.device)
            if UNCOUNTED in inputs:  # the other processes wait for its number
                count = count * 0
            self.state.num_input_tokens_seen += int(self.accelerator.gather(count).sum())

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            self._measured["eval"].clear()
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            means, _ = _take(self._measured["eval"], self.accelerator)
            output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
            return output

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs and self._measured["train"]:
                means, count = _take(self._measured["train"], self.accelerator)
                logs.update(means, loss_over=count)
            super().log(logs, *args, **kwargs)

    return CountedTrainer


def _tokens_of(row: Any) -> int:
    """Return how many tokens a row has: of all its sequences, if it is a pair or a group."""
    if isinstance(row, Mapping) and "input_ids" not in row:
        return sum(map(_tokens_of, row.values()))
    if isinstance(row, Mapping):
        return len(row["input_ids"])
    return len(getattr(row, "input_ids", ()))


def _add(gathered: Gathered, measured: Sums) -> None:
    """Keep what was measured; it stays where it was computed, for a copy waits for a GPU."""
    for name, value in {**measured.sums, COUNT: measured.count}.items():
        gathered.setdefault(name, []).append(value.detach())


def _take(gathered: Gathered, accelerator: Any) -> tuple[dict[str, float], float]:
    """Return means by name and the number of items they are over, and begin anew."""
    import torch

    def total(values: list[torch.Tensor]) -> float:
        mine = torch.stack([value.to(values[-1].device) for value in values])
        if accelerator.num_processes > 1:
            mine = accelerator.gather(mine)
        return float(mine.cpu().double().sum())

    count = total(gathered.pop(COUNT))
    means = {name: total(values) / count for name, values in gathered.items()}
    gathered.clear()
    return means, count
