"""Each process's share of the rows: all of them, and none twice, in the order of one process.

accelerate gives the processes a batch each in turn, and fills the last turn up with rows from the
beginning, so that some count twice. Here the rows of that turn are divided among the processes; one
that gets none computes on another row, of which nothing counts (`UNCOUNTED`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from accelerate.data_loader import BatchSamplerShard

__all__ = ["UNCOUNTED", "share_rows"]

UNCOUNTED = "uncounted"
"""Key of a batch that is only there because the other processes have one."""


class _Shares(BatchSamplerShard):  # type: ignore[misc]
    """Yields lists of row numbers, as many in each process; some may be empty."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.batch_sampler)
        while turn := list(islice(batches, self.num_processes)):
            if len(turn) == self.num_processes:
                yield list(turn[self.process_index])
                continue
            rows = [row for batch in turn for row in batch]
            yield rows[self.process_index :: self.num_processes]


def share_rows(loader: Any) -> Any:
    """Let an `accelerate` data loader of several processes give each row to one of them.

    Its collator is asked about a row of the data set where a process's share is empty. Returns the
    loader; one that is not divided is left alone.
    """
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard):
        return loader
    shard.__class__ = _Shares
    within = getattr(loader, "base_dataloader", loader)  # the one that collates
    within.collate_fn = _collator(within.collate_fn, loader.dataset)
    return loader


def _collator(
    collate: Callable[[Sequence[Any]], dict[str, Any]], rows: Sequence[Any]
) -> Callable[[Sequence[Any]], dict[str, Any]]:
    import torch

    def collated(items: Sequence[Any]) -> dict[str, Any]:
        if len(items):
            return collate(items)
        return {**collate([rows[0]]), UNCOUNTED: torch.tensor(True)}

    return collated
