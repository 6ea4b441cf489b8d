"""What a tenant has in flight is counted, bounded, and forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateful_sglang import tenants
from stateful_sglang.tenants import Identity, InFlight, OverLimitError, TenantLimits
from stateful_sglang.tenants.salts import narrowed, request_id

LIMITS = TenantLimits(requests=2, pending_bytes=100)
SALT, OTHER = "a" * 64, "b" * 64


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "1"])
def test_a_limit_is_a_number_of_at_least_one(value: object) -> None:
    with pytest.raises(ValueError, match="expected a whole number of at least 1"):
        TenantLimits(tokens=value)  # type: ignore[arg-type]


def test_a_request_too_many_is_refused_until_one_ends() -> None:
    counted = InFlight()
    counted.enter("a", LIMITS, 1)
    counted.enter("a", LIMITS, 1)
    with pytest.raises(OverLimitError, match="2 requests of this tenant are in flight") as refused:
        counted.enter("a", LIMITS, 1)
    assert not refused.value.ever
    counted.enter("b", LIMITS, 1)
    counted.leave("a", 1)
    counted.enter("a", LIMITS, 1)


def test_bytes_too_many_are_refused_until_some_are_gone() -> None:
    counted = InFlight()
    counted.enter("a", LIMITS, 60)
    with pytest.raises(OverLimitError, match="later") as refused:
        counted.enter("a", LIMITS, 41)
    assert not refused.value.ever
    counted.leave("a", 60)
    counted.enter("a", LIMITS, 41)


def test_a_body_that_no_waiting_lets_in_is_told_so() -> None:
    counted = InFlight()
    with pytest.raises(OverLimitError, match="send less") as refused:
        counted.enter("a", LIMITS, 101)
    assert refused.value.ever
    counted.enter("a", LIMITS, 0)
    counted.grow("a", LIMITS, 100, 0)
    with pytest.raises(OverLimitError, match="send less"):
        counted.grow("a", LIMITS, 1, 100)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 120), st.booleans())))
def test_counts_never_pass_a_limit_and_are_zero_when_all_is_over(
    steps: list[tuple[str, int, bool]],
) -> None:
    counted = InFlight()
    running: list[tuple[str, int]] = []
    for tenant, size, end in steps:
        if end and running:
            counted.leave(*running.pop(0))
            continue
        mine = [held for name, held in running if name == tenant]
        fits = len(mine) < LIMITS.requests and sum(mine) + size <= LIMITS.pending_bytes
        try:
            counted.enter(tenant, LIMITS, size)
        except OverLimitError:
            assert not fits
        else:
            assert fits
            running.append((tenant, size))
    for each in running:
        counted.leave(*each)
    assert vars(counted) == {"_held": {}}


@given(st.text())
def test_a_clients_salt_reaches_nothing_outside_its_tenant(own: str) -> None:
    salts = {narrowed(SALT, own), narrowed(OTHER, own), narrowed(SALT, None), narrowed(OTHER, None)}
    assert len(salts) == (4 if own else 2)
    assert own not in salts
    assert narrowed(SALT, OTHER) not in (OTHER, narrowed(OTHER, None))


def test_without_tenants_a_clients_salt_is_what_it_is() -> None:
    assert narrowed(None, "x") == "x"
    assert narrowed(None, None) is None


@given(st.text(), st.text(), st.sampled_from([None, SALT]))
def test_ids_are_of_one_length_and_differ_where_their_names_do(
    one: str, other: str, salt: str | None
) -> None:
    ids = request_id(salt, one), request_id(salt, other)
    assert [len(each) for each in ids] == [32, 32]
    assert (ids[0] == ids[1]) == (one == other)
    assert request_id(OTHER, one) != ids[0]


def test_half_a_surrogate_pair_which_json_can_hold_is_no_error() -> None:
    assert len(request_id(SALT, "\ud800")) == 32
    assert narrowed(SALT, "\ud800") != SALT


def test_the_servers_own_ids_stay_where_there_are_no_tenants() -> None:
    own = "0123456789abcdef" * 2
    assert request_id(None, own) == own
    assert request_id(SALT, own) != own


def test_who_asks_is_known_within_and_forgotten_after() -> None:
    caller = Identity("acme", salt=SALT)
    assert tenants.current() is tenants.SERVER
    with tenants.acting_as(caller):
        assert tenants.current() is caller
    assert tenants.current() is tenants.SERVER
    assert SALT not in repr(caller)
