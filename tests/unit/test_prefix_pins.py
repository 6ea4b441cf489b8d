"""Which sessions hold a pin, and how much pins may claim."""

from __future__ import annotations

import pytest

from stateful_sglang.prefix.pins import PinOrder, pin_budget_tokens


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
