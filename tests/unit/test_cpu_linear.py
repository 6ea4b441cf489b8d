"""Which linear layers the kernels take: whole ones, with plain weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt import runtime_context  # noqa: E402
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod  # noqa: E402

from stateful_sglang.cpu.dense_models import UnsupportedModelError, check_linear  # noqa: E402


def linear(method: object) -> SimpleNamespace:
    return SimpleNamespace(quant_method=method, weight=torch.zeros(8, 32))


def ranks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(tp_size=count))


def test_a_plain_layer_of_one_rank_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 1)
    check_linear(linear(UnquantizedLinearMethod()))


def test_a_layer_cut_along_several_ranks_is_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 2)
    with pytest.raises(UnsupportedModelError, match="tensor parallelism"):
        check_linear(linear(UnquantizedLinearMethod()))


def test_a_quantised_layer_is_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 1)
    with pytest.raises(UnsupportedModelError, match="object"):
        check_linear(linear(object()))
