"""What SGLang itself says of a request that it gives up for lack of KV, and what we make of it."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch  # noqa: E402
from sglang.srt.managers.scheduler import Scheduler  # noqa: E402
from sglang.srt.runtime_context import get_context, get_parallel  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from stateful_sglang.runtime.sessions.finish import finish_of  # noqa: E402
from stateful_sglang.service.engine import EngineError  # noqa: E402

get_context().override_server_args(device="cpu").install()


def request() -> Req:
    return Req("r", "", array("q", [1, 2]), SamplingParams(max_new_tokens=8), vocab_size=100)


def test_the_last_request_that_does_not_fit_is_out_of_memory() -> None:
    req = request()
    batch = SimpleNamespace(
        reqs=[req],
        _get_decode_retraction_order=ScheduleBatch._get_decode_retraction_order,
        check_decode_mem=lambda selected_indices: False,
        release_req=lambda *_args, **_kwargs: True,
        filter_batch=lambda keep_indices: None,
    )
    _, _, given_up = ScheduleBatch.retract_decode(batch)
    assert given_up == [req]
    with pytest.raises(EngineError) as ended:
        finish_of(req.to_finish.to_json(), constrained=False)
    assert ended.value.kind == "out_of_memory"


def test_a_prompt_that_the_whole_pool_cannot_hold_is_invalid() -> None:
    req = request()
    scheduler = SimpleNamespace(
        max_new_tokens_limit=None,
        max_req_len=100,
        max_total_num_tokens=1,
        kv_shard_widening=1,
        page_size=1,
        sliding_window_size=None,
        chunked_prefill_size=None,
        token_to_kv_pool_allocator=SimpleNamespace(max_new_tokens_for_memory=lambda *_, **__: None),
    )
    with get_parallel().override(tp_rank=0):
        Scheduler.init_req_max_new_tokens(scheduler, req)
    with pytest.raises(EngineError) as ended:
        finish_of(req.to_finish.to_json(), constrained=False)
    assert ended.value.kind == "invalid"
