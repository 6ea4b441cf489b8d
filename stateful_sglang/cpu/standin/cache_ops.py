"""Ops on the request table and the KV pool, as SGLang's CPU paths call them.

Contracts are those of the Triton kernels in SGLang's ``kernels/ops`` and
``mem_cache/allocation.py``.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write the slots of each request's tokens [start, end) into the request table.

    Args:
        req_pool_indices: [bs] rows of the table.
        req_to_token: [rows, pool_len] table, written in place.
        start_offset: [bs] first column of each request.
        end_offset: [bs] one past its last column.
        out_cache_loc: slots of all requests, one after another.
        pool_len: columns of the table.
    """
    rows, columns = _cells(req_pool_indices, start_offset, end_offset)
    req_to_token[rows, columns] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Read the slots of each request's tokens [start, end) out of the request table.

    Shapes as in `assign_req_to_token_pool_cpu`; ``out_cache_loc`` is written in place, its entries
    past the last token are left alone.
    """
    rows, columns = _cells(req_pool_indices, start_offset, end_offset)
    out_cache_loc[: rows.numel()] = req_to_token[rows, columns].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
) -> None:
    """Read the ``topk * speculative_num_steps`` slots that follow each request's tokens."""
    assign_extend_cache_locs_cpu(
        req_pool_indices,
        req_to_token,
        seq_lens,
        seq_lens + topk * speculative_num_steps,
        out_cache_loc,
        pool_len,
    )


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor,
    strides: torch.Tensor,
    tgt_loc: torch.Tensor,
    src_loc: torch.Tensor,
) -> None:
    """Copy rows within every buffer: ``buffer[tgt] = buffer[src]``, as if all at once.

    Args:
        data_ptrs: [buffers] addresses of the K and V buffers of all layers, uint64.
        strides: [buffers] bytes of a row in each.
        tgt_loc: [n] rows written.
        src_loc: [n] rows read, before any is written.
    """
    if tgt_loc.numel() == 0:
        return
    target, source = tgt_loc.numpy(), src_loc.numpy()
    rows = int(max(target.max(), source.max())) + 1
    for address, row_bytes in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (rows * row_bytes)).from_address(address)
        buffer = np.frombuffer(memory, dtype=np.uint8).reshape(rows, row_bytes)
        buffer[target] = buffer[source]


def _cells(
    req_pool_indices: torch.Tensor, start_offset: torch.Tensor, end_offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every table cell in the ranges, in order of request and column."""
    lengths = (end_offset - start_offset).to(torch.int64)
    ends = lengths.cumsum(0)
    rows = torch.repeat_interleave(req_pool_indices.to(torch.int64), lengths)
    shift = torch.repeat_interleave(start_offset.to(torch.int64) - (ends - lengths), lengths)
    return rows, torch.arange(rows.numel(), dtype=torch.int64) + shift
