"""What one forward pass asks of attention: built once a step, read by every layer.

Positions count tokens of a request from 0. A request's *new* tokens are those whose queries are in
this pass: a prompt's uncached part (extend), one token (decode), or the pending token with its
drafts (verify). Keys and values of all its tokens, new ones included, lie in the pool at the slots
that the request table names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

Slots = slice | torch.Tensor


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Where each request's queries, keys and values are. All tensors are on the CPU."""

    req_to_token: torch.Tensor
    """[requests, columns] int32: the slot of each position."""
    req_index: torch.Tensor
    """[batch] int64: each request's row of the table."""
    new_lens: tuple[int, ...]
    """New tokens of each request."""
    kv_lens: tuple[int, ...]
    """Tokens of each request, the new ones included."""
    seq_lens: torch.Tensor
    """[batch] int64: ``kv_lens`` for compiled code."""
    q_starts: torch.Tensor
    """[batch + 1] int64: first query row of each request, then the number of rows."""
    tree_mask: torch.Tensor | None = None
    """Flat bool: for each request, row by row, which of its new tokens a new token sees; None where
    each sees itself and those before it. All tokens before the new ones are always seen."""
    mask_offsets: torch.Tensor | None = None
    """[batch] int64: where each request's part of ``tree_mask`` begins."""
    _slots: dict[int, Slots] = field(default_factory=dict, repr=False)
    _masks: dict[tuple[int, ...], torch.Tensor | None] = field(default_factory=dict, repr=False)

    def slots(self, request: int) -> Slots:
        """Slots of a request's tokens: a slice where they are one ascending run."""
        found = self._slots.get(request)
        if found is None:
            row = self.req_to_token[self.req_index[request], : self.kv_lens[request]]
            found = self._slots[request] = _run(row)
        return found

    def mask(
        self,
        request: int,
        first: int,
        last: int,
        keys: slice,
        window: int,
        dtype: torch.dtype,
        copies: int = 1,
    ) -> torch.Tensor | None:
        """Additive mask of queries [first, last) among a request's new tokens against some keys.

        Args:
            request: Which request of the batch.
            first: First new token.
            last: One past the last.
            keys: Positions of the keys, which must hold every key that the queries see.
            window: Keys further back than this are unseen; negative for no limit.
            dtype: Of the result.
            copies: How often the rows are repeated, one after another.

        Returns:
            [copies * (last - first), keys] zeros and minus infinities; None where everything is
            seen. Not to be written to: all layers share it.
        """
        cell = (request, first, last, keys.start, keys.stop, window, dtype.itemsize, copies)
        if cell not in self._masks:
            mask = self._build_mask(request, first, last, keys, window, dtype)
            self._masks[cell] = mask if mask is None or copies == 1 else mask.repeat(copies, 1)
        return self._masks[cell]

    def _build_mask(
        self, request: int, first: int, last: int, keys: slice, window: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        new, total = self.new_lens[request], self.kv_lens[request]
        position = torch.arange(total - new + first, total - new + last)[:, None]
        key = torch.arange(keys.start, keys.stop)
        seen = key <= position
        if self.tree_mask is not None and self.mask_offsets is not None:
            offset = int(self.mask_offsets[request])
            tree = self.tree_mask[offset : offset + new * new].view(new, new)[first:last]
            prefix = max(total - new - keys.start, 0)
            skipped = max(keys.start - (total - new), 0)
            seen[:, :prefix] = True
            seen[:, prefix:] = tree[:, skipped : skipped + len(key) - prefix].bool()
        if window >= 0:
            seen &= key >= position - window
        if bool(seen.all()):
            return None
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def plan_step(
    req_to_token: torch.Tensor,
    req_index: torch.Tensor,
    new_lens: Sequence[int],
    kv_lens: Sequence[int],
    tree_mask: torch.Tensor | None = None,
) -> StepPlan:
    """Plan a pass over requests with these new and total lengths.

    Args:
        req_to_token: [requests, columns] int32, not copied.
        req_index: [batch] rows of the table.
        new_lens: New tokens of each request; 0 is allowed.
        kv_lens: All tokens of each request.
        tree_mask: See `StepPlan`.

    Raises:
        ValueError: Lengths or the mask's size contradict each other.
    """
    if any(new > total for new, total in zip(new_lens, kv_lens, strict=True)):
        raise ValueError(f"new lengths {list(new_lens)} exceed total lengths {list(kv_lens)}")
    offsets = None
    if tree_mask is not None:
        starts = [0, *accumulate(n * n for n in new_lens)]
        if tree_mask.numel() != starts[-1]:
            raise ValueError(
                f"the tree mask has {tree_mask.numel()} entries; expected {starts[-1]}, the "
                f"squares of {list(new_lens)} added up (masks over the new tokens only)"
            )
        tree_mask = tree_mask.flatten()
        offsets = torch.tensor(starts[:-1], dtype=torch.int64)
    return StepPlan(
        req_to_token=req_to_token,
        req_index=req_index.to(torch.int64),
        new_lens=tuple(new_lens),
        kv_lens=tuple(kv_lens),
        seq_lens=torch.tensor(kv_lens, dtype=torch.int64),
        q_starts=torch.tensor([0, *accumulate(new_lens)], dtype=torch.int64),
        tree_mask=tree_mask,
        mask_offsets=offsets,
    )


def _run(slots: torch.Tensor) -> Slots:
    if slots.numel() == 0:
        return slice(0, 0)
    first, last = int(slots[0]), int(slots[-1])
    if last - first == slots.numel() - 1 and bool((slots[1:] > slots[:-1]).all()):
        return slice(first, last + 1)
    return slots.to(torch.int64)
