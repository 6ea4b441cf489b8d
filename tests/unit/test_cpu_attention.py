"""Attention in plain torch and compiled, against float64 attention over the same pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateful_sglang.cpu import compiled_attention, torch_attention
from stateful_sglang.cpu.plan import StepPlan, plan_step
from stateful_sglang.cpu.torch_attention import AttentionCall

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
needs_compiler = pytest.mark.skipif(not compiled_attention.available(), reason="no C++ compiler")
KERNELS = [
    pytest.param(torch_attention.attend, id="torch"),
    pytest.param(compiled_attention.attend, id="compiled", marks=needs_compiler),
]


class Batch(NamedTuple):
    """Requests whose tokens lie in a pool, old keys written and new ones still to be."""

    plan: StepPlan
    call: AttentionCall
    slots: list[list[int]]
    k: list[torch.Tensor]
    """Every key of each request, float64 [tokens, kv_heads, dim]."""
    v: list[torch.Tensor]


def make_batch(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (6, 2),
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    scattered: bool = True,
    logit_cap: float = 0.0,
    window: int = -1,
    causal: bool = True,
    trees: list[torch.Tensor] | None = None,
    seed: int = 0,
) -> Batch:
    """Requests of (new, total) tokens; slots that nobody owns and the output hold NaN."""
    random = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    total = sum(length for _, length in lengths)
    order = torch.randperm(total + 5, generator=random) if scattered else torch.arange(total + 5)
    k_pool = torch.full((total + 5, kv_heads, dim), torch.nan, dtype=dtype)
    v_pool = k_pool.clone()
    table = torch.full((len(lengths) + 2, 4 + max([n for _, n in lengths], default=0)), -7)
    index = torch.randperm(len(lengths) + 2, generator=random)[: len(lengths)]
    slots, keys, values, new_k, new_v, new_slots = [], [], [], [], [], []
    start = 0
    for row, (new, length) in zip(index.tolist(), lengths, strict=True):
        mine = order[start : start + length]
        start += length
        k, v = (torch.randn(length, kv_heads, dim, generator=random).to(dtype) for _ in range(2))
        table[row, :length] = mine
        old = length - new
        k_pool[mine[:old]], v_pool[mine[:old]] = k[:old], v[:old]
        slots.append(mine.tolist())
        keys.append(k.double())
        values.append(v.double())
        new_k.append(k[old:])
        new_v.append(v[old:])
        new_slots.append(mine[old:])
    tokens = sum(new for new, _ in lengths)
    empty = torch.empty(0, kv_heads, dim, dtype=dtype)
    call = AttentionCall(
        q=torch.randn(tokens, q_heads, dim, generator=random).to(dtype),
        k_new=torch.cat([empty, *new_k]),
        v_new=torch.cat([empty, *new_v]),
        out_loc=torch.cat([torch.empty(0, dtype=torch.int64), *new_slots]),
        k_pool=k_pool,
        v_pool=v_pool,
        out=torch.full((tokens, q_heads, dim), torch.nan, dtype=dtype),
        scale=dim**-0.5,
        logit_cap=logit_cap,
        window=window,
        causal=causal,
    )
    plan = plan_step(
        table.to(torch.int32),
        index,
        [new for new, _ in lengths],
        [length for _, length in lengths],
        None if trees is None else torch.cat([tree.flatten() for tree in trees]),
    )
    return Batch(plan, call, slots, keys, values)


def reference(batch: Batch, trees: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Attention one query at a time in float64, straight from the definition."""
    call, plan = batch.call, batch.plan
    group = call.q.shape[1] // call.k_pool.shape[1]
    out = torch.empty(call.out.shape, dtype=torch.float64)
    row = 0
    for request, (new, total) in enumerate(zip(plan.new_lens, plan.kv_lens, strict=True)):
        for i in range(new):
            position = total - new + i
            seen = torch.arange(total) <= (position if call.causal else total)
            if trees is not None:
                seen[total - new :] = trees[request][i]
            if call.window >= 0 and call.causal:
                seen &= torch.arange(total) >= position - call.window
            for head in range(call.q.shape[1]):
                k, v = batch.k[request][seen, head // group], batch.v[request][seen, head // group]
                scores = k @ call.q[row, head].double() * call.scale
                if call.logit_cap:
                    scores = call.logit_cap * torch.tanh(scores / call.logit_cap)
                out[row, head] = scores.softmax(0) @ v
            row += 1
    return out


def check(
    attend: Callable[[StepPlan, AttentionCall], None], batch: Batch, **kwargs: object
) -> None:
    expected = reference(batch, **kwargs)  # type: ignore[arg-type]
    attend(batch.plan, batch.call)
    torch.testing.assert_close(
        batch.call.out.double(), expected, atol=TOLERANCE[batch.call.q.dtype], rtol=2e-2
    )


LENGTHS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 40)).map(lambda pair: (pair[0], sum(pair))),
    max_size=5,
).filter(lambda lengths: all(total for _, total in lengths))


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    heads=st.sampled_from([(6, 2), (4, 4), (7, 1)]),
    scattered=st.booleans(),
    logit_cap=st.sampled_from([0.0, 3.0]),
    window=st.sampled_from([-1, 0, 5]),
    seed=st.integers(0, 1000),
)
def test_any_mix_of_extends_decodes_and_chains_equals_float64(
    attend, dtype, lengths, heads, scattered, logit_cap, window, seed
) -> None:
    check(
        attend,
        make_batch(
            lengths,
            heads=heads,
            dtype=dtype,
            scattered=scattered,
            logit_cap=logit_cap,
            window=window,
            seed=seed,
        ),
    )


