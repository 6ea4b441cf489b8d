"""The suffix automaton finds what a naive search finds, whatever is appended and taken back."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stateful_sglang.draft.automaton import Match, SuffixAutomaton

TOKENS = st.lists(st.integers(0, 3), max_size=12)


def naive_match(text: list[int]) -> Match:
    """Longest suffix that also ends before the end of the text, latest such end."""
    n = len(text)
    best = Match(0, 0)
    for end in range(1, n):
        length = 0
        while length < end and text[end - 1 - length] == text[n - 1 - length]:
            length += 1
        if length and length >= best.length:
            best = Match(length, end)
    return best


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[int] = []
        self.automaton = SuffixAutomaton()

    @rule(tokens=TOKENS)
    def extend(self, tokens: list[int]) -> None:
        self.text += tokens
        self.automaton.extend(tokens)

    @precondition(lambda self: self.text)
    @rule(data=st.data())
    def repeat_a_passage(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.text) - 1))
        passage = self.text[start : start + data.draw(st.integers(1, 10))]
        self.text += passage
        self.automaton.extend(passage)

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(self.text) + 2))
        del self.text[length:]
        self.automaton.truncate(length)

    @invariant()
    def finds_what_a_naive_search_finds(self) -> None:
        assert self.automaton.match() == naive_match(self.text)
        assert self.automaton.tokens().tolist() == self.text

    @invariant()
    def continues_from_there(self) -> None:
        length, source = naive_match(self.text)
        if not length:
            return
        found = self.automaton.continuation(source, 5)
        assert len(found) == 5
        whole = self.text + found
        assert found == whole[source : source + 5]


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestAutomaton = Machine.TestCase


@given(st.lists(st.integers(0, 2), max_size=40), st.data())
@settings(max_examples=150, deadline=None)
def test_truncation_restores_the_very_same_automaton(text: list[int], data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(text)))
    automaton = SuffixAutomaton(text)
    automaton.truncate(length)
    fresh = SuffixAutomaton(text[:length])
    for name in SuffixAutomaton.__slots__:
        assert getattr(automaton, name) == getattr(fresh, name), name


def test_negative_truncation_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        SuffixAutomaton([1, 2]).truncate(-1)


def test_degenerate_repetition_stays_linear() -> None:
    started = time.process_time()
    automaton = SuffixAutomaton([1] * 20_000)
    assert automaton.match() == Match(19_999, 19_999)
    automaton.truncate(10)
    assert automaton.match() == Match(9, 9)
    # A quadratic walk of the suffix links would take minutes.
    assert time.process_time() - started < 10
