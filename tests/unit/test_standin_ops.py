"""The stand-in sgl_kernel's ops against loops that follow SGLang's CUDA and Triton sources."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateful_sglang.cpu.standin import cache_ops, tree_ops


@st.composite
def table_ranges(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int], list[int]]:
    """A request table, rows of it, and a column range for each."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    table = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns) + 1000
    batch = draw(st.permutations(range(rows)))[: draw(st.integers(0, rows))]
    starts = [draw(st.integers(0, columns)) for _ in batch]
    ends = [draw(st.integers(start, columns)) for start in starts]
    return table, batch, starts, ends


@given(case=table_ranges())
def test_slots_are_written_to_the_table_in_request_order(case) -> None:
    table, batch, starts, ends = case
    slots = torch.arange(sum(ends) - sum(starts), dtype=torch.int64)
    expected, at = table.clone(), 0
    for row, start, end in zip(batch, starts, ends, strict=True):
        for column in range(start, end):
            expected[row, column] = slots[at]
            at += 1
    cache_ops.assign_req_to_token_pool_cpu(
        _int(batch), table, _int(starts), _int(ends), slots, table.shape[1]
    )
    assert torch.equal(table, expected)


@given(case=table_ranges(), surplus=st.integers(0, 3))
def test_slots_are_read_from_the_table_in_request_order(case, surplus) -> None:
    table, batch, starts, ends = case
    expected = [
        int(table[row, column])
        for row, start, end in zip(batch, starts, ends, strict=True)
        for column in range(start, end)
    ]
    out = torch.full((len(expected) + surplus,), -5, dtype=torch.int64)
    cache_ops.assign_extend_cache_locs_cpu(
        _int(batch), table, _int(starts), _int(ends), out, table.shape[1]
    )
    assert out.tolist() == expected + [-5] * surplus


def test_draft_slots_follow_each_requests_tokens() -> None:
    table = torch.arange(40, dtype=torch.int32).view(2, 20)
    out = torch.empty(12, dtype=torch.int64)
    cache_ops.assign_draft_cache_locs_contiguous_cpu(
        _int([1, 0]), table, _int([3, 7]), out, 20, topk=2, speculative_num_steps=3
    )
    assert out.tolist() == [*range(23, 29), *range(7, 13)]


@given(
    moves=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), unique_by=lambda m: m[0]),
    seed=st.integers(0, 100),
)
def test_kv_rows_move_as_if_all_at_once(moves, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    buffers = [
        torch.randn(10, 2, 4, generator=random).to(torch.bfloat16),
        torch.randn(10, 3, generator=random),
    ]
    expected = [buffer.clone() for buffer in buffers]
    for buffer, before in zip(expected, buffers, strict=True):
        for target, source in moves:
            buffer[target] = before[source]
    cache_ops.copy_all_layer_kv_cache_cpu(
        torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64),
        torch.tensor([buffer[0].numel() * buffer.itemsize for buffer in buffers]),
        _int([target for target, _ in moves]),
        _int([source for _, source in moves]),
    )
    assert all(map(torch.equal, buffers, expected))


@st.composite
def forests(draw: st.DrawFn) -> list[list[int]]:
    """Parents of each tree's nodes; node 0 is the root and has parent -1."""
    nodes = draw(st.integers(1, 8))
    batch = draw(st.integers(1, 4))
    return [[-1, *(draw(st.integers(0, i - 1)) for i in range(1, nodes))] for _ in range(batch)]


def ancestor_mask(parents: list[int]) -> torch.Tensor:
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def children(parents: list[int], node: int) -> list[int]:
    return [child for child, parent in enumerate(parents) if parent == node]


