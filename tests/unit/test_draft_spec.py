"""The registration: SGLang accepts it, and a request's row holds what is reserved for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402

from stateful_sglang.runtime.speculation import algorithm as draft_spec  # noqa: E402


@pytest.fixture(scope="module")
def algorithm() -> Any:
    from sglang.srt.speculative import spec_registry

    if spec_registry.get_spec(draft_spec.NAME) is None:
        draft_spec.register()
    return SpeculativeAlgorithm.from_string(draft_spec.NAME)


def arguments(**given: Any) -> Any:
    defaults = {
        "speculative_num_draft_tokens": None,
        "pp_size": 1,
        "enable_dp_attention": False,
        "disaggregation_mode": "null",
        "enable_two_batch_overlap": False,
        "enable_watermark": False,
    }
    return SimpleNamespace(**(defaults | given))


def test_it_answers_whatever_sglang_asks_its_own_algorithms(algorithm: Any) -> None:
    asked = {n for n in vars(SpeculativeAlgorithm) if not n.startswith("_") and n.islower()}
    asked -= {"register", "from_string"}
    assert {name for name in asked if not hasattr(algorithm, name)} == set()


def test_it_passes_for_none_of_sglangs_own(algorithm: Any) -> None:
    assert algorithm.is_speculative()
    predicates = {n for n in dir(algorithm) if n.startswith("is_")}
    predicates -= {"is_some", "is_none", "is_speculative"}
    assert not any(getattr(algorithm, name)() for name in predicates)


def test_it_runs_without_overlap_on_chains_of_the_width_asked_for(algorithm: Any) -> None:
    given = arguments(speculative_num_draft_tokens=5)
    algorithm.handle_server_args(given)
    assert given.disable_overlap_schedule
    assert not given.enable_mixed_chunk
    assert (given.speculative_num_steps, given.speculative_eagle_topk) == (4, 1)


def test_what_it_was_never_tested_with_is_refused_by_name() -> None:
    draft_spec.validate(arguments())
    with pytest.raises(ValueError, match="--pp-size"):
        draft_spec.validate(arguments(pp_size=2))
    with pytest.raises(ValueError, match="--enable-watermark"):
        draft_spec.validate(arguments(enable_watermark=True))


@pytest.mark.parametrize("width", [1, 8, 9, 18, 65])
@pytest.mark.parametrize("page", [1, 16])
def test_a_row_holds_the_reservation_at_the_context_limit(
    monkeypatch: pytest.MonkeyPatch, width: int, page: int
) -> None:
    context, reserve = 512, 2 * width
    monkeypatch.setattr(draft_spec, "get_alloc_reserve_per_decode", lambda: reserve)
    monkeypatch.setattr(draft_spec, "get_alloc_page_size", lambda: page)
    row = context + draft_spec._room_for_reservation(4 + width)
    # SGLang reserves in whole pages beyond what is committed, before every step.
    last_committed = context - 1
    reserved_to = (last_committed + reserve + page - 1) // page * page
    assert reserved_to <= row
