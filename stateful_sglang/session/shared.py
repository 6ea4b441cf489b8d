"""Sequences that share storage: each is a view of what it holds, and growing makes another view.

A view is a run and a length. A run is an append-only buffer that continues another run from a
position on::

    run A   0 ─────────────────── 900        A.parent is None
    run B             700 ──── 950           B.start is 700, B.parent is A
    view (B, 820)  =  A[0:700] + B[700:820]

Whoever grows a view that ends where its run ends appends to that run in place: the views before it
end earlier and see nothing of it. Whoever grows a view that ends earlier begins a run of its own.
So a history without rewinds is one contiguous buffer, and forks share all that they have in common.

Costs, with n items held and d new:

- length, last item, copying or forking a view: O(1); a view is two references.
- `extended`: O(d), amortised as appending to a list is, plus at most `_COPIED` items where a run
  begins.
- `slice`: a memory copy of what is asked, plus a step for each run that lies behind it.
- `cut`: a step for each run it passes.

A run that others continue keeps more than `_COPIED` items of its own, because a shorter rest is
copied into the run that would continue it. So a view has at most n / `_COPIED` + 1 runs however
many times it was rewound: 98 for 100,000 tokens. A buffer lives as long as any view of it or of a
run that continues it: what only a dropped view reached, beyond the end of every other, goes when
the whole buffer does.

One thread grows the views of a buffer. Others may read them meanwhile, because a slice of a list or
an array is taken in one step of the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Generic, Self, SupportsIndex, TypeVar, overload

T = TypeVar("T")

_COPIED = 1024
"""Items that a new run copies rather than continue a run that keeps so few of its own."""


@dataclass(eq=False, slots=True)
class _Run(Generic[T]):
    start: int
    items: MutableSequence[T]
    """Items from position `start` on. Only ever appended to."""
    parent: _Run[T] | None
    """Holds what comes before `start`; None where that is 0."""


class Shared(Sequence[T]):
    """An immutable sequence whose growth shares what it grew from."""

    __slots__ = ("_length", "_run")

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._run = _Run(0, self._stored(items), None)
        self._length = len(self._run.items)

    @staticmethod
    def _stored(items: Iterable[T]) -> MutableSequence[T]:
        """The items in a buffer of their own."""
        return list(items)

    @classmethod
    def _view(cls, run: _Run[T], length: int) -> Self:
        view = cls.__new__(cls)
        view._run, view._length = run, length
        return view

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        return iter(self.slice(0))

    @overload
    def __getitem__(self, index: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> MutableSequence[T]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> T | MutableSequence[T]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            return self.slice(start, stop)[::step] if step > 0 else self.slice(0)[index]
        position = range(self._length)[index]
        run = self._run
        while position < run.start:
            assert run.parent is not None
            run = run.parent
        return run.items[position - run.start]

    def slice(self, start: int, stop: int | None = None) -> MutableSequence[T]:
        """A copy of the items in ``[start, stop)``; `stop` defaults to the end."""
        start, end, _ = slice(start, stop).indices(self._length)
        parts: list[MutableSequence[T]] = []
        run: _Run[T] | None = self._run
        while run is not None and start < end:
            begin = max(start, run.start)
            if begin < end:
                parts.append(run.items[begin - run.start : end - run.start])
                end = begin
            run = run.parent
        if not parts:
            return self._stored(())
        whole = parts.pop()
        for part in reversed(parts):
            whole.extend(part)
        return whole

    def last(self) -> T | None:
        """The last item, or None where there is none yet."""
        return self[-1] if self._length else None

    def extended(self, items: Iterable[T]) -> Self:
        """This sequence with `items` behind it, in time proportional to how many they are."""
        new = self._stored(items)
        if not new:
            return self
        run = self._run
        length = self._length + len(new)
        kept = self._length - run.start
        if kept == len(run.items):
            run.items.extend(new)
        elif kept <= _COPIED:
            run = _Run(run.start, run.items[:kept], run.parent)
            run.items.extend(new)
        else:
            run = _Run(self._length, new, run)
        return self._view(run, length)

    def cut(self, length: int) -> Self:
        """The first `length` items.

        Raises:
            ValueError: `length` is negative or lies beyond the end.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot cut to {length} items: the sequence holds {self._length}")
        if length == 0:
            return type(self)()  # holding on to no buffer
        if length == self._length:
            return self
        run = self._run
        while length <= run.start:
            assert run.parent is not None
            run = run.parent
        return self._view(run, length)