def links(forest: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, first child, next sibling) of every node, [batch, nodes]."""
    nodes = len(forest[0])
    first = [[(children(tree, i) or [-1])[0] for i in range(nodes)] for tree in forest]
    after = [[_next_sibling(tree, i) for i in range(nodes)] for tree in forest]
    rows = torch.arange(len(forest) * nodes).view(len(forest), nodes)
    return rows, _int(first), _int(after)


def _next_sibling(parents: list[int], node: int) -> int:
    if parents[node] < 0:
        return -1
    return next((c for c in children(parents, parents[node]) if c > node), -1)


@given(forest=forests(), lengths=st.lists(st.integers(0, 50), min_size=4, max_size=4))
def test_a_tree_mask_yields_positions_and_links(forest, lengths) -> None:
    batch, nodes = len(forest), len(forest[0])
    rows, first, after = links(forest)
    positions = torch.full((batch * nodes,), -9)
    found = [torch.full((batch, nodes), -9) for _ in range(3)]
    tree_ops.reconstruct_indices_from_tree_mask(
        torch.cat([ancestor_mask(tree).flatten() for tree in forest]),
        _int(lengths[:batch]),
        positions,
        *found,
        batch,
        nodes,
    )
    depth = [
        length + int(ancestor_mask(tree)[node].sum()) - 1
        for tree, length in zip(forest, lengths, strict=False)
        for node in range(nodes)
    ]
    assert positions.tolist() == depth
    assert all(map(torch.equal, found, (rows, first, after)))


@given(forest=forests(), steps=st.integers(1, 9), data=st.data())
def test_the_greedy_walk_accepts_exactly_the_targets_path(forest, steps, data) -> None:
    batch, nodes = len(forest), len(forest[0])
    rows, first, after = links(forest)
    tokens = st.lists(st.integers(0, 2), min_size=batch * nodes, max_size=batch * nodes)
    candidates = torch.tensor(data.draw(tokens)).view(batch, nodes)
    target = torch.tensor(data.draw(tokens))
    predicts = torch.full((batch * nodes,), -9, dtype=torch.int32)
    accept_index = torch.full((batch, steps), -1, dtype=torch.int32)
    accept_num = torch.full((batch,), -9, dtype=torch.int32)
    tree_ops.verify_tree_greedy_cpu(
        predicts, accept_index, accept_num, candidates, rows, first, after, target
    )
    expected = torch.full((batch * nodes,), -9, dtype=torch.int32)
    for b, tree in enumerate(forest):
        path = [0]
        while len(path) < steps:
            wanted = int(target[b * nodes + path[-1]])
            hit = [c for c in children(tree, path[-1]) if int(candidates[b, c]) == wanted]
            if not hit:
                break
            path.append(hit[0])
        flat = [b * nodes + node for node in path]
        expected[flat] = target[flat].to(torch.int32)
        assert accept_index[b].tolist() == flat + [-1] * (steps - len(flat))
        assert int(accept_num[b]) == len(path) - 1
    assert torch.equal(predicts, expected)


def test_accepted_slots_are_packed_in_order() -> None:
    out = torch.zeros(6, dtype=torch.int64)
    tree_ops.fill_accept_out_cache_loc_cpu(
        torch.tensor([[0, 2, -1], [3, -1, -1]], dtype=torch.int32),
        torch.tensor([10, 11, 12, 13]),
        out,
    )
    assert out.tolist() == [10, 12, 13, 0, 0, 0]


def test_the_bonus_is_each_requests_last_accepted_token() -> None:
    bonus = torch.zeros(2, dtype=torch.int64)
    tree_ops.fill_bonus_tokens_cpu(
        torch.tensor([[5, 6, 7], [8, 9, 0]], dtype=torch.int32), _int([3, 1]), bonus, 3
    )
    assert bonus.tolist() == [7, 8]


@settings(deadline=None)
@given(
    topk=st.integers(1, 3),
    depth=st.integers(1, 4),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    full=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_trees_built_from_beam_choices_have_consistent_masks_and_links(
    topk, depth, lengths, full, seed
) -> None:
    """Scores are numbered as EAGLE numbers them: topk roots, then topk * topk a step."""
    batch = len(lengths)
    random = torch.Generator().manual_seed(seed)
    forest, parent_list, selected = [], [], []
    for _ in range(batch):
        beams, chosen, tree = _random_beams(topk, depth, random)
        parent_list.append(beams)
        selected.append(chosen)
        forest.append(tree)
    nodes = len(forest[0])
    width = [length + nodes if full else nodes for length in lengths]
    mask = torch.ones(sum(nodes * columns for columns in width), dtype=torch.bool)
    positions = torch.full((batch * nodes,), -9)
    rows = torch.full((batch, nodes), -9)
    first, after = (torch.full((batch, nodes), -1) for _ in range(2))
    tree_ops.build_tree_kernel_efficient_cpu(
        _int(parent_list),
        _int(selected),
        _int(lengths),
        mask,
        positions,
        rows,
        first,
        after,
        topk,
        depth,
        nodes,
        0 if full else 1,
    )
    expected_rows, expected_first, expected_after = links(forest)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(first, expected_first)
    assert torch.equal(after, expected_after)
    at = 0
    for b, (tree, length, columns) in enumerate(zip(forest, lengths, width, strict=True)):
        block = mask[at : at + nodes * columns].view(nodes, columns)
        at += nodes * columns
        assert bool(block[:, : columns - nodes].all())
        assert torch.equal(block[:, columns - nodes :], ancestor_mask(tree))
        depths = ancestor_mask(tree).sum(1) - 1 + length
        assert positions[b * nodes : (b + 1) * nodes].tolist() == depths.tolist()


def _random_beams(
    topk: int, depth: int, random: torch.Generator
) -> tuple[list[int], list[int], list[int]]:
    """(parent list, chosen score indices, parents of the tree) of one request, all beams kept."""
    beams = list(range(-1, topk))  # Step 1 expands the root's topk candidates.
    parents_of = dict.fromkeys(range(topk), -1)
    last = list(range(topk))
    for step in range(1, depth):
        base = topk + (step - 1) * topk * topk
        fresh = [base + b * topk + i for b in range(topk) for i in range(topk)]
        kept = [fresh[i] for i in torch.randperm(len(fresh), generator=random)[:topk].tolist()]
        for score in kept:
            parents_of[score] = last[(score - base) // topk]
        last = sorted(kept)
        if step < depth - 1:
            beams += last
    beams = beams[: topk * (depth - 1) + 1]
    chosen = sorted(parents_of)
    node_of = {score: node for node, score in enumerate(chosen, 1)}
    tree = [-1, *(0 if parents_of[s] < 0 else node_of[parents_of[s]] for s in chosen)]
    return beams, chosen, tree


def test_the_bit_packed_tree_mask_is_refused() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="tree mask mode 2"):
        tree_ops.build_tree_kernel_efficient_cpu(*[none] * 8, 1, 1, 1, 2)


def _int(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
