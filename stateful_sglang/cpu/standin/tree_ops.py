"""Ops on draft trees, as SGLang's CPU paths call them.

Semantics are those of SGLang's CUDA kernels (``eagle.cuh``, ``ngram.cuh``). Trees have at most a
few dozen nodes, so host lists beat tensor expressions.
"""

from __future__ import annotations

import torch

_FULL_MASK, _QLEN_ONLY = 0, 1
"""Values of SGLang's ``TreeMaskMode``."""


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Walk each draft tree along the target's own tokens.

    Args:
        predicts: [bs * n] written at accepted rows with the target's token there.
        accept_index: [bs, steps + 1] flat rows of the accepted path, root first, written as far as
            the path goes.
        accept_token_num: [bs] accepted drafts, the root not counted.
        candidates: [bs, n] tokens, the root in column 0.
        retrive_index: [bs, n] flat row of each node.
        retrive_next_token: [bs, n] first child of each node, -1 for none.
        retrive_next_sibling: [bs, n] next sibling of each node, -1 for none.
        target_predict: the target's token at each flat row.
    """
    target = target_predict.flatten().tolist()
    steps = accept_index.shape[1]
    for b, (tokens, rows, children, siblings) in enumerate(
        zip(
            candidates.tolist(),
            retrive_index.tolist(),
            retrive_next_token.tolist(),
            retrive_next_sibling.tolist(),
            strict=True,
        )
    ):
        path = [rows[0]]
        node = 0
        while len(path) < steps:
            node = children[node]
            while node != -1 and tokens[node] != target[path[-1]]:
                node = siblings[node]
            if node == -1:
                break
            path.append(rows[node])
        accept_index[b, : len(path)] = torch.tensor(path, dtype=accept_index.dtype)
        accept_token_num[b] = len(path) - 1
        predicts[path] = torch.tensor([target[row] for row in path], dtype=predicts.dtype)


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Collect the slots of accepted rows, in order, at the start of ``accept_out_cache_loc``.

    ``accept_index`` holds flat rows, -1 where nothing was accepted.
    """
    accepted = accept_index.flatten()
    accepted = accepted[accepted > -1].to(torch.int64)
    accept_out_cache_loc[: accepted.numel()] = out_cache_loc[accepted]


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
) -> None:
    """Write each request's last accepted token into ``bonus_tokens`` [bs].

    ``accept_tokens`` is flat with ``accept_stride`` entries a request; ``accept_lens`` [bs] counts
    the bonus token.
    """
    batch = accept_lens.numel()
    last = torch.arange(batch) * accept_stride + accept_lens.to(torch.int64) - 1
    bonus_tokens[:batch] = accept_tokens.flatten()[last].to(bonus_tokens.dtype)


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Derive positions and links of trees from their ancestor masks.

    Args:
        tree_mask: flat [bs * n * n] bool, row i true at the ancestors of node i (and itself).
        verified_seq_len: [bs] tokens before the root.
        positions: [bs * n] written.
        retrive_index: [bs, n] written: flat row of each node.
        retrive_next_token: [bs, n] written: first child or -1.
        retrive_next_sibling: [bs, n] written: next node with the same parent or -1; -1 for roots.
        batch_size: bs.
        draft_token_num: n.
    """
    n = draft_token_num
    node = torch.arange(n)
    ancestors = tree_mask.view(batch_size, n, n).bool() & (node < node[:, None])
    parent = torch.where(ancestors, node, -1).amax(-1)
    later = torch.where(ancestors, node[:, None], n).amin(1)
    same_parent = (parent[:, :, None] == parent[:, None, :]) & (node[:, None] > node)
    sibling = torch.where(same_parent, node[:, None], n).amin(1)

    positions.view(batch_size, n).copy_(ancestors.sum(-1) + verified_seq_len[:, None])
    retrive_index.view(batch_size, n).copy_(torch.arange(batch_size * n).view(batch_size, n))
    retrive_next_token.view(batch_size, n).copy_(torch.where(later < n, later, -1))
    retrive_next_sibling.view(batch_size, n).copy_(
        torch.where((parent >= 0) & (sibling < n), sibling, -1)
    )


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Build masks, positions and links of draft trees from a drafter's beam choices.

    Args:
        parent_list: [bs, topk * (depth - 1) + 1] score index each beam was expanded from.
        selected_index: [bs, n - 1] score indices of the chosen nodes.
        verified_seq_len: [bs] tokens before the root.
        tree_mask: flat bool; [n, n] a request (QLEN_ONLY) or [n, seq_len + n] a request, one after
            another (FULL_MASK, whose prefix columns the caller filled).
        positions: [bs * n] written.
        retrive_index: [bs, n] written.
        retrive_next_token: [bs, n] written, -1 on entry.
        retrive_next_sibling: [bs, n] written, -1 on entry.
        topk: beams a step.
        depth: draft steps.
        draft_token_num: n, the root included.
        tree_mask_mode: SGLang's ``TreeMaskMode``.

    Raises:
        NotImplementedError: For the bit-packed mask, which no CPU path asks for.
    """
    if tree_mask_mode not in (_FULL_MASK, _QLEN_ONLY):
        raise NotImplementedError(
            f"tree mask mode {tree_mask_mode}: the CPU stand-in of sgl_kernel builds full (0) and "
            "query-only (1) masks"
        )
    n = draft_token_num
    offset = 0
    for b, (beams, chosen, length) in enumerate(
        zip(parent_list.tolist(), selected_index.tolist(), verified_seq_len.tolist(), strict=True)
    ):
        parents = [_parent(beams, chosen, node, topk) for node in range(1, n)]
        prefix = length if tree_mask_mode == _FULL_MASK else 0
        block = tree_mask[offset : offset + n * (prefix + n)].view(n, prefix + n)[:, prefix:]
        offset += n * (prefix + n)
        block.fill_(False)
        block[:, 0] = True
        for node in range(n):
            path = _path_to_root(parents, node)
            block[node, path] = True
            positions[b * n + node] = length + len(path)
            retrive_index[b, node] = b * n + node
        for node in range(n - 1, 0, -1):
            parent = parents[node - 1]
            if parent is None:
                continue
            retrive_next_sibling[b, node] = retrive_next_token[b, parent]
            retrive_next_token[b, parent] = node


def _parent(beams: list[int], chosen: list[int], node: int, topk: int) -> int | None:
    """Node number of a node's parent; None where the parent was not chosen (NaN scores)."""
    beam = chosen[node - 1] // topk
    if beam == 0:
        return 0
    return chosen.index(beams[beam]) + 1 if beams[beam] in chosen else None


def _path_to_root(parents: list[int | None], node: int) -> list[int]:
    """A node and its ancestors, the root left out."""
    path = []
    current: int | None = node
    while current:
        path.append(current)
        current = parents[current - 1]
    return path
