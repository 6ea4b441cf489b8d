"""What every draft source keeps to, whatever it drafts; and what the suffix source drafts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateful_sglang.draft import sources
from stateful_sglang.draft.sources.base import NO_DRAFT, DraftSource
from stateful_sglang.draft.sources.suffix import SuffixSource

TOKENS = st.lists(st.integers(0, 3), max_size=20)


@pytest.fixture(scope="module", params=list(sources.SOURCES))
def make_source(request: pytest.FixtureRequest) -> type[DraftSource]:
    return sources.SOURCES.load(request.param)


def following(make_source: type[DraftSource], tokens: list[int]) -> DraftSource:
    source = make_source()
    source.follow(tokens)
    return source


@given(text=TOKENS, more=TOKENS, count=st.integers(0, 9))
@settings(deadline=None)
def test_a_draft_fits_what_was_asked_for_and_asking_changes_nothing(
    make_source: type[DraftSource], text: list[int], more: list[int], count: int
) -> None:
    source = following(make_source, text)
    draft = source.draft(count)
    assert len(draft.tokens) <= count
    assert 0 <= draft.grade < len(source.priors)
    assert source.draft(count) == draft
    source.follow(more)
    assert source.draft(count) == following(make_source, text + more).draft(count)


@given(text=TOKENS, more=TOKENS, data=st.data())
@settings(deadline=None)
def test_what_was_cut_off_is_forgotten(
    make_source: type[DraftSource], text: list[int], more: list[int], data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, len(text)))
    source = following(make_source, text)
    source.truncate(kept)
    assert len(source) == kept
    source.follow(more)
    fresh = following(make_source, text[:kept] + more)
    assert len(source) == len(fresh)
    assert source.draft(8) == fresh.draft(8)


@given(text=TOKENS, other=TOKENS)
@settings(deadline=None)
def test_it_knows_how_much_it_shares_with_another_text(
    make_source: type[DraftSource], text: list[int], other: list[int]
) -> None:
    shared = 0
    while shared < min(len(text), len(other)) and text[shared] == other[shared]:
        shared += 1
    source = following(make_source, text)
    assert source.common_prefix(np.array(other, dtype=np.int64)) == shared
    assert len(source) == len(text)


def test_a_chance_is_one(make_source: type[DraftSource]) -> None:
    for prior in make_source.priors:
        assert 0 < prior.first <= 1
        assert 0 < prior.next <= 1


def test_a_repeated_token_is_drafted_beyond_its_one_known_successor() -> None:
    assert following(SuffixSource, [7, 5, 5]).draft(4).tokens == (5, 5, 5, 5)


def test_what_followed_the_same_words_is_drafted_and_a_longer_match_is_surer() -> None:
    long = following(SuffixSource, [*range(20), 50, *range(10)]).draft(3)
    short = following(SuffixSource, [*range(20), 50, 9]).draft(3)
    assert long.tokens == short.tokens == (10, 11, 12)
    assert long.grade > short.grade


def test_a_new_word_drafts_nothing() -> None:
    assert following(SuffixSource, [1, 2, 3]).draft(8) is NO_DRAFT


def test_auto_is_the_default_source_and_a_name_is_itself() -> None:
    assert sources.chosen(sources.AUTO) is sources.SOURCES.load(sources.DEFAULT)
    assert sources.chosen("suffix") is SuffixSource


def test_an_unknown_source_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no draft source is called 'oracle'.*suffix"):
        sources.chosen("oracle")
