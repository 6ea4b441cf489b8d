"""The verify input answers what SGLang and its attention backends ask of every one."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator  # noqa: E402
from sglang.srt.mem_cache.kv_loc_plan import IdSpaceKind, window_read_extent  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.speculative.ngram_info import NgramVerifyInput  # noqa: E402

from stateful_sglang.runtime.speculation.verify_input import LookupVerifyInput  # noqa: E402


@pytest.mark.parametrize(
    ("given", "extent"),
    [
        (LookupVerifyInput([1, 3, 2], None), 3),
        (LookupVerifyInput([9, 9], None, 9), 9),
        (LookupVerifyInput([], None, 9), 9),  # a trial run of the verify step
    ],
)
def test_a_verify_step_is_read_as_far_as_its_longest_request(
    given: LookupVerifyInput, extent: int
) -> None:
    written = torch.zeros(6, dtype=torch.int64)
    assert window_read_extent(ForwardMode.TARGET_VERIFY, given, written, 3) == extent


class Recorder:
    """Fills the indices of a request with its row, as far as its length."""

    def pack_read_stream(self, *args: Any, **kwargs: Any) -> bool:
        bound = inspect.signature(KVIndexTranslator.pack_read_stream).bind(self, *args, **kwargs)
        asked = bound.arguments
        ends = asked["indptr"].tolist()
        for row, (start, end) in enumerate(itertools.pairwise(ends)):
            assert end - start == asked["seq_lens"][row]
            asked["out"][start:end] = 100 * asked["req_pool_indices"][row] + torch.arange(
                end - start, dtype=torch.int32
            )
        return False


def test_flashinfer_gets_the_layout_of_a_chain_of_one_width() -> None:
    given = LookupVerifyInput([3, 3], None, 3)
    indices, kv_offsets, query_offsets, mask = given.generate_attn_arg_prefill(
        req_pool_indices=torch.tensor([4, 7]),
        paged_kernel_lens=torch.tensor([2, 1]),
        paged_kernel_lens_sum=3,
        translator=Recorder(),  # type: ignore[arg-type]
        plan=None,  # type: ignore[arg-type]
        kind=IdSpaceKind.FULL,
    )
    assert indices.tolist() == [400, 401, 402, 403, 404, 700, 701, 702, 703]
    assert kv_offsets.tolist() == [0, 5, 9]
    assert query_offsets.tolist() == [0, 3, 6]
    assert mask is None


def test_flashinfers_arguments_are_those_of_sglangs_own_chain_input() -> None:
    theirs = inspect.signature(NgramVerifyInput.generate_attn_arg_prefill).parameters
    ours = inspect.signature(LookupVerifyInput.generate_attn_arg_prefill).parameters
    assert list(ours) == list(theirs)
