"""A transcript behaves as a list of tokens."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stateful_sglang.session.transcript import Transcript

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=20)


class TranscriptAgainstList(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.transcript = Transcript()
        self.reference: list[int] = []

    @rule(new=tokens)
    def extend(self, new: list[int]) -> None:
        self.transcript.extend(new)
        self.reference.extend(new)

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(self.reference)))
        self.transcript.truncate(length)
        del self.reference[length:]

    @rule(start=st.integers(-30, 30), stop=st.none() | st.integers(-30, 30))
    def slice(self, start: int, stop: int | None) -> None:
        assert self.transcript.slice(start, stop).tolist() == self.reference[start:stop]
        widened = self.transcript.widened(start, stop)
        assert (widened.typecode, widened.tolist()) == ("q", self.reference[start:stop])

    @rule(beyond=st.integers(1, 5))
    def truncating_beyond_the_end_changes_nothing(self, beyond: int) -> None:
        for length in (len(self.reference) + beyond, -beyond):
            with pytest.raises(ValueError, match="cannot truncate"):
                self.transcript.truncate(length)

    @invariant()
    def same_tokens(self) -> None:
        assert list(self.transcript) == self.reference
        assert len(self.transcript) == len(self.reference)
        assert self.transcript.last() == (self.reference[-1] if self.reference else None)


TestTranscript = TranscriptAgainstList.TestCase


def test_a_slice_is_a_copy() -> None:
    transcript = Transcript([1, 2, 3])
    transcript.slice(0)[0] = 9
    assert list(transcript) == [1, 2, 3]
