"""SGLang's side of the CPU attention: what its forward batches become, in every mode."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.layers.radix_attention import AttentionType  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from stateful_sglang.cpu import attention as module  # noqa: E402
from stateful_sglang.cpu.attention import CpuAttentionBackend  # noqa: E402

Q_HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 16, 64

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="CPU backend")


class Pool:
    """A KV pool of one layer, as SGLang's plain pool offers it."""

    is_quantized_kv_cache = False
    use_hnd = False
    store_dtype = dtype = torch.float32

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        self.k = torch.randn(SLOTS, KV_HEADS, DIM, generator=random)
        self.v = torch.randn(SLOTS, KV_HEADS, DIM, generator=random)
        self.writes = 0

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.k

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.v

    def set_kv_buffer(self, layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.writes += 1
        self.k[where.loc], self.v[where.loc] = k, v


class Rig:
    """A backend over a small pool, and the answer it must give."""

    def __init__(self, lengths: list[int]) -> None:
        self.pool = Pool()
        self.table = torch.zeros(len(lengths) + 1, 32, dtype=torch.int32)
        slots = iter(torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(2)) + 1)
        for row, length in enumerate(lengths):
            self.table[row + 1, :length] = torch.tensor([int(next(slots)) for _ in range(length)])
        self.lengths = lengths
        self.backend = CpuAttentionBackend(
            SimpleNamespace(
                device="cpu",
                dtype=torch.float32,
                req_to_token_pool=SimpleNamespace(req_to_token=self.table),
                token_to_kv_pool=self.pool,
            )
        )
        self.layer = SimpleNamespace(
            layer_id=0,
            tp_q_head_num=Q_HEADS,
            tp_k_head_num=KV_HEADS,
            qk_head_dim=DIM,
            v_head_dim=DIM,
            scaling=DIM**-0.5,
            logit_cap=0.0,
            sliding_window_size=-1,
            is_cross_attention=False,
            attn_type=AttentionType.DECODER,
        )

    def forward(
        self, mode: ForwardMode, new: list[int], spec: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the backend answers for the last ``new`` tokens of each request, and should.

        As SGLang's do, a verify's ``seq_lens`` leave out what is verified.
        """
        random = torch.Generator().manual_seed(3)
        q = torch.randn(sum(new), Q_HEADS * DIM, generator=random)
        k, v = (torch.randn(sum(new), KV_HEADS, DIM, generator=random) for _ in range(2))
        rows = range(1, len(new) + 1)
        loc = [
            self.table[row, length - count : length]
            for row, length, count in zip(rows, self.lengths, new, strict=True)
        ]
        seq_lens = torch.tensor(self.lengths)
        if mode.is_target_verify():
            seq_lens -= torch.tensor(new)
        batch = SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=torch.tensor(list(rows)),
            seq_lens=seq_lens,
            extend_seq_lens=None if mode.is_target_verify() else torch.tensor(new),
            out_cache_loc=torch.cat(loc).to(torch.int64),
            spec_info=spec,
        )
        self.backend.init_forward_metadata(batch)
        out = self.backend.forward(q, k, v, self.layer, batch)
        return out, self.expected(q, new, getattr(spec, "custom_mask", None))

    def expected(self, q: torch.Tensor, new: list[int], mask: torch.Tensor | None) -> torch.Tensor:
        out, at = [], 0
        for request, (count, length) in enumerate(zip(new, self.lengths, strict=True)):
            slots = self.table[request + 1, :length].long()
            k, v = (x[slots].repeat_interleave(Q_HEADS // KV_HEADS, 1) for x in self._kv())
            for i in range(count):
                seen = torch.arange(length) <= length - count + i
                if mask is not None:
                    start = count * count * request + count * i
                    seen[length - count :] = mask[start : start + count]
                query = q[at].view(Q_HEADS, DIM)
                scores = torch.einsum("hd,khd->hk", query, k[seen]) * DIM**-0.5
                out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen]).flatten())
                at += 1
        return torch.stack(out)

    def _kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pool.k, self.pool.v


def test_an_extend_attends_over_cached_and_new_tokens() -> None:
    out, expected = Rig([9, 5]).forward(ForwardMode.EXTEND, [4, 5])
    torch.testing.assert_close(out, expected)


def test_a_mixed_batch_is_an_extend_with_single_tokens() -> None:
    out, expected = Rig([9, 5]).forward(ForwardMode.MIXED, [6, 1])
    torch.testing.assert_close(out, expected)


def test_a_decode_attends_one_token_a_request() -> None:
    out, expected = Rig([9, 1, 12]).forward(ForwardMode.DECODE, [1, 1, 1])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_ragged_verify_takes_each_requests_own_width(as_tensor: bool) -> None:
    widths = [3, 1, 5]
    spec = SimpleNamespace(verify_lens=torch.tensor(widths) if as_tensor else widths)
    out, expected = Rig([9, 4, 12]).forward(ForwardMode.TARGET_VERIFY, widths, spec)
    torch.testing.assert_close(out, expected)


def test_a_verify_of_one_width_may_bring_trees() -> None:
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool).flatten()
    spec = SimpleNamespace(draft_token_num=3, custom_mask=tree.repeat(2))
    out, expected = Rig([9, 4]).forward(ForwardMode.TARGET_VERIFY, [3, 3], spec)
    torch.testing.assert_close(out, expected)


def test_an_unknown_pool_is_written_through_its_own_method() -> None:
    rig = Rig([9])
    rig.forward(ForwardMode.DECODE, [1])
    assert rig.pool.writes == 1
    assert rig.backend.plain_plan is None


def test_a_plain_pool_is_written_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MHATokenToKVPool", Pool)
    rig = Rig([9, 5])
    out, expected = rig.forward(ForwardMode.EXTEND, [4, 5])
    assert rig.pool.writes == 0
    assert rig.backend.plain_plan is not None
    torch.testing.assert_close(out, expected)


def test_a_layer_without_new_keys_reads_what_another_layer_wrote() -> None:
    rig = Rig([6])
    before = rig.pool.k.clone()
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        req_pool_indices=torch.tensor([1]),
        seq_lens=torch.tensor([6]),
        out_cache_loc=rig.table[1, 5:6].long(),
        spec_info=None,
    )
    rig.backend.init_forward_metadata(batch)
    q = torch.randn(1, Q_HEADS * DIM)
    out = rig.backend.forward(q, None, None, rig.layer, batch)
    torch.testing.assert_close(out, rig.expected(q, [1], None))
    assert torch.equal(rig.pool.k, before)


def test_what_the_backend_cannot_compute_is_refused_by_name() -> None:
    rig = Rig([6])
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE)
    with pytest.raises(NotImplementedError, match="sinks"):
        rig.backend.forward(
            torch.zeros(1, Q_HEADS * DIM), None, None, rig.layer, batch, sinks=torch.zeros(4)
        )


def test_the_registry_makes_our_backend_on_a_cpu_and_sglangs_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from stateful_sglang import cpu

    monkeypatch.setattr(attention_registry, "ATTENTION_BACKENDS", {})
    monkeypatch.setattr("stateful_sglang.cpu.layers.attach", lambda **_: None)
    cpu.attach()
    make = attention_registry.ATTENTION_BACKENDS["torch_native"]
    runner = SimpleNamespace(
        device="cpu", dtype=torch.float32, req_to_token_pool=None, token_to_kv_pool=Pool()
    )
    assert type(make(runner)) is CpuAttentionBackend
    runner.device = "cuda"
    assert type(make(runner)) is TorchNativeAttnBackend
