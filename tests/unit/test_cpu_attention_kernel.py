"""The attention kernel against float64 attention over the same pool."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateful_sglang.cpu import ops

pytestmark = pytest.mark.usefixtures("kernel_path")

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}


@dataclass
class Case:
    """A pool with requests on scattered slots."""

    q: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    req_to_token: torch.Tensor
    req_index: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor
    loc: torch.Tensor

    def run(self, **kwargs) -> torch.Tensor:
        """The kernel's answer, on a poisoned output."""
        out = torch.full_like(self.q, float("nan"))
        return ops.attention(
            self.q,
            self.k_pool,
            self.v_pool,
            self.req_to_token,
            self.req_index,
            self.seq_lens,
            self.starts,
            self.q.shape[2] ** -0.5,
            out=out,
            **kwargs,
        )


def make(lens, heads=(9, 3), dim=64, dtype=torch.float32, seed=0, strided=False) -> Case:
    """Requests of (new, total) tokens each; unused slots hold NaN."""
    gen = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    total = sum(n for _, n in lens)
    longest = max([n for _, n in lens], default=1)
    slots = total + 7
    width = 2 * dim if strided else dim
    pools = []
    order = torch.randperm(slots, generator=gen)[:total]
    for _ in range(2):
        pool = torch.full((slots, kv_heads, width), float("nan"), dtype=dtype)
        pool[order] = torch.randn((total, kv_heads, width), generator=gen).to(dtype)
        pools.append(pool[..., :dim])
    rows = len(lens) + 3
    table = torch.full((rows, longest + 5), -1, dtype=torch.int32)
    index = torch.randperm(rows, generator=gen)[: len(lens)]
    loc, at, starts = [], 0, [0]
    for i, (new, n) in enumerate(lens):
        mine = order[at : at + n].to(torch.int32)
        table[index[i], :n] = mine
        loc.append(mine[n - new :])
        at += n
        starts.append(starts[-1] + new)
    tokens = starts[-1]
    q = torch.randn((tokens, q_heads, width), generator=gen).to(dtype)[..., :dim]
    return Case(
        q,
        pools[0],
        pools[1],
        table,
        index,
        torch.tensor([n for _, n in lens], dtype=torch.int64),
        torch.tensor(starts),
        torch.cat(loc).to(torch.int64) if loc else torch.empty(0, dtype=torch.int64),
    )


def reference(case: Case, cap=0.0, window=-1, causal=True, masks=None) -> torch.Tensor:
    """Attention in float64, one query and head at a time."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    group = case.q.shape[1] // case.k_pool.shape[1]
    scale = case.q.shape[2] ** -0.5
    for i in range(len(case.seq_lens)):
        s, e, n = int(case.starts[i]), int(case.starts[i + 1]), int(case.seq_lens[i])
        slots = case.req_to_token[case.req_index[i], :n].long()
        new, prefix = e - s, n - (e - s)
        k = case.k_pool[slots].double().repeat_interleave(group, 1)
        v = case.v_pool[slots].double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", case.q[s:e].double(), k) * scale
        if cap:
            scores = cap * torch.tanh(scores / cap)
        q_pos, k_pos = prefix + torch.arange(new)[:, None], torch.arange(n)[None]
        allowed = (k_pos <= q_pos) if causal else torch.ones(new, n, dtype=torch.bool)
        if masks is not None and masks[i] is not None:
            allowed = torch.ones(new, n, dtype=torch.bool)
            allowed[:, prefix:] = masks[i]
        if window >= 0:
            allowed = allowed & (k_pos >= q_pos - window)
        scores = scores.masked_fill(~allowed, float("-inf"))
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        out[s:e] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def close(case: Case, got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal within the dtype's error; every element written."""
    assert not got.isnan().any()
    error = (got.double() - want).abs().max().item() if got.numel() else 0.0
    assert error < TOLERANCE[case.q.dtype], error


