"""Views of shared storage behave as lists that nobody else can change."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from stateful_sglang.session.shared import Shared
from stateful_sglang.session.transcript import Transcript

LONG = 3000
"""More items than a new run copies: a view cut within them continues the run it was cut from."""
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=20) | st.builds(
    lambda start, count: list(range(start, start + count)),
    st.integers(0, 9),
    st.integers(0, LONG),
)
edges = st.none() | st.integers(-LONG, LONG)


class ViewsAgainstLists(RuleBasedStateMachine):
    """Grows and cuts any view made so far, in any order."""

    made = Bundle("made")
    kind: type[Shared[int]] = Shared

    def __init__(self) -> None:
        super().__init__()
        self.views: list[tuple[Shared[int], list[int]]] = []

    def keep(self, view: Shared[int], reference: list[int]) -> int:
        self.views.append((view, reference))
        return len(self.views) - 1

    @rule(target=made, items=tokens)
    def start(self, items: list[int]) -> int:
        return self.keep(self.kind(items), items)

    @rule(target=made, view=made, items=tokens)
    def extend(self, view: int, items: list[int]) -> int:
        shared, reference = self.views[view]
        return self.keep(shared.extended(items), reference + items)

    @rule(target=made, view=made, data=st.data())
    def cut(self, view: int, data: st.DataObject) -> int:
        shared, reference = self.views[view]
        length = data.draw(st.integers(0, len(reference)))
        return self.keep(shared.cut(length), reference[:length])

    @rule(view=made, start=edges, stop=edges, step=st.sampled_from([None, 1, 2, -1, -3]))
    def slice(self, view: int, start: int | None, stop: int | None, step: int | None) -> None:
        shared, reference = self.views[view]
        assert list(shared.slice(start or 0, stop)) == reference[start or 0 : stop]
        assert list(shared[start:stop:step]) == reference[start:stop:step]

    @rule(view=made, data=st.data())
    def index(self, view: int, data: st.DataObject) -> None:
        shared, reference = self.views[view]
        if reference:
            position = data.draw(st.integers(-len(reference), len(reference) - 1))
            assert shared[position] == reference[position]

    @rule(view=made, beyond=st.integers(1, 5))
    def what_lies_outside_is_an_error(self, view: int, beyond: int) -> None:
        shared, reference = self.views[view]
        for length in (len(reference) + beyond, -beyond):
            with pytest.raises(ValueError, match="cannot cut"):
                shared.cut(length)
        with pytest.raises(IndexError):
            shared[len(reference) + beyond - 1]

    @invariant()
    def no_view_ever_changes(self) -> None:
        for shared, reference in self.views:
            assert list(shared) == reference
            assert len(shared) == len(reference)
            assert shared.last() == (reference[-1] if reference else None)


class TranscriptsAgainstLists(ViewsAgainstLists):
    kind = Transcript

    @rule(one=ViewsAgainstLists.made, other=ViewsAgainstLists.made)
    def compare(self, one: int, other: int) -> None:
        (ours, left), (theirs, right) = self.views[one], self.views[other]
        same = next(
            (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
            min(len(left), len(right)),
        )
        assert ours.common_prefix(theirs) == ours.common_prefix(right) == same

    @rule(view=ViewsAgainstLists.made, start=st.integers(0, LONG), stop=edges)
    def widen(self, view: int, start: int, stop: int | None) -> None:
        transcript, reference = self.views[view]
        wide = transcript.wide(start, stop)
        assert wide.typecode == "q"
        assert wide.tolist() == reference[start:stop]


_SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestViews = ViewsAgainstLists.TestCase
TestViews.settings = _SETTINGS
TestTranscripts = TranscriptsAgainstLists.TestCase
TestTranscripts.settings = _SETTINGS


def runs_of(view: Shared[int]) -> int:
    count, run = 1, view._run
    while run.parent is not None:
        count, run = count + 1, run.parent
    return count


def test_a_slice_is_a_copy() -> None:
    transcript = Transcript([1, 2, 3])
    transcript.slice(0)[0] = 9
    assert list(transcript) == [1, 2, 3]


def test_growing_at_the_end_is_in_place() -> None:
    first = Transcript(range(5000))
    second = first.extended([1]).extended([2])
    assert second._run is first._run
    assert list(second) == [*range(5000), 1, 2]


def test_growing_the_same_view_twice_shares_all_that_came_before() -> None:
    trunk = Transcript(range(5000))
    left, right = trunk.extended([1]), trunk.extended([2])
    assert right._run.parent is left._run
    assert len(right._run.items) == 1


def test_cutting_to_where_a_run_begins_lets_go_of_the_run() -> None:
    trunk = Transcript(range(5000))
    trunk.extended([1])
    branch = trunk.extended([2])
    assert branch.cut(5000)._run is trunk._run
    assert branch.cut(0)._run.parent is None


@given(rewind=st.integers(0, 2500), new=st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_runs_are_few_however_often_a_view_was_rewound(rewind: int, new: int) -> None:
    transcript = Transcript()
    for turn in range(1500):
        transcript = transcript.cut(max(0, len(transcript) - rewind))
        transcript = transcript.extended([turn] * (rewind + new))
    assert runs_of(transcript) <= len(transcript) // 1024 + 1


def test_tokens_that_do_not_fit_change_nothing() -> None:
    transcript = Transcript([1, 2])
    with pytest.raises(OverflowError):
        transcript.extended([3, 2**31])
    assert list(transcript.extended([4])) == [1, 2, 4]
