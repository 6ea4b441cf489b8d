"""Order of eviction and of pins: pure rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateful_sglang.prefix.policy import (
    EvictionClass,
    EvictionKey,
    EvictionQueue,
    PinOrder,
    eviction_key,
    pin_budget_tokens,
)


def key(cardinality: int = 0, pins: int = 0, dead: bool = False, recency: float = 0) -> EvictionKey:
    return eviction_key(cardinality=cardinality, pins=pins, dead=dead, recency=recency)


def test_order_is_dead_anonymous_idle_trunk_pinned() -> None:
    order = [
        key(dead=True, recency=9),
        key(recency=1),
        key(recency=2),
        key(cardinality=1, recency=0),
        key(cardinality=1, recency=5),
        key(cardinality=3, recency=0),
        key(cardinality=1, pins=1, recency=0),
        key(cardinality=2, pins=1, recency=0),
    ]
    assert order == sorted(order)
    assert [k.kind for k in order[:4:3]] == [EvictionClass.DEAD, EvictionClass.IDLE]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.integers(0, 9), st.integers(0, 20)),
            st.tuples(st.just("rise"), st.integers(0, 9), st.integers(1, 5)),
            st.tuples(st.just("block"), st.integers(0, 9), st.booleans()),
            st.tuples(st.just("pop"), st.just(0), st.just(0)),
        ),
        max_size=200,
    )
)
def test_queue_pops_the_smallest_evictable_item(steps: list[tuple[str, int, int]]) -> None:
    now: dict[int, int] = {}
    blocked: set[int] = set()
    queue = EvictionQueue(
        lambda item: key(recency=now[item]) if item in now and item not in blocked else None
    )
    for step, item, value in steps:
        if step == "offer":
            now[item] = value
        elif step == "rise" and item in now:
            now[item] += value  # not offered: the queue finds out by itself
            continue
        elif step == "block":
            (blocked.add if value else blocked.discard)(item)
        elif step == "pop":
            free = {i: v for i, v in now.items() if i not in blocked}
            popped = queue.pop()
            assert popped == min(free, key=lambda i: (free[i], i), default=None)
            now.pop(popped, None)
            continue
        if item in now and item not in blocked:
            queue.offer(item, key(recency=now[item]))


def test_queue_stays_small_when_keys_keep_falling() -> None:
    queue = EvictionQueue(lambda item: key(recency=0))
    for recency in range(10_000, 0, -1):
        queue.offer(7, key(recency=recency))
    assert len(queue) == 1
    assert len(queue._heap) < 100
    assert queue.pop() == 7
    assert queue.pop() is None


def test_a_forgotten_item_never_comes_up() -> None:
    queue = EvictionQueue(lambda item: key())
    queue.offer(1, key())
    queue.offer(2, key())
    queue.forget(1)
    assert [queue.pop(), queue.pop()] == [2, None]


def test_pins_leave_the_coldest_session_and_come_back_to_the_hottest() -> None:
    order = PinOrder()
    for name in "abc":
        order.pin(name)
    order.pin("a")
    assert [order.demote_coldest(), order.demote_coldest()] == ["b", "c"]
    assert order.next_waiting() == "c"
    order.promote("c")
    assert order.demote_coldest() == "c"
    order.drop("c")
    assert order.next_waiting() == "b"
    assert "a" in order
    assert "b" not in order


@pytest.mark.parametrize("fraction", [-0.1, 1.01, float("nan")])
def test_a_budget_outside_the_pool_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        pin_budget_tokens(fraction, 100)


def test_a_budget_is_a_share_of_the_pool() -> None:
    assert pin_budget_tokens(0.25, 1000) == 250
