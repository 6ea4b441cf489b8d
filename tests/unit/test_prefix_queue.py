"""The eviction queue: smallest key first, whatever the keys mean."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stateful_sglang.prefix.queue import EvictionQueue


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
        lambda item: (now[item],) if item in now and item not in blocked else None
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
            queue.offer(item, (now[item],))


def test_queue_stays_small_when_keys_keep_falling() -> None:
    queue = EvictionQueue(lambda item: (0,))
    for recency in range(10_000, 0, -1):
        queue.offer(7, (recency,))
    assert len(queue) == 1
    assert len(queue._heap) < 100
    assert queue.pop() == 7
    assert queue.pop() is None


def test_a_forgotten_item_never_comes_up() -> None:
    queue = EvictionQueue(lambda item: (0,))
    queue.offer(1, (0,))
    queue.offer(2, (0,))
    queue.forget(1)
    assert [queue.pop(), queue.pop()] == [2, None]