lengths = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 400)).map(lambda t: (t[0], t[0] + t[1])),
    min_size=0,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    lens=lengths,
    heads=st.sampled_from([(9, 3), (1, 1), (8, 1), (4, 4), (14, 2)]),
    dim=st.sampled_from([64, 16, 80, 128, 34]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cap=st.sampled_from([0.0, 0.0, 2.0]),
    window=st.sampled_from([-1, -1, 0, 5, 130]),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_batch_matches_float64(lens, heads, dim, dtype, cap, window, strided, seed):
    case = make(lens, heads, dim, dtype, seed, strided)
    close(case, case.run(logit_cap=cap, window=window), reference(case, cap, window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lens",
    [
        [(1, 1)],
        [(1, 128)],
        [(1, 129)],
        [(1, 3000)],
        [(300, 300)],
        [(129, 1000), (1, 700), (8, 128), (128, 128)],
    ],
)
def test_block_edges_and_long_contexts(lens, dtype):
    case = make(lens, dtype=dtype)
    close(case, case.run(), reference(case))


@settings(max_examples=30, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 300)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_tree_masks(lens, dtype, seed):
    case = make([(n, n + before) for n, before in lens], dtype=dtype, seed=seed)
    gen = torch.Generator().manual_seed(seed)
    masks, flat, offsets, at = [], [], [], 0
    for i, (n, _) in enumerate(lens):
        if i % 3 == 2:  # a chain among trees
            masks.append(None)
            offsets.append(-1)
            continue
        mask = torch.rand((n, n), generator=gen) < 0.5
        mask.fill_diagonal_(True)
        masks.append(mask)
        flat.append(mask.flatten())
        offsets.append(at)
        at += n * n
    got = case.run(mask=torch.cat(flat), mask_offsets=torch.tensor(offsets))
    close(case, got, reference(case, masks=masks))


def test_full_attention_sees_every_key():
    case = make([(5, 200), (3, 3)])
    close(case, case.run(causal=False), reference(case, causal=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_keys_are_written_and_seen(dtype):
    case = make([(4, 300), (1, 50), (70, 70)], dtype=dtype)
    want, k_want, v_want = case.run(), case.k_pool.clone(), case.v_pool.clone()
    # As a view into a wider projection, the way a fused q, k, v hands them over.
    wide = torch.cat([k_want[case.loc], v_want[case.loc]], 1)
    case.k_pool[case.loc] = float("nan")
    case.v_pool[case.loc] = float("nan")
    got = case.run(k_new=wide[:, :3], v_new=wide[:, 3:], out_cache_loc=case.loc)
    assert torch.equal(got, want)
    assert torch.equal(case.k_pool.nan_to_num(-9), k_want.nan_to_num(-9))
    assert torch.equal(case.v_pool.nan_to_num(-9), v_want.nan_to_num(-9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [-1, 150])
def test_a_row_has_the_same_bits_in_any_company(dtype, window):
    """Extend, verify and decode, one thread or two: the same token, the same bits."""
    case = make([(600, 1500), (3, 400)], dtype=dtype)
    together = case.run(window=window)
    threads = torch.get_num_threads()
    for row in (0, 1, 127, 128, 599):
        alone = Case(
            case.q[row : row + 1],
            case.k_pool,
            case.v_pool,
            case.req_to_token,
            case.req_index[:1],
            torch.tensor([900 + row + 1]),
            torch.tensor([0, 1]),
            case.loc,
        )
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            try:
                assert torch.equal(alone.run(window=window)[0], together[row])
            finally:
                torch.set_num_threads(threads)


def test_nothing_to_do():
    case = make([])
    assert case.run().shape == (0, 9, 64)
    case = make([(0, 10), (0, 0)])
    assert case.run().numel() == 0


def test_a_nan_in_the_context_is_not_hidden():
    case = make([(1, 200)])
    case.k_pool[case.req_to_token[case.req_index[0], 17].item()] = float("nan")
    assert case.run().isnan().any()


def test_misfits_are_refused():
    case = make([(2, 10)])
    with pytest.raises(ValueError, match="head_dim"):
        ops.attention(
            case.q.double(),
            case.k_pool,
            case.v_pool,
            case.req_to_token,
            case.req_index,
            case.seq_lens,
            case.starts,
            1.0,
        )
    case.req_to_token = case.req_to_token.long()
    with pytest.raises(ValueError, match="int32"):
        case.run()
