"""The cardinal tree under SGLang's sliding-window component: theirs evicts, ours still counts."""

from __future__ import annotations

from prefix_rig import Rig, swa_params
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.unified_cache.components import ComponentType, SWAComponent

POOL = 200


def swa_rig(pin_budget: float = 0.5) -> Rig:
    """A rank of a model with one full-attention and one sliding-window layer."""
    return Rig(pool_tokens=POOL, pin_budget=pin_budget, made=swa_params(POOL))


def test_the_window_component_stays_sglangs_own() -> None:
    assert type(swa_rig().tree.components[ComponentType.SWA]) is SWAComponent


def test_sessions_are_counted_and_released() -> None:
    rig = swa_rig()
    said = rig.turn("a", [], list(range(20)), [30, 31])
    rig.check()
    rig.turn("b", [], [*range(20), 50], [51])
    rig.check()
    path = rig.tree.session_path("a")
    assert [n.cardinality for n in path] == [2 if n.depth <= 20 else 1 for n in path]
    rig.turn("a", said, [60, 61, 62, 63, 64], [65])
    rig.check()
    rig.tree.release_session_leaf("b")
    assert {n.cardinality for n in rig.tree.session_path("a")} == {1}
    assert sum(n.tokens for n in rig.tree.session_path("a")) == 27
    rig.check()


def test_window_eviction_keeps_the_counts_right() -> None:
    rig = swa_rig()
    rig.turn("a", [], list(range(20)), [30, 31])
    rig.turn("b", [], [*range(20), 50, 51, 52, 53, 54], [55])
    for _ in range(12):
        rig.tree.evict(EvictParams(num_tokens=0, swa_num_tokens=3))
        rig.check()
        rig.tree.evict(EvictParams(num_tokens=2))
        rig.check()
    assert rig.tree.session_path("a") == rig.tree.session_path("b") == []


def test_an_aborted_turn_leaves_the_committed_path() -> None:
    rig = swa_rig()
    said = rig.turn("a", [], list(range(20)), [30, 31])
    req = rig.start([*said, 40, 41, 42], "a", len(said))
    rig.decode(req, [43, 44])
    rig.abort(req)
    rig.check()
    assert sum(n.tokens for n in rig.tree.session_path("a")) == 21


def test_a_leaf_never_lies_beyond_the_transcript() -> None:
    rig = swa_rig()
    req = rig.start(list(range(20)), "a")
    rig.decode(req, [30, 31, 32, 33, 34, 35])
    rig.finish(req, delivered=2)
    rig.check()
    assert sum(n.tokens for n in rig.tree.session_path("a")) == 22
