"""Keys with an open part: what they are found under, where they agree, what their slices are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from prefix_rig import RadixKey

from stateful_sglang.runtime.tree.open_keys import OpenKey


def key(
    tokens: Sequence[int], salt: str | None = "a", open_len: int = 0, *, bigram: bool = False
) -> OpenKey:
    plain = RadixKey(array("q", tokens), is_bigram=bigram, cache_salt=salt)
    return OpenKey.of(plain, open_len)


TOKENS = range(12)


def test_an_open_part_is_found_without_the_salt_and_the_rest_with_it() -> None:
    mixed, bare, salted = key(TOKENS, open_len=8), key(TOKENS, None), key(TOKENS)
    for offset in (0, 4):
        assert mixed.child_key_at(offset, 4) == bare.child_key_at(offset, 4)
    assert mixed.child_key_at(8, 4) == salted.child_key_at(8, 4) != bare.child_key_at(8, 4)


def test_an_extra_key_stays_where_the_salt_is_left_out() -> None:
    plain = RadixKey(array("q", TOKENS), "lora", cache_salt="a")
    alone = RadixKey(array("q", TOKENS), "lora")
    assert OpenKey.of(plain, 4).child_key(4) == alone.child_key(4)


@pytest.mark.parametrize("bigram", [False, True])
@pytest.mark.parametrize("start", range(0, 12, 2))
@pytest.mark.parametrize("stop", range(0, 12, 2))
def test_slices_are_found_under_what_their_place_in_the_whole_is(
    bigram: bool, start: int, stop: int
) -> None:
    whole = key([*TOKENS, 12] if bigram else TOKENS, open_len=6, bigram=bigram)
    part = whole[start:stop]
    assert len(part) == max(0, stop - start)
    for offset in range(0, len(part), 2):
        assert part.child_key_at(offset, 2) == whole.child_key_at(start + offset, 2)
    if len(part):
        assert (part.cache_salt is None) == (stop <= 6)
        assert part.open_len == (6 - start if start < 6 < stop else 0)


def test_salts_part_where_the_open_part_ends() -> None:
    mine, theirs = key(TOKENS, "a", 8), key(TOKENS, "b", 8)
    assert mine.match(theirs) == 8
    assert mine.match(key(TOKENS, "a", 8)) == 12
    assert mine[:8].match_at(theirs, 0) == 8
    assert mine[8:].match_at(key(TOKENS, "a", 8), 8) == 4
    with pytest.raises(ValueError, match="matching salts"):
        mine[8:].match_at(theirs, 8)


def test_a_match_ends_where_the_shorter_open_part_does() -> None:
    assert key(TOKENS, None).match(key(TOKENS, "a", 4)) == 4
    assert key(TOKENS, "a", 8).match(key(TOKENS, "a", 4)) == 4
    with pytest.raises(ValueError, match="matching salts"):
        key(TOKENS).match(key(TOKENS, "a", 4))


def test_what_is_open_as_a_whole_has_no_salt() -> None:
    whole = key(TOKENS, "a", 16)
    assert whole.cache_salt is None
    assert whole.match(key(TOKENS, None)) == 12
    limited = RadixKey(array("q", TOKENS), limit=8, cache_salt="a")
    assert OpenKey.of(limited, 8).cache_salt is None
    assert len(OpenKey.of(limited, 4)) == 8


def test_another_extra_key_never_agrees() -> None:
    other = OpenKey.of(RadixKey(array("q", TOKENS), "lora", cache_salt="a"), 8)
    with pytest.raises(ValueError, match="matching extra_key"):
        key(TOKENS, "a", 8).match(other)