def random_tree(nodes: int, seed: int) -> torch.Tensor:
    """Ancestor mask of a random tree whose root is node 0, [nodes, nodes] bool."""
    random = torch.Generator().manual_seed(seed)
    seen = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        parent = int(torch.randint(node, (1,), generator=random))
        seen[node] |= seen[parent]
    return seen


@pytest.mark.parametrize("attend", KERNELS)
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 30)).map(lambda pair: (pair[0], sum(pair))),
        min_size=1,
        max_size=4,
    ),
    window=st.sampled_from([-1, 3]),
    seed=st.integers(0, 1000),
)
def test_a_verify_of_draft_trees_sees_ancestors_only(attend, lengths, window, seed) -> None:
    trees = [random_tree(new, seed + i) for i, (new, _) in enumerate(lengths)]
    check(attend, make_batch(lengths, trees=trees, window=window, seed=seed), trees=trees)


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("window", [-1, 100])
def test_a_long_prompt_crosses_chunks_and_layout_changes(attend, window) -> None:
    check(
        attend,
        make_batch([(300, 420), (33, 33), (1, 70), (290, 290)], heads=(2, 1), dim=8, window=window),
    )


@pytest.mark.parametrize("attend", KERNELS)
def test_without_causality_every_query_sees_the_whole_request(attend) -> None:
    check(attend, make_batch([(4, 9), (7, 7)], causal=False))


@pytest.mark.parametrize("attend", KERNELS)
def test_new_keys_and_values_are_written_at_their_slots_and_nowhere_else(attend) -> None:
    batch = make_batch([(3, 8), (0, 4), (1, 1)])
    attend(batch.plan, batch.call)
    for slots, k, v in zip(batch.slots, batch.k, batch.v, strict=True):
        if len(slots) != 4:  # The request without new tokens was never written whole.
            assert torch.equal(batch.call.k_pool[slots].double(), k)
            assert torch.equal(batch.call.v_pool[slots].double(), v)
    owned = {slot for slots in batch.slots for slot in slots}
    free = [slot for slot in range(len(batch.call.k_pool)) if slot not in owned]
    assert bool(batch.call.k_pool[free].isnan().all())


def test_one_ascending_run_of_slots_is_read_without_a_copy() -> None:
    plan = make_batch([(2, 6)], scattered=False).plan
    assert plan.slots(0) == slice(0, 6)


def test_a_permuted_run_is_not_taken_for_a_slice() -> None:
    table = torch.tensor([[3, 5, 4, 6]], dtype=torch.int32)
    plan = plan_step(table, torch.tensor([0]), [1], [4])
    assert torch.equal(torch.as_tensor(plan.slots(0)), torch.tensor([3, 5, 4, 6]))


def test_a_mask_of_the_wrong_size_is_refused() -> None:
    table = torch.zeros(1, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected 9"):
        plan_step(table, torch.tensor([0]), [3], [5], torch.ones(8, dtype=torch.bool))


def test_more_new_tokens_than_tokens_are_refused() -> None:
    table = torch.zeros(1, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="exceed"):
        plan_step(table, torch.tensor([0]), [3], [2])
