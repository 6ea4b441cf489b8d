"""Orders of eviction: pure rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stateful_sglang.prefix.policies import POLICIES
from stateful_sglang.prefix.policies.base import EvictionClass, NodeFacts
from stateful_sglang.prefix.policies.cardinal import Cardinal
from stateful_sglang.prefix.policies.lru import Lru

FACTS = st.builds(
    NodeFacts,
    cardinality=st.integers(0, 9),
    pins=st.just(0),
    dead=st.booleans(),
    recency=st.integers(0, 99).map(float),
    tokens=st.integers(1, 99),
    depth=st.integers(99, 999),
)


def node(
    cardinality: int = 0, pins: int = 0, dead: bool = False, recency: float = 0, tokens: int = 1
) -> NodeFacts:
    return NodeFacts(cardinality, pins, dead, recency, tokens, depth=100)


def test_cardinal_takes_dead_anonymous_idle_trunk_pinned() -> None:
    order = [
        node(dead=True, recency=9),
        node(recency=1),
        node(recency=2),
        node(cardinality=1, recency=0),
        node(cardinality=1, recency=5),
        node(cardinality=3, recency=0),
        node(cardinality=1, pins=1, recency=0),
        node(cardinality=2, pins=1, recency=0),
    ]
    assert order == sorted(order, key=Cardinal().key)
    assert [each.kind for each in order[:4:3]] == [EvictionClass.DEAD, EvictionClass.IDLE]


def test_lru_asks_for_nothing_but_the_last_use() -> None:
    order = [
        node(cardinality=2, pins=1, recency=0),
        node(cardinality=1, recency=1),
        node(dead=True, recency=2),
        node(recency=3),
    ]
    assert order == sorted(order, key=Lru().key)


@given(FACTS)
def test_asked_twice_a_policy_answers_the_same(facts: NodeFacts) -> None:
    for name in POLICIES:
        policy = POLICIES.load(name)()
        first = policy.key(facts)
        policy.key(facts._replace(recency=facts.recency + 1))
        assert policy.key(facts) == first == POLICIES.load(name)().key(facts)


@given(FACTS, st.integers(1, 5))
def test_a_use_never_makes_a_node_cheaper(facts: NodeFacts, later: int) -> None:
    """No one offers a node that was only used: its key may rise, which needs no notice."""
    used = facts._replace(recency=facts.recency + later, dead=False)
    for name in POLICIES:
        policy = POLICIES.load(name)()
        assert policy.key(used) >= policy.key(facts)


@given(FACTS)
def test_where_pins_are_kept_a_pinned_node_goes_after_any_other(facts: NodeFacts) -> None:
    pinned = node(cardinality=1, pins=1)
    for name in POLICIES:
        policy = POLICIES.load(name)()
        if policy.keeps_pins:
            assert policy.key(pinned) > policy.key(facts)
